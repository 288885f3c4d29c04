# shellcheck shell=bash
# Options, --help and log for the scripts of all recipes.
#
# A script writes one line per option, `name=default  # help`, groups them under
# `## headings`, and sources this file below them with its arguments:
#
#   stage=1  # first stage to run
#   . options.sh "$@"
#
# `--stage 3` (or --stage=3) then sets ${stage}. The option lines are read from the
# script itself, so --help and the check for unknown options can not go stale.

log() {
    echo "$(date '+%Y-%m-%dT%H:%M:%S') ($(basename "$0")) $*"
}

die() {
    echo "error: $*" >&2
    exit 1
}

refuse_run_opts() { # refuse_run_opts RUN_OPTS ADVICE NAME...: what a comparison chooses
    local run_opts=$1 advice=$2 words=() word
    shift 2
    eval "words=(${run_opts})"
    for word in "${words[@]}"; do
        if [[ " $* " == *" ${word%%=*} "* ]]; then
            die "--run_opts ${run_opts}: ${word%%=*} is what a comparison chooses; ${advice}"
        fi
    done
}

_option_line='^([a-z_][a-z0-9_]*)=.*  # (.*)$'

_print_help() {
    local line previous=""
    sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"
    echo
    echo "Options, with their values if you do not set them:"
    while IFS= read -r line && [[ ${line} != *options.sh* ]]; do
        if [[ ${line} == "## "* ]]; then
            printf '\n%s\n' "${line#\#\# }"
        elif [[ ${line} =~ ${_option_line} ]]; then
            previous=${BASH_REMATCH[1]}
            printf '  --%-44s %s\n' "${previous} \"${!previous}\"" "${BASH_REMATCH[2]}"
        elif [ -n "${previous}" ] && [[ ${line} == "    # "* ]]; then
            printf '  %46s %s\n' "" "${line#    \# }" # the help goes on
        fi
    done <"$0"
}

option_names() { # of the script, one to a line
    sed -En "/options\.sh/q; s/${_option_line}/\1/p" "$0"
}

_usage_error() {
    echo "error: $(basename "$0"): $* (see --help)" >&2
    exit 2
}

_parse_options() {
    local known name value
    known=" $(option_names | tr '\n' ' ')"
    while [ $# -gt 0 ]; do
        case $1 in
            -h | --help)
                _print_help
                exit 0
                ;;
            --*) name=${1%%=*} ;;
            *) _usage_error "unexpected argument '$1'" ;;
        esac
        name=${name#--}
        name=${name//-/_}
        [[ ${known} == *" ${name} "* ]] || _usage_error "unknown option --${name}"
        if [[ $1 == *=* ]]; then
            value=${1#*=}
        else
            [ $# -ge 2 ] || _usage_error "$1 needs a value"
            value=$2
            shift
        fi
        shift
        if [[ ${!name} =~ ^(true|false)$ ]] && ! [[ ${value} =~ ^(true|false)$ ]]; then
            _usage_error "--${name} is true or false, not '${value}'"
        fi
        if [[ ${!name} =~ ^[0-9]+$ ]] && ! [[ ${value} =~ ^-?[0-9.]+[kM]?$ ]]; then
            _usage_error "--${name} is a number, not '${value}'"
        fi
        printf -v "${name}" '%s' "${value}"
    done
}

_parse_options "$@"
