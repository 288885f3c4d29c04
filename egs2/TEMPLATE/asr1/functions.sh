# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # the variables are options of the script that sources this
# What asr.sh and sfm.sh share. They source options.sh and path.sh before it. For the
# stages at the end they set what is named there.

export python  # local/data.sh runs it, too
"${python}" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("espnet2"))' ||
    die "${python} ($(command -v "${python}")) has no espnet: run tools/install.sh first"

check_options() { # check_options asr|sfm SYSTEMS: before the first stage; in plain form
    local name given=() plain
    for name in $(option_names); do given+=("${name}=${!name}"); done
    plain=$("${python}" -m dldkit.bin.check_options "$1" "$2" -- "${given[@]}") || exit 1
    eval "${plain}"
    if [ "${ngpu}" == auto ]; then
        ngpu=0
        if nvidia-smi -L >/dev/null 2>&1; then ngpu=1; fi
    fi
    parallel_options=()
    if [ -n "${parallel_config}" ]; then
        parallel_options=(--parallel_config "${parallel_config}")
    fi
}

words() { # words TEXT: one to a line; quotes keep words together
    xargs -r -n 1 printf '%s\n' <<<"$1"
}

run_stage() { # run_stage N [WHY]...: whether to run it; WHY not: true, or in words
    local n=$1 why
    shift
    if [ "${stage}" -gt "${n}" ] || [ "${stop_stage}" -lt "${n}" ]; then return 1; fi
    if [[ " ${skip_stages} " == *" ${n} "* ]]; then set -- true; fi
    for why in "$@"; do
        case ${why} in
            "" | false) continue ;;
            true) log "Stage ${n}: skipped" ;;
            *) log "Stage ${n}: skipped: ${why}" ;;
        esac
        return 1
    done
}

stage_needs() { # stage_needs FILE "what makes it"
    [ -e "$1" ] || die "$1 does not exist: run $2 first"
}

# Names as ESPnet makes them: settings that were changed become part of the name, so
# that two experiments do not share a directory by accident.
name_of() { # name_of CONFIG ITS_USUAL_NAME
    local name
    name=$(basename "$1" .yaml)
    if [ "${name}" != "$2" ]; then echo -n "_${name}"; fi
}

name_of_args() { # ESPnet can not be told a path with a comma or a colon
    echo -n "$1" | sed -e 's/--/_/g' -e "s/[][{}'\" |=/]//g" -e 's/,/_/g' -e 's/:/-/g'
}

write_config() { # write_config EXP CONFIG SYSTEM [key=value]...
    # EXP/train.yaml: the system merged over the config, and the settings over both. The
    # recipe's own conf/systems may change a shared system, or add one.
    local exp=$1 config=$2 system=$3 file files=()
    shift 3
    for file in "${systems}/${system}.yaml" "conf/systems/${system}.yaml"; do
        if [ -f "${file}" ]; then files+=("${file}"); fi
    done
    mkdir -p "${exp}"
    "${python}" -m dldkit.bin.merge_config "${config}" "${files[@]}" "$@" \
        >"${exp}/train.yaml.$$"
    mv "${exp}/train.yaml.$$" "${exp}/train.yaml"
}

run_training() { # run_training EXP COMMAND...
    local exp=$1 command launch=() multi=false
    shift
    command=("$@")
    if [[ "${launch_args} " == "srun "* ]]; then # each of its tasks is a rank
        mapfile -t launch < <(words "${launch_args}")
        command=("${launch[@]}" --kill-on-bad-exit=1 "${command[@]}" --ngpu "${ngpu}"
            --dist_launcher slurm)
        if [ "${ngpu}" -eq 0 ]; then command+=(--dist_backend gloo); fi
    elif [ "${num_nodes}" -gt 1 ] || [ -n "${launch_args}" ]; then
        mapfile -t launch < <(words "${launch_args}")
        if [ "${num_nodes}" -gt 1 ]; then launch+=(--num_nodes "${num_nodes}"); fi
        command=("${python}" -m espnet2.bin.launch "${launch[@]}" --ngpu "${ngpu}"
            --log "${exp}/launch.log" --init_file_prefix "${exp}/.dist_init_"
            -- "${command[@]}")
    else
        if [ "${ngpu}" -gt 1 ]; then multi=true; fi # the command spawns one process per GPU
        command+=(--ngpu "${ngpu}" --multiprocessing_distributed "${multi}")
    fi
    write_run_sh "${exp}" "${command[@]}"
    log "Training, log: ${exp}/train.log; resume it with ${exp}/run.sh"
    "${exp}/run.sh" 2>&1 | show_progress || show_failure "${exp}/train.log"
}

quote() { # quote ARG: as the shell reads it, without needless backslashes
    if [[ $1 =~ ^[A-Za-z0-9_./,:=+-]+$ ]]; then echo -n "$1"; else echo -n "${1@Q}"; fi
}

write_run_sh() { # write_run_sh EXP COMMAND...: EXP/run.sh, which runs and resumes it
    local exp=$1 arg line="" recipe
    shift
    recipe=$(quote "${PWD}")
    if [[ ${exp} != /* ]]; then # so that they can be moved together
        recipe="\"\$(dirname \"\$0\")\"/$(quote "$(realpath --relative-to="${exp}" .)")"
    fi
    {
        echo "#!/usr/bin/env bash"
        echo "# Go on with this training where it stopped; takes more options of the task."
        echo "set -euo pipefail"
        echo "cd ${recipe}"
        echo ". ./path.sh"
        if [ "${ngpu}" -eq 0 ]; then echo "export OMP_NUM_THREADS=${num_threads}"; fi
        echo "("
        if [[ "$*" == *espnet2.bin.launch* ]]; then # which writes a log of its own
            echo "    rm -f $(quote "${exp}/launch.log")"
            echo "    launcher=\${BASHPID}"
            echo "    tail -n +1 -s 0.2 -F --pid=\"\${launcher}\"" \
                "$(quote "${exp}/launch.log") 2>/dev/null &"
        fi
        line="    exec"
        for arg in "$@"; do
            if [[ ${arg} == --* ]]; then
                echo "${line} \\"
                line="       "
            fi
            line+=" $(quote "${arg}")"
        done
        echo "${line} \\"
        echo "        \"\$@\""
        echo ") 2>&1 | tee -a $(quote "${exp}/train.log")"
    } >"${exp}/run.sh.$$"
    chmod +x "${exp}/run.sh.$$"
    mv "${exp}/run.sh.$$" "${exp}/run.sh" # a shell that runs the old one reads on in it
}

show_progress() { # the readable part of a training log
    local line shown=${SECONDS}
    while IFS= read -r line; do
        case ${line} in
            *"epoch results: "*) ;;
            *"epoch started."* | *"training was resumed"* | *"has already reached"*) ;;
            *"(step:"*) ;; # done already, in use by another, begun with other options
            *"batch: "*) # of these, one in ten seconds
                if [ $((SECONDS - shown)) -lt 10 ]; then continue; fi
                ;;
            *) continue ;;
        esac
        shown=${SECONDS}
        sed -E -e 's/^\[.*(INFO|WARNING|ERROR): //' \
            -e 's/\b((iter|forward|backward|optim_step|train)_time|optim[0-9]_lr[0-9]|clip|grad_norm|loss_scale|total_count|gpu_max_cached_mem_GB)=[^][,]*(, |$)//g' \
            -e 's/\b[a-z0-9_]+=nan(, |$)//g' -e 's/^/    /; s/, $//' <<<"${line}"
    done
}

show_failure() { # show_failure LOG: the error that ends it, or else its last lines
    local error
    # srun reports each task that it ends, after what the first of them said
    error=$(tail -n 30 "$1" | grep -E '(^|: )error: ' |
        grep -Ev '^(srun|slurmstepd[^:]*): error: .*(tasks?|STEP|JOB) ' | tail -n 1) || true
    if [ -n "${error}" ]; then die "${error#*error: } (log: $1)"; fi
    tail -n 30 "$1" >&2
    die "it failed; the end of $1 is above"
}

#
# Stages 3, 4, 14 and 15
#
# They need ${data_feats}, ${train_set}, ${valid_set}, ${other_sets} and these arrays:
# ${format_options} of format_data, ${filter_options} of filter_data, and ${text_option},
# which says that training and validation set need no transcripts.
stage_format() {
    local set options place
    log "Stage 3: Format: data/ -> ${data_feats}"
    for set in "${train_set}" "${valid_set}" ${other_sets}; do
        options=("${format_options[@]}" --fs "${fs}" --audio_format "${audio_format}"
            --nj "${nj}" "${parallel_options[@]}")
        if [[ ${set} == "${train_set}" || ${set} == "${valid_set}" ]]; then
            options+=("${text_option[@]}")
            place=${data_feats}/org/${set} # stage 4 brings these two to theirs
        else
            place=$(test_set_dir "${set}")
        fi
        "${python}" -m dldkit.bin.format_data "${options[@]}" "data/${set}" "${place}"
    done
}

test_set_dir() { # test_set_dir SET: without the length filter of stage 4
    if [ -d "${data_feats}/org/$1" ]; then # it is the validation set, too
        echo "${data_feats}/org/$1"
    else
        echo "${data_feats}/$1"
    fi
}

stage_filter() {
    local set
    log "Stage 4: Length filter: ${data_feats}/org -> ${data_feats}"
    for set in "${train_set}" "${valid_set}"; do
        stage_needs "${data_feats}/org/${set}" "stage 3"
        "${python}" -m dldkit.bin.filter_data "${text_option[@]}" --fs "${fs}" \
            "${filter_options[@]}" "${data_feats}/org/${set}" "${data_feats}/${set}"
    done
}

pack() { # pack asr|ssl EXP CHECKPOINT [options of dldkit.bin.pack]...: to ${packed}
    local kind=$1 model=$2/$3
    shift 3
    stage_needs "${model}" "stage 11"
    "${python}" -m dldkit.bin.pack "${kind}" --model_file "${model}" \
        --outpath "${packed}" "$@"
}

upload() { # upload EXP: its ${card_dir}, with ${title}, ${card_tags}, ${snippet}, ${card_args}
    local exp=$1 file
    {
        cat <<CARD
---
license: ${license}
language: ${lang}
datasets:
$(words "${datasets:-$(basename "$(dirname "${PWD}")")}" | sed 's/^/- /')
library_name: ${card_library}
pipeline_tag: ${card_task}
tags:
$(words "${card_tags}" | sed 's/^/- /')
---

# ${title}

Trained with dldkit (system \`${system}\`) on \`${trained_on:-${train_set}}\`.

${snippet}

CARD
        if [ -f "${exp}/RESULTS.md" ]; then cat "${exp}/RESULTS.md"; fi
        printf '%s\n' "## Training config" "" '```yaml'
        cat "${exp}/train.yaml"
        echo '```'
        if [ -n "${card_args// /}" ]; then
            printf '%s\n' "" "Options of the training on top of it: \`${card_args}\`"
        fi
    } >"${card_dir}/README.md"
    if [ -n "${hf_repo}" ]; then
        log "Pushing to https://huggingface.co/${hf_repo}"
        hf upload "${hf_repo}" "${card_dir}" .
    else
        log "Not pushed: give --hf_repo user/name, and log in with 'hf auth login'"
    fi
}
