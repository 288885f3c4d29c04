#!/usr/bin/env python3
"""Export a distilled student, at any depth, as a plain Hugging Face directory.

transformers (AutoModel), ESPnet (frontend: huggingface) and s3prl (hf_hubert_custom)
load it.
"""

import argparse
import logging

from dldkit.depth.selector import SELECTORS
from dldkit.errors import report_user_errors
from dldkit.options import command_parser, layer_list, parse, positive


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--model_file", required=True, help="exp/sfm_x/valid.loss.ave.pth")
    add("--config", help="of the training; config.yaml beside the model by default")
    add("--output_dir", required=True, help="for the Hugging Face files alone")
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument(
        "--depth", type=positive, help="number of layers; all by default"
    )
    depth.add_argument("--layers", type=layer_list, help="the layers, as 0,3,7")
    add("--selector", choices=list(SELECTORS), help="default: as the model was trained")
    return parser


@report_user_errors
def main(cmd=None) -> None:
    """Run the command."""
    from dldkit.sfm.export import export

    args = parse(get_parser(), cmd)
    layers = export(**vars(args))
    logging.info(f"exported layers {list(layers)} to {args.output_dir}")


if __name__ == "__main__":
    main()
