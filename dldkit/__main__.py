"""Register dldkit's classes, then run any module as `python -m` would.

    python -m dldkit -m espnet2.bin.pack asr --outpath model.zip ...

ESPnet's own recipes work unchanged with `--python "python3 -m dldkit"`.
"""

from dldkit import launcher, patches

if __name__ == "__main__":
    patches.be_importable_as_main(launcher)
    launcher.main()
