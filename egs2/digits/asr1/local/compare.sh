#!/usr/bin/env bash
# Compare static models of each depth, random dropping, early exit, DLD and the anytime
# encoder. `local/compare.sh --help` lists the options.
[ -n "${BASH_VERSION-}" ] || { echo "error: $0 needs bash: bash $0" >&2; exit 1; }
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tests="test_seen test_seen_20db test_seen_10db test_unseen test_unseen_10db"
../../TEMPLATE/asr1/compare.sh --asr_config conf/train_asr_compared.yaml --epochs 24 \
    --run_opts "--test_sets '${tests}'" "$@"
