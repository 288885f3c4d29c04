# shellcheck shell=bash
# Sourced by every script of a recipe: finds dldkit and the Python it is installed in.
_root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../.." && pwd -P)
_venv=${DLDKIT_VENV:-${_root}/.venv}
if [ -x "${_venv}/bin/python3" ]; then
    export PATH="${_venv}/bin:${PATH}"
fi
export PYTHONPATH="${_root}${PYTHONPATH:+:${PYTHONPATH}}"
# One thread per process, because stages run several; training sets its own number.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Data directories are sorted in the C locale.
export LC_ALL=C PYTHONIOENCODING=UTF-8
