#!/usr/bin/env bash
# Compare static models, early exit, DLD and the anytime encoder on sentences.
# `local/compare.sh --help` lists the options.
[ -n "${BASH_VERSION-}" ] || { echo "error: $0 needs bash: bash $0" >&2; exit 1; }
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

../../TEMPLATE/asr1/compare.sh --epochs 16 \
    --systems "static12 static6 static2 dld early_exit anytime_uniform anytime early_exit_half" "$@"
