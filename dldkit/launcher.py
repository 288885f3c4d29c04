"""Register dldkit's classes, then run any module as `python -m` would."""

import runpy
import sys

import dldkit

# At import: the processes that multi-GPU training spawns import this module as their
# main module (see __main__.py), and so know dldkit's names as well.
dldkit.register()


def main() -> None:
    """Run `-m MODULE ARGS...` of the command line."""
    if len(sys.argv) < 3 or sys.argv[1] != "-m":
        sys.exit("usage: python -m dldkit -m MODULE [ARGS...]")
    del sys.argv[:2]
    runpy.run_module(sys.argv[0], run_name="__main__")
