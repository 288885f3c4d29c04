#!/usr/bin/env bash
# Set up dldkit: find a Python, make or reuse a virtual environment, install, check.
#
#   tools/install.sh [--help]
#
# The environment is .venv at the top of the repository, or $DLDKIT_VENV.
# Needs no root, no compiler and no Kaldi. A second run takes seconds.
#   DLDKIT_VENV    the virtual environment to make or reuse
#   DLDKIT_PYTHON  the Python 3.12 or 3.13 to make it with (default: searched in PATH,
#                  pyenv and uv)
#   DLDKIT_EXTRAS  extras to install (default: espeak,sfm,test; `superb` adds what
#                  SUPERB's tasks need)
#   pip's own variables work too: to do without CUDA, for example,
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu tools/install.sh
[ -n "${BASH_VERSION-}" ] || { echo "error: $0 needs bash: bash $0" >&2; exit 1; }
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=${DLDKIT_VENV:-${root}/.venv}
extras=${DLDKIT_EXTRAS:-espeak,sfm,test}

case ${1-} in
    "") ;;
    -h | --help)
        sed -n '2,/^set /{s/^# \{0,1\}//p}' "$0"
        exit 0
        ;;
    *)
        echo "error: $1: unknown argument (see $0 --help)" >&2
        exit 2
        ;;
esac

# A pyenv shim may be in PATH and yet not run, so each candidate is tried.
usable() {
    "$1" -c 'import sys; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 13))' \
        >/dev/null 2>&1
}

find_python() {
    local candidate
    if [ -n "${DLDKIT_PYTHON-}" ]; then
        usable "${DLDKIT_PYTHON}" && echo "${DLDKIT_PYTHON}"
        return
    fi
    for candidate in python3.12 python3.13 python3 python; do
        usable "${candidate}" && command -v "${candidate}" && return
    done
    if command -v pyenv >/dev/null; then
        for candidate in "$(pyenv root)"/versions/3.1[23]*/bin/python; do
            usable "${candidate}" && echo "${candidate}" && return
        done
    fi
    if command -v uv >/dev/null; then
        uv python find '>=3.12,<3.14' 2>/dev/null && return
        uv python install 3.12 >&2 && uv python find 3.12
    fi
}

if ! usable "${venv}/bin/python"; then
    if [ -e "${venv}" ] && [ ! -e "${venv}/pyvenv.cfg" ]; then
        echo "error: ${venv} exists and is not a virtual environment:" \
            "move it away or set DLDKIT_VENV" >&2
        exit 1
    fi
    # what this script did not make may be somebody's
    if [ -e "${venv}" ] && [ "${venv}" != "${root}/.venv" ] &&
        [ ! -e "${venv}/.dldkit_installed" ]; then
        echo "error: the Python of ${venv} is not 3.12 or 3.13: set DLDKIT_VENV to" \
            "another directory, or remove that one" >&2
        exit 1
    fi
    python=$(find_python || true)
    if [ -z "${python}" ]; then
        echo "error: no Python 3.12 or 3.13 in PATH, pyenv or uv. Install one (for" \
            "example with 'pyenv install 3.12' or 'uv python install 3.12')," \
            "or set DLDKIT_PYTHON to one" >&2
        exit 1
    fi
    echo "Making ${venv} with ${python} ($("${python}" --version))"
    if ! "${python}" -m venv --clear "${venv}"; then
        echo "error: ${python} can not make a virtual environment in ${venv}: install" \
            "its venv module (Debian: python3-venv) or set DLDKIT_PYTHON" >&2
        exit 1
    fi
fi

# The stamp holds everything the installation depends on.
stamp=${venv}/.dldkit_installed
wanted=$({
    echo "${root} ${extras}"
    "${venv}/bin/python" --version
    cat "${root}/setup.py" "${root}/constraints.txt"
} | sha256sum)
if [ "$(cat "${stamp}" 2>/dev/null)" == "${wanted}" ]; then
    echo "Already installed in ${venv}"
else
    echo "Installing into ${venv} (a few minutes and about 6 GB the first time)"
    rm -f "${stamp}"
    "${venv}/bin/python" -m pip install --disable-pip-version-check \
        -c "${root}/constraints.txt" -e "${root}[${extras}]"
    echo "${wanted}" >"${stamp}"
fi

"${venv}/bin/python" - <<'EOF'
import sys
from importlib.metadata import version

import torch

print("Python", sys.version.split()[0])
for package in "dldkit espnet torch torchaudio lhotse numpy".split():
    print(package, version(package))
if torch.cuda.is_available():
    for i in range(torch.cuda.device_count()):
        print(f"GPU {i}: {torch.cuda.get_device_name(i)}")
else:
    print("GPU: none, so training runs on the CPU")
EOF
