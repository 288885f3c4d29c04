#!/usr/bin/env bash
# Compare static models, early exit, DLD and the anytime encoder on clean and noisy
# sentences. `local/compare.sh --help` lists the options.
[ -n "${BASH_VERSION-}" ] || { echo "error: $0 needs bash: bash $0" >&2; exit 1; }
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tests="test_seen test_seen_10db test_unseen test_unseen_10db"
../../TEMPLATE/asr1/compare.sh \
    --systems "static12 static6 static2 early_exit dld anytime" \
    --run_opts "--train_set train_noisy --valid_set dev_noisy --test_sets '${tests}'" \
    "$@"
