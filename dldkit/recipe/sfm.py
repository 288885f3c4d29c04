"""The options of sfm.sh."""

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from omegaconf import DictConfig, OmegaConf

from dldkit.errors import UserError
from dldkit.hf_options import refuse_without_transformers
from dldkit.options import flat_layers
from dldkit.recipe.common import check_common
from dldkit.recipe.config import (
    check_checkpoint,
    depths_to_run,
    exits_of,
    training_config,
)
from dldkit.recipe.values import runs, words_of


def check_sfm(options: Mapping[str, str], systems: Path) -> dict[str, str]:
    """Check the options of sfm.sh; see `check_asr`."""
    refuse_without_transformers("distillation")
    settings = check_common(options)
    config = training_config(options, "sfm", systems)
    layers = OmegaConf.select(config, "student_conf.num_hidden_layers")
    if layers is None:
        from transformers import HubertConfig  # which takes seconds

        layers = HubertConfig().num_hidden_layers
    exits = exits_of(config, "model_conf", layers)
    depths = depths_to_run(options, "export_depths", layers)
    settings["export_depths"] = depths or " ".join(map(str, exits))
    check_checkpoint(options, "inference_model", config)
    settings["teacher"] = options["teacher"] or os.environ.get("TEACHER", "")
    if not settings["teacher"] and runs(options, 9, 10, 11, 13, 15):
        raise UserError(
            "there is no teacher: set --teacher, or TEACHER in the environment or "
            "db.sh, to a directory or a Hugging Face name; with network, "
            "facebook/hubert-base-ls960 or openai/whisper-tiny.en is downloaded"
        )
    shares_cnn = OmegaConf.select(config, "model_conf.cnn_init") == "teacher"
    shares_cnn &= bool(OmegaConf.select(config, "model_conf.freeze_cnn"))
    if options["targets"] == "cached_features" and not shares_cnn:
        raise UserError(
            f"--targets cached_features, but --system {options['system']} has a CNN of "
            "its own: choose --system fast, set model_conf cnn_init: teacher and "
            "freeze_cnn: true, or say --targets cached"
        )
    if options["train_shar"]:
        _check_shar(options, config)
    teacher_layers = OmegaConf.select(config, "model_conf.teacher_layers") or []
    seconds = OmegaConf.select(config, "collate_fn_conf.max_seconds")
    settings["segment_seconds"] = str(15.6 if seconds is None else seconds)
    settings["teacher_layers"] = " ".join(map(str, flat_layers(teacher_layers)))
    if options["probe"] == "probe" and runs(options, 13):
        _check_probe(options)
    if options["probe"] == "superb" and runs(options, 13):
        _check_superb(options)
    return settings


def _check_shar(options: Mapping[str, str], config: DictConfig) -> None:
    """Refuse a streamed corpus that is not there, or that can not be trained on."""
    given = f"--train_shar {options['train_shar']}"
    if not config.get("num_iters_per_epoch"):
        raise UserError(
            f"{given}: say how many batches an epoch has, with --sfm_args "
            '"--num_iters_per_epoch 1000"'
        )
    if options["targets"] != "live":
        raise UserError(
            f"{given}: say --targets live; cached ones are those of a --train_set"
        )
    if not any(Path(options["train_shar"]).glob("cuts.*.jsonl.gz")):
        raise UserError(
            f"{given}: there is no cuts.*.jsonl.gz in it; name a directory that lhotse "
            "shar export wrote"
        )


def _parse(
    options: Mapping[str, str], name: str, parser: ArgumentParser, of_the_recipe: str
) -> Namespace:
    """Read what an option gives to a command of stage 13, or refuse it in one line.

    Args:
        of_the_recipe: what the recipe gives to it besides.
    """

    def refuse(message: str) -> NoReturn:
        raise UserError(f"--{name}: {message}")

    command = name.removesuffix("_args")
    parser.error = refuse
    parser.print_help = lambda: refuse(
        f"see python3 -m dldkit.bin.sfm_{command} --help"
    )
    return parser.parse_args(of_the_recipe.split() + words_of(options, name))


def _check_probe(options: Mapping[str, str]) -> None:
    from dldkit.bin.sfm_probe import get_parser

    needed = "--upstream x=x --digits x x --strings x x --output_dir x"
    _parse(options, "probe_args", get_parser(), needed)


def _check_superb(options: Mapping[str, str]) -> None:
    from dldkit.bin.sfm_superb import get_parser
    from dldkit.sfm.superb.checks import check_tasks, fetch_lists
    from dldkit.sfm.superb.tasks import CORPORA

    needed = "--upstream=x --upstream_name=x --output_dir=x"
    args = _parse(options, "superb_args", get_parser(), needed)
    tasks, _ = check_tasks(
        args.tasks.split(),
        {name: getattr(args, name) for name in CORPORA},
        args.dscore,
        args.lr,
        downloads=runs(options, 1),
    )
    fetch_lists(tasks, Path(args.list_dir))
