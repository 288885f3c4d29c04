#!/usr/bin/env bash
# Run the unit and integration tests; sets up first if needed.
#
#   test/run.sh [pytest options]     e.g. test/run.sh -k sampler    test/run.sh -m slow
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
"${root}/tools/install.sh"
export PATH="${DLDKIT_VENV:-${root}/.venv}/bin:${PATH}"
# Models in the tests are tiny: more threads would only slow them down.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# No test needs the Hub, and where there is no network, each question takes half a minute.
export HF_HUB_OFFLINE=1
cd "${root}"
# two processes, each file in one of them: its fixtures take longer than its tests
exec python -m pytest -n 2 --dist loadfile -m "not slow" "$@"
