#!/usr/bin/env bash
# LibriSpeech 960 h in the setting of arXiv 2606.11766. `./run.sh --help` lists the options;
# --system chooses the row of the paper's table. Set $LIBRISPEECH to a copy of the corpus,
# else it is downloaded (about 60 GB), and $TEACHER to a local copy of the teacher.
[ -n "${BASH_VERSION-}" ] || { echo "error: $0 needs bash: bash $0" >&2; exit 1; }
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=/dev/null
. ./db.sh
export LIBRISPEECH=${LIBRISPEECH:-downloads} # so that stage 13 finds what stage 1 downloads

../../TEMPLATE/ssl1/sfm.sh \
    --train_set train_960 \
    --valid_set dev \
    --max_wav_duration 40 \
    --teacher "${TEACHER:-facebook/hubert-base-ls960}" \
    --probe superb \
    "$@"
