#!/usr/bin/env bash
# Compare systems of one depth with systems whose depth is chosen at run time.
#
#   cd egs2/<corpus>/asr1 && local/compare.sh [--option value]...
#
# static12, static6 and so on are static models of that many layers; other names are
# files of conf/systems. Every run has a directory of its own and ends as a small file
# in --results, and a run whose file is there is not done again: a comparison can be
# interrupted, and goes on elsewhere with these files alone.
#
# Stages:
#    1 data                          3 all other systems
#    2 the references of others      4 tables: README.md in --results
[ -n "${BASH_VERSION-}" ] || { echo "error: $0 needs bash: bash $0" >&2; exit 1; }
set -euo pipefail

## General
stage=1  # first stage to run
stop_stage=4  # last stage to run
seeds="1000 2000 3000"  # seeds of the trainings; ESPnet adds the epoch to them
systems="static12 static10 static8 static6 static4 static2 static1 rd dld_paper dld nested early_exit anytime_uniform anytime early_exit_half"  # systems to compare
    # the deepest static one first; it is the reference of the others, and early_exit that
    # of anytime and anytime_uniform
asr_config=conf/train_asr.yaml  # training config of all systems
epochs=8  # of the deepest static model, and of all others where --budgets says steps
budgets="steps arithmetic"  # steps: as many epochs for all; arithmetic: as many as cost the same;
    # total: the same with the reference's training counted, so twice as many for those without
depths="12 10 8 6 4 2"  # depths to decode the systems of variable depth at
jobs=2  # trainings at a time, each on one thread
dumpdir=dump  # directory for formatted data
expdir=exp/compare  # directory of all runs
results=results  # directory of one small file per run
run_opts=  # more options of run.sh for every run, e.g. "--test_sets test"

template=$(dirname "$(readlink -f "$0")")
# shellcheck source=options.sh
. "${template}/options.sh" "$@"
# shellcheck source=path.sh
. ./path.sh
read -r -a all_systems <<<"${systems}"
deepest=${all_systems[0]}
[[ ${deepest} == static* ]] ||
    die "--systems ${systems}: name the deepest static model first, such as static12"

compare() { python3 -m dldkit.bin.compare "$@"; }

file_of() { # file_of SYSTEM EPOCHS SEED: what a run ends as
    echo "${results}/$1_e$2_seed$3.json"
}

reference_of() { # reference_of SYSTEMS: a line each, the system that it is pulled to, if any
    compare reference --systems "$1" --deepest "${deepest}" \
        --configs "${asr_config}" ../../../conf/systems conf/systems
}

run_recipe() { # run_recipe SYSTEM EPOCHS SEED [options of run.sh]...
    local system=$1 run_epochs=$2 seed=$3 options=() layers reference
    shift 3
    layers=${system#static}
    case ${system} in
        static[0-9]*)
            options+=(--system static --inference_depths "${layers}")
            options+=(--asr_args "--max_epoch ${run_epochs} --encoder_conf num_blocks=${layers}")
            ;;
        *)
            options+=(--system "${system}" --inference_depths "${depths}")
            options+=(--asr_args "--max_epoch ${run_epochs}" --kd_source cached)
            reference=$(reference_of "${system}")
            if [ -n "${reference}" ]; then # trained again where only its file came along
                options+=(--reference_tag "${reference}_e${epochs}_seed${seed}")
                options+=(--reference_args "--max_epoch ${epochs} --encoder_conf num_blocks=${deepest#static}")
            fi
            ;;
    esac
    eval "set -- ${run_opts} $(printf '%q ' "$@")"
    ./run.sh --dumpdir "${dumpdir}" --expdir "${expdir}" --ngpu 0 --num_threads 1 --nj 1 --inference_nj 1 \
        --exit_thresholds none \
        --seed "${seed}" --asr_tag "${system}_e${run_epochs}_seed${seed}" \
        --asr_config "${asr_config}" --inference_tag compared "${options[@]}" "$@"
}

begin_with_shorter() { # begin_with_shorter SYSTEM EPOCHS SEED
    # The first epochs of a longer run are those of the run with equal steps, to the bit,
    # where the learning rate does not go by how long the training is.
    local shorter=${expdir}/asr_$1_e${epochs}_seed$3 longer=${expdir}/asr_$1_e$2_seed$3
    if [ "$2" -le "${epochs}" ] || [ -e "${longer}" ] || [ ! -e "${shorter}/.done" ]; then
        return 0
    fi
    local trained_by
    trained_by=$(python3 -m dldkit.bin.merge_config "${shorter}/config.yaml" --select trainer scheduler | xargs)
    case ${trained_by} in
        "resumable None" | "resumable warmuplr" | "resumable noamlr")
            log "${longer} goes on where ${shorter} ends"
            cp -r "${shorter}" "${longer}.$$" &&
                rm -rf "${longer}.$$/compared" && # what the shorter one recognised
                mv "${longer}.$$" "${longer}"
            ;;
    esac
}

one_run() { # one_run SYSTEM EPOCHS SEED
    local file name=$1_e$2_seed$3
    file=$(file_of "$@")
    log "${name}: log in ${expdir}/log/${name}.log"
    {
        begin_with_shorter "$@" &&
            run_recipe "$@" --stage 6 --stop_stage 12 --skip_stages 8 &&
            compare record --exp "${expdir}/asr_${name}" --inference_tag compared \
                --name "$1" --seed "$3" --data_root "${dumpdir}/raw" --output "${file}"
    } >>"${expdir}/log/${name}.log" 2>&1 ||
        die "${name} failed: see ${expdir}/log/${name}.log"
    log "${name}: done, ${file}"
}

run_all() { # run_all SYSTEM...: what is missing of them, ${jobs} runs at a time
    local seed system run_epochs planned
    planned=$(compare epochs --results "${results}" --epochs "${epochs}" --budgets "${budgets}" \
        --deepest "${deepest}" --systems "$*" \
        --configs "${asr_config}" ../../../conf/systems conf/systems)
    for seed in ${seeds}; do
        while read -r system run_epochs; do
            if [ -n "${system}" ] && [ ! -e "$(file_of "${system}" "${run_epochs}" "${seed}")" ]; then
                echo "${system} ${run_epochs} ${seed}"
            fi
        done <<<"${planned}"
    done | awk '!seen[$0]++' |
        xargs -r -P "${jobs}" -L 1 bash -c 'set -euo pipefail; one_run "$@"' "$0"
}
export -f run_recipe reference_of begin_with_shorter one_run file_of compare log die
export asr_config depths deepest dumpdir epochs expdir results run_opts
# what there is not is refused before any training
all_references=$(reference_of "${systems}")
refuse_run_opts "${run_opts}" \
    "use its own options, or write what holds for all systems into --asr_config" \
    --asr_args --asr_config --asr_tag --expdir --dumpdir --feats_type --inference_depths \
    --seed --system
mkdir -p "${expdir}/log" "${results}"

if [ "${stage}" -le 1 ] && [ "${stop_stage}" -ge 1 ]; then
    log "Stage 1: data"
    run_recipe "${deepest}" "${epochs}" "${seeds%% *}" --stage 1 --stop_stage 5
fi
if [ "${stage}" -le 2 ] && [ "${stop_stage}" -ge 2 ]; then
    mapfile -t references < <(
        printf '%s\n' "${deepest}" "${all_references}" | awk 'NF && !seen[$0]++'
    )
    log "Stage 2: the references of others: ${references[*]}"
    run_all "${deepest}" # whose cost says how many epochs others have
    run_all "${references[@]:1}"
fi
if [ "${stage}" -le 3 ] && [ "${stop_stage}" -ge 3 ]; then
    log "Stage 3: all other systems"
    run_all "${all_systems[@]:1}"
fi
if [ "${stage}" -le 4 ] && [ "${stop_stage}" -ge 4 ]; then
    log "Stage 4: tables: ${results}/README.md"
    compare table --results "${results}" --systems "${systems}" --epochs "${epochs}" \
        --configs "${asr_config}" ../../../conf/systems conf/systems \
        --budgets "${budgets}" --output "${results}/README.md" \
        --command "local/compare.sh $(printf '%q ' "$@")"
fi
