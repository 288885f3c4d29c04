#!/usr/bin/env python3
"""Write the depth profile of a trained model from training speech."""

import argparse

from dldkit.depth.selector import SELECTORS
from dldkit.errors import report_user_errors
from dldkit.options import command_parser, depth_list, parse, positive


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--asr_model_file", required=True, help="checkpoint, beside its config.yaml")
    add("--data_dir", required=True, help="training speech: dump/raw/train")
    add(
        "--depths",
        type=depth_list,
        required=True,
        help='numbers of layers: "12 10 8 6 4 2"',
    )
    add("--selector", choices=list(SELECTORS), help="default: as the model was trained")
    add("--num_utts", type=positive, default=300, help="utterances to calibrate on")
    add("--batch_size", type=positive, default=20, help="utterances per unpadded batch")
    add("--seed", type=int, default=0, help="of the choice of utterances")
    return parser


@report_user_errors
def main(cmd=None) -> None:
    """Run the command."""
    from dldkit.asr.calibration import write_depth_profile

    args = parse(get_parser(), cmd)
    write_depth_profile(**vars(args))


if __name__ == "__main__":
    main()
