#!/usr/bin/env bash
# LibriSpeech 960 h at the size of arXiv 2601.16117. `./run.sh --help` lists the options.
# Set $LIBRISPEECH to a copy of the corpus, else it is downloaded (about 60 GB).
[ -n "${BASH_VERSION-}" ] || { echo "error: $0 needs bash: bash $0" >&2; exit 1; }
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

../../TEMPLATE/asr1/asr.sh \
    --train_set train_960 \
    --valid_set dev \
    --test_sets "test_clean test_other dev_clean dev_other" \
    --fs 16000 \
    --token_type bpe \
    --nbpe 256 \
    --speed_perturb_factors "0.9 1.0 1.1" \
    --max_wav_duration 30 \
    --inference_depths "12 10 8 6 4 2" \
    "$@"
