#!/usr/bin/env bash
# A small student of a speech foundation model, on two CPU cores. Needs $TEACHER and
# $UNLABELLED, see db.sh. `./run.sh --help` lists the options; any of them can be given
# here, for example --system interleave_eql.
[ -n "${BASH_VERSION-}" ] || { echo "error: $0 needs bash: bash $0" >&2; exit 1; }
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

../../TEMPLATE/ssl1/sfm.sh \
    --train_set train \
    --valid_set valid \
    --targets cached \
    --probe probe \
    "$@"
