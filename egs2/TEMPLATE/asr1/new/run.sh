#!/usr/bin/env bash
# @NAME@. `./run.sh --help` lists the options. Set $@VARIABLE@ to the corpus.
[ -n "${BASH_VERSION-}" ] || { echo "error: $0 needs bash: bash $0" >&2; exit 1; }
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

../../TEMPLATE/asr1/asr.sh \
    --train_set train \
    --valid_set dev \
    --test_sets "dev test" \
    --fs 16000 \
    --token_type char \
    --inference_depths "12 10 8 6 4 2" \
    "$@"
