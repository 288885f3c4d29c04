#!/usr/bin/env bash
# Compare static models, distillation-based layer dropping and early exit for the same
# total arithmetic. `local/compare.sh --help` lists the options, and more systems.
[ -n "${BASH_VERSION-}" ] || { echo "error: $0 needs bash: bash $0" >&2; exit 1; }
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tests="test_seen test_seen_20db test_seen_10db test_unseen test_unseen_10db"
../../TEMPLATE/asr1/compare.sh --epochs 8 --budgets total \
    --systems "static12 static6 static2 dld early_exit anytime early_exit_half" \
    --run_opts "--test_sets '${tests}'" "$@"
