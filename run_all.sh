#!/usr/bin/env bash
# Run recipes from start to end, and print one table over all of them.
#
#   ./run_all.sh [--recipes "digits digits_ssl"] [-- options of the recipes' run.sh]
#
# NAME is the speech recognition recipe egs2/NAME/asr1, NAME_ssl the distillation of a
# speech foundation model in egs2/NAME/ssl1. Sets up first if needed (tools/install.sh).
# May be run again: finished stages are kept. What comes after -- goes to every recipe,
# for example -- --system rd --seed 1.
[ -n "${BASH_VERSION-}" ] || { echo "error: $0 needs bash: bash $0" >&2; exit 1; }
set -euo pipefail

recipes=digits  # recipes to run, separated by spaces: NAME or NAME_ssl

own=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    own+=("$1")
    shift
done
if [ $# -gt 0 ]; then shift; fi
root=$(cd "$(dirname "$0")" && pwd -P)
# shellcheck source=egs2/TEMPLATE/asr1/options.sh
. "${root}/egs2/TEMPLATE/asr1/options.sh" "${own[@]}"

directory_of() { # directory_of RECIPE
    case $1 in
        *_ssl) echo "egs2/${1%_ssl}/ssl1" ;;
        *) echo "egs2/$1/asr1" ;;
    esac
}

for recipe in ${recipes}; do
    dir=$(directory_of "${recipe}")
    [ -x "${root}/${dir}/run.sh" ] ||
        die "--recipes ${recipe}: there is no ${dir}/run.sh"
done

"${root}/tools/install.sh"

failed=()
for recipe in ${recipes}; do
    dir=$(directory_of "${recipe}")
    log "Recipe ${recipe}: ${dir}/run.sh $*"
    # tee keeps the log; progress bars stay visible
    if ! "${root}/${dir}/run.sh" "$@" 2>&1 | tee "${root}/${dir}/run.log"; then
        failed+=("${recipe}")
        log "Recipe ${recipe} failed, log: ${dir}/run.log"
    fi
done

# The last report of each recipe; the recipe's name becomes the first column. Recipes of
# one kind share a table.
sources=()
show_tables() { # show_tables TITLE_OF_STAGE_13 FIRST_COLUMN [RECIPE]...
    local title=$1 first=$2 recipe dir report row table header=true
    shift 2
    for recipe in "$@"; do
        dir=${root}/$(directory_of "${recipe}")
        report=$(sed -n "s/.*${title}: //p" "${dir}/run.log" | tail -n 1)
        if [[ ${report} != /* ]]; then report=${dir}/${report}; fi
        if [ ! -f "${report}" ]; then continue; fi
        mapfile -t table < <(sed -n "/^| *${first}[ |]/,/^\$/{/^|/p}" "${report}")
        if "${header}"; then
            printf '\n| %-16s %s\n' recipe "${table[0]}"
            printf '| %-16s %s\n' ---------------- "${table[1]}"
            header=false
        fi
        for row in "${table[@]:2}"; do printf '| %-16s %s\n' "${recipe}" "${row}"; done
        while IFS= read -r row; do
            sources+=("${recipe}, ${row}")
        done < <(sed -n '/^- .*: speech: /s/^- //p' "${report}")
        row="report: ${report#"${root}/"}"
        if [ -f "${report%/*}/wer_vs_depth.png" ]; then
            row="report and plot: ${row#*: }, wer_vs_depth.png"
        fi
        sources+=("${recipe}, ${row}")
    done
}
asr=()
ssl=()
for recipe in ${recipes}; do
    case ${recipe} in
        *_ssl) ssl+=("${recipe}") ;;
        *) asr+=("${recipe}") ;;
    esac
done
show_tables "Scores and depth report" system "${asr[@]}"
show_tables "Probe scores" upstream "${ssl[@]}"
printf '%s\n' "" "${sources[@]}"

# What else could be shipped takes hours to train, so it comes from the committed runs.
for recipe in "${asr[@]}"; do
    comparison=$(directory_of "${recipe}")/results/README.md
    if [ ! -f "${root}/${comparison}" ]; then continue; fi
    printf '\n%s, all systems compared: %s\n' "${recipe}" "${comparison}"
    awk '
        /^### .*, equal arithmetic/ { print "\n" substr($0, 5) "\n"; wanted = 1; next }
        wanted && /^\|/ { print; inside = 1; next }
        inside { wanted = inside = 0 }
        /^Made by / { print "\n" $0 }
    ' "${root}/${comparison}"
done
[ ${#failed[@]} -eq 0 ] || die "these recipes failed: ${failed[*]}"
