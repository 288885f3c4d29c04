#!/usr/bin/env bash
# Score an exported student, or another model, on tasks of SUPERB; print a row of its table.
#
#   cd egs2/<corpus>/ssl1
#   ./superb.sh --upstream exp/sfm_x/hf --upstream_name x --tasks "pr ks sid" \
#       --librispeech /corpora/LibriSpeech --voxceleb1 /corpora/VoxCeleb1 ...
#   ./superb.sh --upstream microsoft/wavlm-base-plus ...  # or s3prl's wavlm_base_plus
#   python -m dldkit.bin.sfm_superb_table exp/superb_*  # and published rows
#
# s3prl trains and tests a small downstream model for each task on the frozen model,
# with SUPERB's settings. It needs the extra "superb": DLDKIT_EXTRAS=espeak,sfm,test,superb
# tools/install.sh. Corpora are not downloaded: name yours in db.sh, in the environment
# (LIBRISPEECH=...) or here. The splits and lexicons that s3prl needs besides are, each
# with a line that says so, unless they are in --list_dir.
# Finished tasks are kept, interrupted ones go on from their last checkpoint. The row
# shows every finished task of --upstream_name; those that were not run show "–".
# SUPERB lets you choose the learning rate of each task. Of several rates, the one that is
# best on the task's dev set counts, and more of them may be added later:
#   ./superb.sh --lr pr=5e-4,sid=1e-2:1e-3 ...
# QbE is not offered: s3prl's package has no such problem.
[ -n "${BASH_VERSION-}" ] || { echo "error: $0 needs bash: bash $0" >&2; exit 1; }
set -euo pipefail

if [ -f ./db.sh ]; then
    # shellcheck source=../asr1/db.sh
    . ./db.sh
fi

## General
upstream=  # directory from sfm_export or of another Hugging Face model on waveforms, name
    # of one, or an upstream of s3prl
upstream_name=  # of the row and of its directory; empty: that of --upstream
tasks=  # tasks to run, of pr asr ks sid sf ic er asv sd; empty: those whose corpora are named
task_args=  # s3prl's options for these tasks, e.g. "--train.total_steps 1000"
lr=  # learning rates by task, e.g. "pr=5e-4,sid=1e-2:1e-3"; empty: those of s3prl
er_folds="0 1 2 3 4"  # folds of ER; its column is their mean, and SUPERB's is all five
expdir=exp  # results go into EXPDIR/superb_NAME
list_dir=downloads/superb  # splits and lexicons; missing ones are downloaded into it
ngpu=auto  # 0 (CPU) or 1; auto: 1 if there is one
nj=4  # processes that load speech
python=python3  # the Python to run everything with

## Corpora
librispeech=${LIBRISPEECH:-}  # PR, ASR: train-clean-100, dev-clean, test-clean
speech_commands=${SPEECH_COMMANDS:-}  # KS: Speech Commands v0.01
speech_commands_test=${SPEECH_COMMANDS_TEST:-}  # KS: its test set
voxceleb1=${VOXCELEB1:-}  # SID, ASV: the directory with dev/wav and test/wav
snips=${SNIPS:-}  # SF: Audio SNIPS, as s3prl's snips_prepare_data.sh converts it
fluent_speech_commands=${FLUENT_SPEECH_COMMANDS:-}  # IC
iemocap=${IEMOCAP:-}  # ER: the directory with Session1 ... Session5
libri2mix=${LIBRI2MIX:-}  # SD: the Kaldi directories train, dev, test of Libri2Mix
dscore=${DSCORE:-}  # SD: clone of https://github.com/nryant/dscore

template=$(dirname "$(readlink -f "$0")")
# shellcheck source=../asr1/options.sh
. "${template}/../asr1/options.sh" "$@"
# shellcheck source=../asr1/path.sh
. ./path.sh

[ -n "${upstream}" ] || die "--upstream is empty: name the exported student"
if [ -z "${upstream_name}" ]; then
    upstream_name=$(basename "${upstream}")
    if [ -d "${upstream}" ]; then upstream_name=$(basename "$(readlink -f "${upstream}")"); fi
fi
if [ "${ngpu}" == auto ]; then
    ngpu=0
    if nvidia-smi -L >/dev/null 2>&1; then ngpu=1; fi
fi
device=cpu
if [ "${ngpu}" -gt 0 ]; then device=cuda; fi

"${python}" -m dldkit.bin.sfm_superb \
    --upstream "${upstream}" \
    --upstream_name "${upstream_name}" \
    --output_dir "${expdir}/superb_${upstream_name}" \
    --tasks "${tasks}" \
    --task_args "${task_args}" \
    --lr "${lr}" \
    --er_folds "${er_folds}" \
    --list_dir "${list_dir}" \
    --device "${device}" \
    --nj "${nj}" \
    --librispeech "${librispeech}" \
    --speech_commands "${speech_commands}" \
    --speech_commands_test "${speech_commands_test}" \
    --voxceleb1 "${voxceleb1}" \
    --snips "${snips}" \
    --fluent_speech_commands "${fluent_speech_commands}" \
    --iemocap "${iemocap}" \
    --libri2mix "${libri2mix}" \
    --dscore "${dscore}"
