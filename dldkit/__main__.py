"""Register dldkit's classes, then run any module as `python -m` would.

    python -m dldkit -m espnet2.bin.pack asr --outpath model.zip ...

ESPnet's own recipes work unchanged with `--python "python3 -m dldkit"`.
"""

import runpy
import sys

import dldkit

# At import, because the processes that multi-GPU training spawns import this module,
# and do not call main.
dldkit.register()


def main() -> None:
    """Run `-m MODULE ARGS...`."""
    if len(sys.argv) < 3 or sys.argv[1] != "-m":
        sys.exit("usage: python -m dldkit -m MODULE [ARGS...]")
    del sys.argv[:2]
    runpy.run_module(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
