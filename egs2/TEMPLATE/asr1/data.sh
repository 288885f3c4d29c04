#!/usr/bin/env bash
# Stage 1: make the data directories. `--help` lists the options.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." # from local/, where recipes have a link to this
# shellcheck source=/dev/null
. ./path.sh
# shellcheck source=/dev/null
. ./db.sh
exec "${python:-python3}" local/data.py "$@"
