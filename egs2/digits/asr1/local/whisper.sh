#!/usr/bin/env bash
# Fine-tune Whisper-tiny's encoder, static at each depth and anytime, and compare them.
# WHISPER_ENCODER names a directory with it; else it is had from the Hub.
# `local/whisper.sh --help` lists the options.
[ -n "${BASH_VERSION-}" ] || { echo "error: $0 needs bash: bash $0" >&2; exit 1; }
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tests="test_seen test_seen_20db test_seen_10db test_unseen test_unseen_10db"
../../TEMPLATE/asr1/compare.sh --asr_config conf/train_asr_whisper.yaml --epochs 3 \
    --systems "static4 static3 static2 static1 early_exit anytime_each" --depths "4 3 2 1" \
    --budgets steps --dumpdir dump/16k --expdir exp/whisper --results results_whisper \
    --run_opts "--test_sets '${tests}' --fs 16k --feats_normalize none" "$@"
