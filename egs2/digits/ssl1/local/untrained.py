#!/usr/bin/env python3
"""Export a student as it is before training: what its sizes alone are worth."""

import argparse
from typing import Optional, Sequence

import yaml
from espnet2.torch_utils.set_all_random_seed import set_all_random_seed

from dldkit.errors import report_user_errors
from dldkit.sfm.export import export_student
from dldkit.tasks.sfm import SFMDistillTask


@report_user_errors
def main(cmd: Optional[Sequence[str]] = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="config.yaml of an experiment")
    parser.add_argument("output_dir", help="for the Hugging Face files")
    args = parser.parse_args(cmd)
    with open(args.config, encoding="utf-8") as config:
        set_all_random_seed(yaml.safe_load(config)["seed"])
    model, _ = SFMDistillTask.build_model_from_file(args.config)
    layers = range(model.student.config.num_hidden_layers)
    export_student(
        model.student, model.normalize, layers, args.output_dir, model.sampling_rate
    )


if __name__ == "__main__":
    main()
