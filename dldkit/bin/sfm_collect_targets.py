#!/usr/bin/env python3
"""Write a teacher's hidden states to Kaldi arks, for distillation from a cache."""

import argparse

from dldkit.errors import report_user_errors
from dldkit.options import add_job_options, command_parser, layer_list, parse


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--teacher", required=True, help="Hugging Face model, or ESPnet SSL experiment")
    add(
        "--layers",
        type=layer_list,
        help='as in "2 3 4"; 0 is the input; none: at thirds of its depth',
    )
    add("--data_dirs", nargs="+", required=True, help="training and validation speech")
    add(
        "--output_dir",
        required=True,
        help="for targets.scp and the arks; a finished collection of something else is "
        "refused",
    )
    add("--dtype", default="float16", choices=["float16", "int8"], help="of a value")
    add(
        "--features",
        action="store_true",
        help="write what the teacher's CNN makes of the speech, too, for students that "
        "have that CNN: their training reads no audio (cached_features: true)",
    )
    add("--ngpu", type=int, default=0, choices=[0, 1], help="1 = compute on the GPU")
    add_job_options(parser)
    return parser


@report_user_errors
def main(cmd=None) -> None:
    """Run the command."""
    from dldkit.sfm.targets import collect_targets

    args = parse(get_parser(), cmd)
    collect_targets(**vars(args))


if __name__ == "__main__":
    main()
