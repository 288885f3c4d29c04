#!/usr/bin/env bash
# Eight real recordings and a tiny model: every stage in minutes, to see that it works.
# Its error rates mean nothing. `./run.sh --help` lists the options.
[ -n "${BASH_VERSION-}" ] || { echo "error: $0 needs bash: bash $0" >&2; exit 1; }
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

../../TEMPLATE/asr1/asr.sh \
    --train_set train_nodev \
    --valid_set train_dev \
    --test_sets "train_dev test" \
    --fs 16000 \
    --token_type char \
    --inference_depths "4 2" \
    --num_threads 1 \
    --inference_nj 1 \
    --rtf_utts 2 \
    "$@"
