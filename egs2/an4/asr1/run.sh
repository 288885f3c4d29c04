#!/usr/bin/env bash
# AN4, letters, digits and names: the usual first recipe of an ESPnet user.
# `./run.sh --help` lists the options. Set $AN4 to a copy, else it is downloaded (64 MB).
[ -n "${BASH_VERSION-}" ] || { echo "error: $0 needs bash: bash $0" >&2; exit 1; }
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

../../TEMPLATE/asr1/asr.sh \
    --train_set train_nodev \
    --valid_set train_dev \
    --test_sets "train_dev test" \
    --fs 16000 \
    --token_type bpe \
    --nbpe 30 \
    --speed_perturb_factors "0.9 1.0 1.1" \
    --inference_depths "12 10 8 6 4 2" \
    "$@"
