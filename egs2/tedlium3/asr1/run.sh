#!/usr/bin/env bash
# TED-LIUM 3, 452 h, at the size of arXiv 2601.16117. `./run.sh --help` lists the options.
# Set $TEDLIUM3 to a copy of the corpus, else it is downloaded.
[ -n "${BASH_VERSION-}" ] || { echo "error: $0 needs bash: bash $0" >&2; exit 1; }
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

../../TEMPLATE/asr1/asr.sh \
    --train_set train \
    --valid_set dev \
    --test_sets "test dev" \
    --fs 16000 \
    --token_type bpe \
    --nbpe 256 \
    --nlsyms_txt conf/nlsyms.txt \
    --speed_perturb_factors "0.9 1.0 1.1" \
    --inference_depths "12 10 8 6 4 2" \
    --license cc-by-nc-nd-3.0 \
    "$@"
