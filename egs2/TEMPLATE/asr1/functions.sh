# shellcheck shell=bash
# shellcheck disable=SC2154 # the variables are options of the script that sources this
# What the staged scripts share. They source options.sh and path.sh before it, and have
# the options stage, stop_stage, ngpu, num_nodes, launch_args, num_threads and python.

"${python}" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("espnet2"))' ||
    die "${python} ($(command -v "${python}")) has no espnet: run tools/install.sh first"
if [ "${ngpu}" == auto ]; then
    ngpu=0
    if nvidia-smi -L >/dev/null 2>&1; then ngpu=1; fi
fi

words() { # words TEXT: one to a line; quotes keep words together
    xargs -r -n 1 printf '%s\n' <<<"$1"
}

run_stage() { # run_stage N [true|false]...: whether N is to be run; true: it is skipped
    local n=$1
    shift
    if [ "${stage}" -gt "${n}" ] || [ "${stop_stage}" -lt "${n}" ]; then return 1; fi
    if [[ " $* " == *" true "* ]]; then
        log "Stage ${n}: skipped"
        return 1
    fi
}

fingerprint() { # of standard input
    sha256sum | cut -c 1-16
}

stage_needs() { # stage_needs FILE "what makes it"
    [ -e "$1" ] || die "$1 does not exist: run $2 first"
}

is_done() { # is_done DIR KEY: whether DIR was finished with this key
    [ "$(cat "$1/.done" 2>/dev/null)" == "$2" ]
}

# Names as ESPnet makes them: settings that were changed become part of the name, so
# that two experiments do not share a directory by accident.
tag_of() { # tag_of CONFIG ITS_USUAL_NAME ARGS
    local name
    name=$(basename "$1" .yaml)
    if [ "${name}" != "$2" ]; then echo -n "_${name}"; fi
    echo -n "$3" | sed -e 's/--/_/g' -e 's/[ |=/]//g'
}

require_system() { # require_system NAME DIR: as one of DIR or of the recipe
    if [ ! -f "$2/$1.yaml" ] && [ ! -f "conf/systems/$1.yaml" ]; then
        die "--system $1: there is no $1.yaml in $2 or conf/systems"
    fi
}

write_config() { # write_config EXP CONFIG SYSTEM.yaml [key=value]...
    # EXP/train.yaml: the system merged over the config. A setting counts where a file
    # leaves its key open with ???
    local exp=$1 file setting key files=("$2") settings=()
    [ -f "$2" ] || die "the training config $2 does not exist"
    # the recipe's own conf/systems may change a shared system, or add one
    for file in "$3" "conf/systems/${3##*/}"; do
        if [ -f "${file}" ]; then files+=("${file}"); fi
    done
    shift 3
    for setting in "$@"; do
        key=${setting%%=*}
        if grep -q "${key##*.}: ???" "${files[@]}"; then settings+=("${setting}"); fi
    done
    mkdir -p "${exp}"
    "${python}" -m dldkit.bin.merge_config "${files[@]}" "${settings[@]}" \
        >"${exp}/train.yaml.new"
    if [ -e "${exp}/checkpoint.pth" ] &&
        ! diff "${exp}/train.yaml" "${exp}/train.yaml.new"; then
        log "Warning: ${exp} was begun with the settings marked <, and goes on with" \
            "those marked >. To begin anew, remove it or give another tag"
    fi
    mv "${exp}/train.yaml.new" "${exp}/train.yaml"
}

hold_to_data() { # hold_to_data EXP KEY: EXP goes on with what it was begun with
    if [ -e "$1/checkpoint.pth" ] && [ "$(cat "$1/.data" 2>/dev/null)" != "$2" ]; then
        die "$1 was trained on other data, tokens or features:" \
            "remove it, or give another tag"
    fi
    echo "$2" >"$1/.data"
}

run_training() { # run_training EXP MODEL COMMAND...: until it has made EXP/MODEL
    local exp=$1 model=$2 command arg multi=false key
    shift 2
    command=("$@")
    if [ "${num_nodes}" -gt 1 ] || [ -n "${launch_args}" ]; then
        mapfile -t arg < <(words "${launch_args}")
        if [ "${num_nodes}" -gt 1 ]; then arg+=(--num_nodes "${num_nodes}"); fi
        command=("${python}" -m espnet2.bin.launch "${arg[@]}" --ngpu "${ngpu}"
            --log "${exp}/train.log" --init_file_prefix "${exp}/.dist_init_"
            -- "${command[@]}")
    else
        if [ "${ngpu}" -gt 1 ]; then multi=true; fi # the command spawns one process per GPU
        command+=(--ngpu "${ngpu}" --multiprocessing_distributed "${multi}")
    fi
    write_run_sh "${exp}" "${command[@]}"
    key=$(cat "${exp}/train.yaml" "${exp}/run.sh" "${exp}/.data" | fingerprint)
    if is_done "${exp}" "${key}" && [ -e "${exp}/${model}" ]; then
        log "${exp} is trained already"
        return
    fi
    log "Training, log: ${exp}/train.log; resume it with ${exp}/run.sh"
    "${exp}/run.sh" 2>&1 | show_progress || show_failure "${exp}/train.log"
    echo "${key}" >"${exp}/.done"
}

quote() { # quote ARG: as the shell reads it, without needless backslashes
    if [[ $1 =~ ^[A-Za-z0-9_./,:=+-]+$ ]]; then echo -n "$1"; else printf %q "$1"; fi
}

write_run_sh() { # write_run_sh EXP COMMAND...: EXP/run.sh, which runs and resumes it
    local exp=$1 arg line="" log_to
    shift
    log_to="2>&1 | tee -a $(quote "${exp}/train.log")"
    {
        echo "#!/usr/bin/env bash"
        echo "# Go on with this training where it stopped; takes more options of the task."
        echo "set -euo pipefail"
        echo "cd \"\$(dirname \"\$0\")/$(realpath --relative-to="${exp}" .)\""
        echo ". ./path.sh"
        if [ "${ngpu}" -eq 0 ]; then echo "export OMP_NUM_THREADS=${num_threads}"; fi
        if [[ "$*" == *espnet2.bin.launch* ]]; then # the launcher writes the log
            log_to=
            echo "touch $(quote "${exp}/train.log")"
            echo "tail -n 0 -F $(quote "${exp}/train.log") &"
            echo "trap 'kill \$!' EXIT"
        fi
        for arg in "$@"; do
            if [[ ${arg} == --* && -n ${line} ]]; then
                echo "${line} \\"
                line="   "
            fi
            line+="${line:+ }$(quote "${arg}")"
        done
        echo "${line} \\"
        echo "    \"\$@\" ${log_to}"
    } >"${exp}/run.sh"
    chmod +x "${exp}/run.sh"
}

show_progress() { # the readable part of a training log
    local line shown=${SECONDS}
    while IFS= read -r line; do
        case ${line} in
            *"epoch results: "*) ;;
            *"epoch started."* | *"training was resumed"* | *"has already reached"*) ;;
            *"batch: "*) # of these, one in ten seconds
                if [ $((SECONDS - shown)) -lt 10 ]; then continue; fi
                ;;
            "error: "*) ;;
            *) continue ;;
        esac
        shown=${SECONDS}
        sed -E -e 's/^\[.*(INFO|WARNING): //' \
            -e 's/\b((iter|forward|backward|optim_step|train)_time|optim[0-9]_lr[0-9]|clip|grad_norm|loss_scale|total_count|gpu_max_cached_mem_GB)=[^][,]*(, |$)//g' \
            -e 's/\b[a-z0-9_]+=nan(, |$)//g' -e 's/^/    /; s/, $//' <<<"${line}"
    done
}

show_failure() { # show_failure LOG
    tail -n 30 "$1" >&2
    die "it failed; the end of $1 is above"
}
