#!/usr/bin/env bash
# AISHELL-1, 178 h of Mandarin, in characters. `./run.sh --help` lists the options.
# Set $AISHELL to a copy of the corpus, else it is downloaded (15 GB).
[ -n "${BASH_VERSION-}" ] || { echo "error: $0 needs bash: bash $0" >&2; exit 1; }
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

../../TEMPLATE/asr1/asr.sh \
    --lang zh \
    --train_set train \
    --valid_set dev \
    --test_sets "dev test" \
    --fs 16000 \
    --token_type char \
    --speed_perturb_factors "0.9 1.0 1.1" \
    --inference_depths "12 10 8 6 4 2" \
    --license apache-2.0 \
    "$@"
