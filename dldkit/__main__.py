"""Register dldkit's classes, then run any module as `python -m` would.

    python -m dldkit -m espnet2.bin.pack asr --outpath model.zip ...

ESPnet's own recipes work unchanged with `--python "python3 -m dldkit"`.
"""

import runpy
import sys

import dldkit


def main() -> None:
    """Run `-m MODULE ARGS...` after registration."""
    if len(sys.argv) < 3 or sys.argv[1] != "-m":
        sys.exit("usage: python -m dldkit -m MODULE [ARGS...]")
    dldkit.register()
    del sys.argv[:2]
    # alter_sys lets children that multiprocessing spawns find the module again
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
