#!/usr/bin/env python3
"""Distil a speech foundation model into a student of variable depth."""

from dldkit.errors import report_user_errors
from dldkit.tasks.sfm import SFMDistillTask


def get_parser():
    """Return ESPnet's parser for this task."""
    return SFMDistillTask.get_parser()


@report_user_errors
def main(cmd=None):
    """Train as ESPnet's commands do."""
    SFMDistillTask.main(cmd=cmd)


if __name__ == "__main__":
    main()
