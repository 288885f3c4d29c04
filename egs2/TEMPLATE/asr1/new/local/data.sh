#!/usr/bin/env bash
# Stage 1: make data/{train,dev,test} of @NAME@. `--help` lists the options.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=/dev/null
. ./path.sh
# shellcheck source=/dev/null
. ./db.sh
exec "${python:-python3}" local/data.py "$@"
