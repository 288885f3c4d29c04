#!/usr/bin/env bash
# Stage 1: make a directory in data/ for each split, and data/dev. `--help` lists the
# options.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
. ./path.sh
. ./db.sh
exec "${python:-python3}" local/data.py "$@"
