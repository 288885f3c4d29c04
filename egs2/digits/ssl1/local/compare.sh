#!/usr/bin/env bash
# Compare a student of full depth with students that grow, and one student at each depth
# with students of these depths, all trained for the same number of steps.
#
#   local/compare.sh [--option value]...
#
# Every system is trained with its seeds, at the learning rate that short trainings of its
# own say, exported at full depth and at its exits, probed, and put into a table of
# README.md beside the teacher and an untrained student. Each run has a directory of its
# own, and once it was probed a file in results/, which stands for it: run the command again
# after an interruption, here or on another machine.
#
# Stages:
#    1 data and cached targets    3 trainings                        5 table
#    2 learning rates             4 probe scores, files of results
[ -n "${BASH_VERSION-}" ] || { echo "error: $0 needs bash: bash $0" >&2; exit 1; }
set -euo pipefail

## General
stage=1  # first stage to run
stop_stage=5  # last stage to run
systems="full interleave_eql interleave_prop1 stackbert stackbert_last gradstack gradstack_last midas midas_last every_depth static9 static6 static3"  # to compare, full first
seeds="1"  # seeds of every training
more_seeds="1000 2000"  # further seeds of --more_seeds_for; ESPnet adds the epoch to them
more_seeds_for="full interleave_eql gradstack every_depth static9 static6 static3"  # systems that are trained with these as well
learning_rates="0.002 0.004 0.008"  # that stage 2 tries for each system; empty: that of the config
grid_epochs=10  # epochs of stage 2's trainings; their lowest validation loss decides
probe_seeds="0 1 2"  # seeds of the probe's heads
nj=2  # trainings at a time; two systems side by side see the same machine
num_threads=1  # threads of each training
expdir=exp/compare  # directory of all runs
results=results  # directory of the files of what they gave, and of step_time.json; another one
    # for another TEACHER, --sfm_args or --run_opts
sfm_args=  # more options of every training, e.g. "--max_epoch 20"
run_opts=  # more options of run.sh for every run, e.g. "--local_data_opts '--unlabelled none'"

recipe=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "${recipe}"
# shellcheck source=/dev/null
. ../../TEMPLATE/asr1/options.sh "$@"
# shellcheck source=/dev/null
. ./path.sh
# shellcheck source=/dev/null
. ./db.sh

run_recipe() { # run_recipe RUN [options of run.sh]...
    local run=$1 system=${1%_seed*}
    shift
    eval "set -- ${run_opts} $(printf '%q ' "$@")"
    ./run.sh --expdir "${expdir}" --ngpu 0 --num_threads "${num_threads}" \
        --system "${system%_lr*}" --seed "${run##*_seed}" --sfm_tag "${run}" "$@"
}

start() { # start RUN [options of run.sh]...: in the background, once a place is free
    local run=$1
    while [ "$(jobs -pr | wc -l)" -ge "${nj}" ]; do wait -n || true; done
    log "${run}"
    run_recipe "$@" >>"${expdir}/log/${run}.log" 2>&1 &
    pids+=($!)
}

wait_for_all() {
    local pid failed=false
    for pid in "${pids[@]}"; do wait "${pid}" || failed=true; done
    pids=()
    if "${failed}"; then die "a training failed: see the logs in ${expdir}/log"; fi
}

unrecorded() { # unrecorded NAME...: those that have no file of results
    local name
    for name; do
        if [ ! -f "${results}/${name}.json" ]; then echo "${name}"; fi
    done
}

compare() { # compare WHAT [option]...
    local what=$1
    shift
    python3 local/compare.py "${what}" --results "${results}" "$@"
}

runs=() # SYSTEM_seedSEED
for seed in ${seeds}; do
    for system in ${systems}; do runs+=("${system}_seed${seed}"); done
done
for seed in ${more_seeds}; do
    for system in ${more_seeds_for}; do
        if [[ " ${systems} " == *" ${system} "* ]]; then
            runs+=("${system}_seed${seed}")
        fi
    done
done
mapfile -t missing < <(unrecorded "${runs[@]}")
mkdir -p "${expdir}/log"
pids=() # of what `start` began
refuse_run_opts "${run_opts}" "use its own options, and TEACHER" \
    --dumpdir --expdir --seed --sfm_args --sfm_tag --system --teacher
# a file of results says nothing of them
compare settings --teacher "$(basename "${TEACHER}")" --sfm_args "${sfm_args}" \
    --run_opts "${run_opts}"

if [ "${stage}" -le 1 ] && [ "${stop_stage}" -ge 1 ]; then
    log "Stage 1: data and cached targets"
    run_recipe "${runs[0]}" --stage 1 --stop_stage 10 --sfm_args "${sfm_args}"
fi
if [ "${stage}" -le 2 ] && [ "${stop_stage}" -ge 2 ] && [ -n "${learning_rates}" ]; then
    log "Stage 2: learning rates, trainings of ${grid_epochs} epochs"
    for system in ${systems}; do
        if compgen -G "${results}/${system}_seed*.json" >/dev/null; then continue; fi
        for rate in ${learning_rates}; do
            start "${system}_lr${rate}_seed${seeds%% *}" --stage 11 --stop_stage 11 \
                --sfm_args "${sfm_args} --max_epoch ${grid_epochs} --optim_conf lr=${rate}"
        done
    done
    wait_for_all
fi
if [ "${stage}" -le 3 ] && [ "${stop_stage}" -ge 3 ]; then
    log "Stage 3: ${#missing[@]} trainings, ${nj} at a time, logs in ${expdir}/log"
    for run in "${missing[@]}"; do
        rate_args=
        if [ -n "${learning_rates}" ]; then
            rate=$(compare rate --expdir "${expdir}" --system "${run%_seed*}")
            rate_args="--optim_conf lr=${rate}"
        fi
        start "${run}" --stage 11 --stop_stage 12 --sfm_args "${sfm_args} ${rate_args}"
    done
    wait_for_all
fi
if [ "${stage}" -le 4 ] && [ "${stop_stage}" -ge 4 ]; then
    mapfile -t missing < <(unrecorded teacher untrained "${runs[@]}")
    if [ ${#missing[@]} -gt 0 ]; then
        log "Stage 4: probe scores of ${missing[*]}"
        [ -n "${TEACHER}" ] || die "set TEACHER, see db.sh"
        upstreams=()
        for run in "${missing[@]}"; do
            case ${run} in
                teacher) upstreams+=("teacher=${TEACHER}") ;;
                untrained)
                    trained=("${expdir}"/sfm_full_seed*/config.yaml)
                    [ -f "${trained[0]}" ] || die "${results}/untrained.json is missing," \
                        "and ${expdir} has no training of full, whose sizes it has"
                    python3 local/untrained.py "${trained[0]}" "${expdir}/untrained"
                    upstreams+=("untrained=${expdir}/untrained")
                    ;;
                *)
                    for hf in "${expdir}/sfm_${run}"/hf{,_depth*[0-9]}; do
                        if [ -d "${hf}" ]; then upstreams+=("${run}${hf##*/hf}=${hf}"); fi
                    done
                    ;;
            esac
        done
        python3 -m dldkit.bin.sfm_probe --upstream "${upstreams[@]}" \
            --digits dump/raw/digits_train dump/raw/digits_test \
            --strings dump/raw/strings_train dump/raw/strings_test \
            --seeds "${probe_seeds}" --output_dir "${expdir}/probe"
        compare record --expdir "${expdir}" --runs "${missing[@]}"
    fi
fi
if [ "${stage}" -le 5 ] && [ "${stop_stage}" -ge 5 ]; then
    log "Stage 5: table in README.md"
    compare table --runs "${runs[@]}" --readme README.md \
        --command "local/compare.sh${*:+ $(printf '%q ' "$@")}"
fi
