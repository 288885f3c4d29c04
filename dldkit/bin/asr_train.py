#!/usr/bin/env python3
"""Train an ASR model: espnet2.bin.asr_train with dldkit's classes."""

from dldkit.errors import report_user_errors
from dldkit.tasks.asr import DLDASRTask


def get_parser():
    """Return ESPnet's parser, with dldkit's names among the choices."""
    return DLDASRTask.get_parser()


@report_user_errors
def main(cmd=None):
    """Train as `espnet2.bin.asr_train` does."""
    DLDASRTask.main(cmd=cmd)


if __name__ == "__main__":
    main()
