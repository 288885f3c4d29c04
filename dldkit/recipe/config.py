"""The training config that a recipe's options name, and what depends on it."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dldkit.config_files import merge_files
from dldkit.depth.exits import depths_of_exits
from dldkit.errors import UserError
from dldkit.options import depth_list
from dldkit.recipe.values import by_name, parsed, words_of

CRITERIA = [  # ESPnet's defaults
    ["train", "loss", "min"],
    ["valid", "loss", "min"],
    ["train", "acc", "max"],
    ["valid", "acc", "max"],
]
# options of a training, and the recipe's own that say them
OF_THE_RECIPE = {"config": "config", "output_dir": "tag"}


def training_config(
    options: Mapping[str, str],
    kind: str,
    systems: Path,
    start: Mapping[str, Any] | None = None,
) -> DictConfig:
    """Return a training config: of `--system` and --asr_args, where the kind is asr.

    Args:
        kind: asr, sfm, or reference.
        start: the config of a trained model, whose architecture it has.
    """
    option = "reference_system" if kind == "reference" else "system"
    directories = (systems, Path("conf", "systems"))
    files = files_of_system(option, options[option], directories)
    config = merge_files([options[f"{kind}_config"]])
    if start:
        from dldkit.asr.conversion import student_config

        recipe = OmegaConf.to_container(config)
        config = OmegaConf.create(student_config(recipe, start))
    config = OmegaConf.merge(config, merge_files(files))
    given = by_name(words_of(options, f"{kind}_args"))
    for name, instead in OF_THE_RECIPE.items():
        if name in dict(given):
            raise UserError(
                f"--{kind}_args says {name}, which the recipe has to know: say "
                f"--{kind}_{instead}"
            )
    try:
        config = OmegaConf.merge(config, *(_overrides(*item) for item in given))
        OmegaConf.resolve(config)
        return config
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError) as error:
        raise UserError(
            f"--{kind}_args {options[f'{kind}_args']} can not be read: {error}"
        ) from None


def files_of_system(option: str, system: str, directories: Sequence[Path]) -> list[str]:
    """Return the configs of a system: the recipe's own may change a shared one.

    Raises:
        UserError: none of the directories has one.
    """
    name = f"{system}.yaml"
    files = [str(d / name) for d in directories if (d / name).is_file()]
    if not files:
        known = {file.stem for d in directories for file in d.glob("*.yaml")}
        raise UserError(
            f"--{option} {system}: there is no {name} in "
            f"{' or '.join(map(str, directories))}; "
            f"choose one of {', '.join(sorted(known))}"
        )
    return files


def _overrides(name: str, values: list[str]) -> DictConfig:
    """Return what one option of ESPnet's training commands sets in the config."""
    if name.endswith("_conf"):
        if len(values) > 1:  # ESPnet takes one
            raise ValueError(f"write --{name} before each of {' '.join(values)}")
        # ESPnet tells a dictionary from KEY=VALUE like this
        pairs = [f"{name}.{value}" for value in values if "=" in value]
        whole = [yaml.safe_load(value) for value in values if "=" not in value]
        if not all(isinstance(value, dict) for value in whole):
            raise ValueError(f"--{name} {' '.join(values)}: write KEY=VALUE")
        return OmegaConf.merge(
            OmegaConf.from_dotlist(pairs), *({name: value} for value in whole)
        )
    value: Any = [yaml.safe_load(value) for value in values]
    return OmegaConf.create({name: value[0] if len(value) == 1 else value})


def is_open(config: DictConfig, key: str) -> bool:
    """Whether the config leaves a key to the recipe, by ???."""
    return key in OmegaConf.missing_keys(config)


def exits_of(config: DictConfig, part: str, layers: int) -> list[int]:
    """Return the depths of the exits that `encoder_conf` or `model_conf` says."""
    exits = OmegaConf.select(config, f"{part}.exits") or ()
    choice = OmegaConf.select(config, f"{part}.layer_choice") or "random"
    return depths_of_exits(exits, layers, choice)


def depths_to_run(options: Mapping[str, str], name: str, layers: Any) -> str:
    """Return "12,6 2" as "12 6 2"."""
    if not options[name].strip():
        return ""
    depths = parsed(depth_list, options, name)
    if isinstance(layers, int) and max(depths) > layers:
        raise UserError(
            f"--{name} {options[name]}: the encoder has {layers} layers, so choose "
            f"depths from 1 to {layers}"
        )
    return " ".join(map(str, depths))


def check_checkpoint(
    options: Mapping[str, str],
    option: str,
    config: DictConfig,
    exp: str = "",
    training: str = "this training",
) -> None:
    """Refuse a checkpoint that a training will not make."""
    name = options[option]
    if name == "latest.pth" or (exp and Path(exp, name).is_file()):
        return
    epochs = config.get("max_epoch", 40)
    if match := re.fullmatch(r"(\d+)epoch\.pth", name):
        if not isinstance(epochs, int) or 1 <= int(match[1]) <= epochs:
            return
        raise UserError(f"--{option} {name}: {training} has {epochs} epochs")
    criteria = config.get("best_model_criterion", CRITERIA)
    criteria = [criteria] if isinstance(criteria, str) else criteria
    try:
        criteria = [c.split(",") if isinstance(c, str) else list(c) for c in criteria]
        made = [f"{phase}.{value}" for phase, value, *_ in criteria]
    except (TypeError, ValueError):
        raise UserError(
            f"best_model_criterion: {criteria}: write lists, such as "
            "[[valid, loss_ctc, min]]"
        ) from None
    kept = config.get("keep_nbest_models", 10)
    kept = list(kept) if isinstance(kept, Sequence) else [kept]
    averages = {f"ave_{n}best" for n in (1, *kept)}
    for best in made:
        if name in {f"{best}.{kind}.pth" for kind in {"best", "ave", *averages}}:
            return
    raise UserError(
        f"--{option} {name}: {training} will not make it; its config "
        f"(best_model_criterion, keep_nbest_models) makes "
        + ", ".join(f"{best}.ave.pth, {best}.best.pth" for best in made)
        + " and latest.pth"
    )
