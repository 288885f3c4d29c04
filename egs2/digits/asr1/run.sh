#!/usr/bin/env bash
# Connected digits: the whole experiment on two CPU cores. `./run.sh --help` lists the
# options; any of them can be given here, for example --local_data_opts "--source espeak".
[ -n "${BASH_VERSION-}" ] || { echo "error: $0 needs bash: bash $0" >&2; exit 1; }
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

../../TEMPLATE/asr1/asr.sh \
    --train_set train_noisy \
    --valid_set dev_noisy \
    --test_sets "test_seen test_seen_10db test_unseen" \
    --fs 8000 \
    --token_type word \
    --max_wav_duration 15 \
    --num_threads 1 \
    --inference_depths "12 10 8 6 4 2" \
    --license cc-by-sa-4.0 \
    "$@"
