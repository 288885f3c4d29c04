"""Register dldkit's classes, then run any module as `python -m` would.

    python -m dldkit -m espnet2.bin.pack asr --outpath model.zip ...

ESPnet's own recipes work unchanged with `--python "python3 -m dldkit"`.
"""

import sys

from dldkit import launcher

if __name__ == "__main__":
    # multiprocessing lets spawned children import their parent's main module, except
    # for one that is called __main__, as this one is.
    sys.modules["__main__"] = launcher
    launcher.main()
