#!/usr/bin/env bash
# Compare static models of several depths, random dropping, early exit and DLD.
#
#   local/compare.sh [--option value]...
#
# Every system is trained with every seed, decoded at its depths with and without
# calibrated statistics, and put into a table of means and spreads in README.md.
# Each run has a directory of its own: run the command again after an interruption.
#
# Stages:
#    1 data and statistics           3 all other systems
#    2 static models of full depth   4 table
[ -n "${BASH_VERSION-}" ] || { echo "error: $0 needs bash: bash $0" >&2; exit 1; }
set -euo pipefail

## General
stage=1  # first stage to run
stop_stage=4  # last stage to run
seeds="1000 2000 3000"  # seeds of the trainings; ESPnet adds the epoch to them
systems="static12 static6 static2 rd early_exit dld"  # systems to compare, static12 first
depths="12 10 8 6 4 2"  # depths to decode the dynamic systems at
jobs=2  # trainings at a time, each on one thread
expdir=exp/compare  # directory of all runs
run_opts=  # more options of run.sh for every run, e.g. "--asr_args '--max_epoch 20'"

recipe=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "${recipe}"
# shellcheck source=/dev/null
. ../../TEMPLATE/asr1/options.sh "$@"
# shellcheck source=/dev/null
. ./path.sh

run_recipe() { # run_recipe SYSTEM SEED [options of run.sh]...
    local system=$1 seed=$2 options=()
    shift 2
    case ${system} in
        static*)
            options+=(--system static --inference_depths "${system#static}"
                --asr_args "--encoder_conf num_blocks=${system#static}")
            ;;
        *) options+=(--system "${system}" --inference_depths "${depths}") ;;
    esac
    eval "set -- ${run_opts} $(printf '%q ' "$@")"
    ./run.sh --expdir "${expdir}" --ngpu 0 --num_threads 1 --nj 1 --inference_nj 1 \
        --seed "${seed}" --asr_tag "${system}_seed${seed}" \
        --reference_tag "static12_seed${seed}" "${options[@]}" "$@"
}

train_and_decode() { # train_and_decode SYSTEM SEED
    local log_file=${expdir}/log/$1_seed$2.log
    log "$1, seed $2: log in ${log_file}"
    {
        run_recipe "$1" "$2" --stage 10 --stop_stage 12 --inference_tag calibrated
        run_recipe "$1" "$2" --stage 12 --stop_stage 12 --inference_tag uncalibrated \
            --use_depth_profile false
    } >>"${log_file}" 2>&1 || die "$1, seed $2 failed: see ${log_file}"
    log "$1, seed $2: done"
}

run_all() { # run_all SYSTEM...: all seeds of these systems, ${jobs} runs at a time
    local system seed
    for seed in ${seeds}; do
        for system in "$@"; do echo "${system} ${seed}"; done
    done | xargs -P "${jobs}" -L 1 bash -c 'train_and_decode "$@"' _
}
export -f run_recipe train_and_decode log die
export recipe depths expdir run_opts
mkdir -p "${expdir}/log"
read -r -a all_systems <<<"${systems}"

if [ "${stage}" -le 1 ] && [ "${stop_stage}" -ge 1 ]; then
    log "Stage 1: data and statistics"
    run_recipe "${all_systems[0]}" 0 --stage 1 --stop_stage 5
    run_recipe "${all_systems[0]}" "${seeds%% *}" --stage 10 --stop_stage 10
fi
if [ "${stage}" -le 2 ] && [ "${stop_stage}" -ge 2 ]; then
    log "Stage 2: static12, the reference of dld"
    if [[ " ${systems} " == *" static12 "* ]]; then run_all static12; fi
fi
if [ "${stage}" -le 3 ] && [ "${stop_stage}" -ge 3 ]; then
    log "Stage 3: all other systems"
    mapfile -t others < <(printf "%s\n" "${all_systems[@]}" | grep -v "^static12$")
    run_all "${others[@]}"
fi
if [ "${stage}" -le 4 ] && [ "${stop_stage}" -ge 4 ]; then
    log "Stage 4: table in README.md"
    python3 local/compare.py --expdir "${expdir}" --systems "${systems}" \
        --seeds "${seeds}" --depths "${depths}" --data_root dump/raw \
        --test_sets "test_seen test_unseen" --readme README.md \
        --command "local/compare.sh $(printf '%q ' "$@")"
fi
