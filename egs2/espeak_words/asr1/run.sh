#!/usr/bin/env bash
# Sentences of 2,000 words spoken by espeak-ng: the whole experiment on two CPU cores.
# `./run.sh --help` lists the options; any of them can be given here.
[ -n "${BASH_VERSION-}" ] || { echo "error: $0 needs bash: bash $0" >&2; exit 1; }
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

../../TEMPLATE/asr1/asr.sh \
    --train_set train \
    --valid_set dev \
    --test_sets "test_seen test_unseen" \
    --fs 8000 \
    --token_type char \
    --num_threads 1 \
    --max_wav_duration 15 \
    --inference_depths "12 10 8 6 4 2" \
    "$@"
