#!/usr/bin/env bash
# Run recipes from start to end, and print one table over all of them.
#
#   ./run_all.sh [--recipes "digits mini_an4"] [-- options of the recipes' run.sh]
#
# Sets up first if needed (tools/install.sh). May be run again: finished stages are
# kept. What comes after -- goes to every recipe, for example -- --system rd --seed 1.
set -euo pipefail

recipes=digits  # recipes to run, separated by spaces: directories of egs2/

own=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    own+=("$1")
    shift
done
if [ $# -gt 0 ]; then shift; fi
root=$(cd "$(dirname "$0")" && pwd -P)
# shellcheck source=egs2/TEMPLATE/asr1/options.sh
. "${root}/egs2/TEMPLATE/asr1/options.sh" "${own[@]}"

for recipe in ${recipes}; do
    [ -x "${root}/egs2/${recipe}/asr1/run.sh" ] ||
        die "--recipes ${recipe}: there is no egs2/${recipe}/asr1/run.sh"
done

"${root}/tools/install.sh"

failed=()
for recipe in ${recipes}; do
    log "Recipe ${recipe}: egs2/${recipe}/asr1/run.sh $*"
    # tee keeps the log; progress bars stay visible
    if ! "${root}/egs2/${recipe}/asr1/run.sh" "$@" 2>&1 |
        tee "${root}/egs2/${recipe}/asr1/run.log"; then
        failed+=("${recipe}")
        log "Recipe ${recipe} failed, log: egs2/${recipe}/asr1/run.log"
    fi
done

# The last report of each recipe; the recipe's name becomes the first column.
echo
header=true
sources=()
for recipe in ${recipes}; do
    report=$(sed -n 's/.*Scores and depth report: //p' \
        "${root}/egs2/${recipe}/asr1/run.log" | tail -n 1)
    if [[ ${report} != /* ]]; then report=${root}/egs2/${recipe}/asr1/${report}; fi
    if [ ! -f "${report}" ]; then continue; fi
    mapfile -t table < <(sed -n '/^| *system /,/^$/{/^|/p}' "${report}")
    if "${header}"; then
        printf '| %-16s %s\n' recipe "${table[0]}"
        printf '| %-16s %s\n' ---------------- "${table[1]}"
        header=false
    fi
    for row in "${table[@]:2}"; do printf '| %-16s %s\n' "${recipe}" "${row}"; done
    while IFS= read -r line; do
        sources+=("${recipe}, ${line}")
    done < <(sed -n '/^- .*: speech: /s/^- //p' "${report}")
    sources+=("${recipe}, report and plot: ${report#"${root}/"}, wer_vs_depth.png")
done
printf '%s\n' "" "${sources[@]}"
[ ${#failed[@]} -eq 0 ] || die "these recipes failed: ${failed[*]}"
