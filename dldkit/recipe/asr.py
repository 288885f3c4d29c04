"""The options of asr.sh."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dldkit.config_files import merge_files
from dldkit.errors import UserError
from dldkit.hf_options import check_schedule, check_values
from dldkit.options import exit_thresholds, named_twice, sampling_rate
from dldkit.recipe.common import check_common
from dldkit.recipe.config import (
    check_checkpoint,
    depths_to_run,
    exits_of,
    is_open,
    training_config,
)
from dldkit.recipe.encoders import refuse_unknown_options
from dldkit.recipe.values import by_name, number, parsed, runs, words_of

# what a system's config may leave to the recipe, by ???
FILLED_IN = ("model_conf.reference", "init_param")
# options of asr_inference, and what says them for decoding, calibration and report
OF_THE_RECIPE = {
    "depth": "--inference_depths",
    "layers": "--inference_depths, and --selector",
    "selector": "--selector",
    "depth_profile": "--use_depth_profile",
    "exit_threshold": "--exit_thresholds",
    "output_dir": "--inference_tag",
}


def check_asr(options: Mapping[str, str], systems: Path) -> dict[str, str]:
    """Check the options of asr.sh; return those to set, by name.

    Args:
        systems: the directory of the shared systems' configs.

    Raises:
        UserError: naming the option, and what it may be.
    """
    settings = check_common(options)
    test_sets = options["test_sets"].split()
    if not test_sets:
        raise UserError("--test_sets is empty: name at least one directory of data/")
    if twice := named_twice(test_sets):
        raise UserError(f"--test_sets names {twice} twice: name each set once")
    settings["test_sets"] = " ".join(test_sets)
    for factor in options["speed_perturb_factors"].split():
        number("speed_perturb_factors", factor, 0.0)
    reference = options["reference"]
    if reference and not Path(reference).exists():
        raise UserError(
            f"--reference {reference} does not exist: name an experiment directory, a "
            "checkpoint, a packed zip or cached posteriors"
        )
    config = training_config(options, "asr", systems)
    if start := _model_to_start_from(options):
        from dldkit.asr.conversion import name_of

        settings["start_name"] = name_of(options["start_from"])
        settings["token_type"] = start["token_type"]
        config = training_config(options, "asr", systems, start)
    _check_training(options, config)
    needs_reference = is_open(config, "model_conf.reference")
    if not needs_reference:
        _refuse_unused_reference(options)
    settings["needs_reference"] = str(needs_reference).lower()
    system = training_config({**options, "asr_args": ""}, "asr", systems)
    # what --asr_args give has no place in the system's config any more
    given = [
        key for key in FILLED_IN if is_open(system, key) and not is_open(config, key)
    ]
    settings["given_values"] = " ".join(f"{key}=null" for key in given)
    decoded = config
    if options["asr_exp"] and int(options["stage"]) > 11:  # it was trained before
        existing = Path(options["asr_exp"], "config.yaml")
        decoded = merge_files([str(existing)]) if existing.is_file() else config
    check_checkpoint(options, "inference_asr_model", decoded, options["asr_exp"])
    settings.update(_reference(options, config, system, systems))
    _check_waveforms(options, config)
    layers = _num_layers(decoded)
    if layers is None:
        raise UserError(
            f"{options['asr_config']} does not say how many layers the encoder has: "
            "write encoder_conf: num_blocks"
        )
    if not isinstance(layers, int) or layers < 1:
        raise UserError(
            f"encoder_conf num_blocks: {layers!r}: write a number of layers, as 12"
        )
    depths = depths_to_run(options, "inference_depths", layers)
    if not depths:
        raise UserError('--inference_depths is empty: name depths, such as "12 6 2"')
    settings["inference_depths"] = depths
    settings["valid_depths"] = _valid_depths(config, depths)
    settings.update(_early_stopping(options, decoded))
    _check_language_model(options)
    _check_inference(options)
    return settings


def _model_to_start_from(options: Mapping[str, str]) -> Mapping[str, Any] | None:
    """Return the config of --start_from, if it is a model that fits the options."""
    model = options["start_from"]
    if not model:
        return None
    if options["pretrained_model"]:
        raise UserError(
            "--start_from and --pretrained_model both say where the weights begin: "
            "give one of them"
        )
    is_a_hub_name = re.fullmatch(r"[^/.][^/]*/[^/]+", model)
    if not Path(model).exists() and not is_a_hub_name:
        raise UserError(
            f"--start_from {model} does not exist: name an experiment directory, a "
            "checkpoint, a packed zip or a model on Hugging Face (user/name)"
        )
    from dldkit.asr.conversion import opened, refuse_other_features, refuse_unfit

    with opened(model) as (config, _):
        refuse_unfit(model, config)
        rate = parsed(sampling_rate, options, "fs")
        size = int(options["n_mels"])
        refuse_other_features(model, config, options["feats_type"], rate, size)
        return config


def _refuse_unused_reference(options: Mapping[str, str]) -> None:
    names = "reference", "reference_system", "reference_config", "reference_args"
    for name in (*names, "top_k"):
        if options[name]:
            raise UserError(
                f"--{name} {options[name]}: {options['system']} takes no reference "
                "here; choose a --system that is pulled to one, such as anytime or dld"
            )


def reference_system(config: DictConfig) -> str:
    """Return what the reference of a student is trained as, if nothing is said."""
    # a student that begins with its weights begins with trained exits
    return "early_exit" if is_open(config, "init_param") else "static"


def _reference(
    options: Mapping[str, str], student: DictConfig, plain: DictConfig, systems: Path
) -> dict[str, str]:
    """Return what the reference is trained as, and what the student begins with.

    Args:
        plain: the student's config without --asr_args.
    """
    system = options["reference_system"] or reference_system(plain)
    settings = {"reference_system": system, "begins_with": ""}
    given = options["reference_config"] or options["asr_config"]
    options = {**options, "reference_system": system, "reference_config": given}
    config = training_config(options, "reference", systems)
    if is_open(config, "model_conf.reference"):
        raise UserError(
            f"--reference_system {system}: it needs a reference itself; choose one "
            "that needs none, such as static or early_exit"
        )
    is_trained = is_open(student, "model_conf.reference") and not options["reference"]
    if is_trained:
        _check_training(options, config)
        is_skipped = options["start_from"] or options["skip_reference"] == "true"
        if not is_skipped and runs(options, 7):
            training = "the reference's training (--reference_args)"
            check_checkpoint(options, "inference_asr_model", config, "", training)
    if is_open(student, "init_param"):
        fits = is_trained and _weights(config) == _weights(student)
        settings["begins_with"] = "reference" if fits else "random"
    return settings


def _weights(config: DictConfig) -> list[Any]:
    """Return what says which weights a model has."""
    names = "encoder encoder_conf decoder decoder_conf frontend frontend_conf"
    drawn = "depth_sampler keep_prob min_depth layer_choice exits".split()
    plain = OmegaConf.to_container(config)
    plain["encoder_conf"] = {
        name: value
        for name, value in (plain.get("encoder_conf") or {}).items()
        if name not in drawn
    }
    heads = (plain.get("model_conf") or {}).get("shared_head", True)
    return [heads, *(plain.get(name) for name in names.split())]


def _valid_depths(config: DictConfig, depths: str) -> str:
    """Return the depths to validate at, as [12,6,2]: full, half, and the smallest used.

    Half is the deepest of those used up to it: with exits, others may be untrained.
    Empty for a system of one depth, and where the config says it itself.
    """
    encoder = config.get("encoder_conf") or {}
    layers = _num_layers(config)
    exits = encoder.get("exits") or encoder.get("interctc_layer_idx")
    dynamic = exits or encoder.get("depth_sampler", "bernoulli") != "full"
    if (
        config.get("model") != "dld"
        or not str(config.get("encoder")).startswith("ld_")
        or not (layers and dynamic)
        or OmegaConf.select(config, "model_conf.valid_depths") is not None
    ):
        return ""
    used = sorted(map(int, depths.split()))
    half = max((depth for depth in used if depth <= layers / 2), default=used[0])
    chosen = {layers, half, used[0]}
    return f"[{','.join(map(str, sorted(chosen, reverse=True)))}]"


def _early_stopping(options: Mapping[str, str], config: DictConfig) -> dict[str, str]:
    """Return the thresholds to decode with, and the exits that they may stop at.

    `auto` is `none` where nothing can stop early.
    """
    text = options["exit_thresholds"]
    thresholds = parsed(exit_thresholds, options, "exit_thresholds")
    exits = exits_of(config, "encoder_conf", _num_layers(config))
    reason = ""
    if not exits:
        reason = f"{options['system']} has no exits; early_exit_half and anytime have"
    elif _beam_size(options) != "1":
        reason = "a beam search does not stop early; leave out --beam_size"
    elif options["selector"] == "even":
        reason = "exits are reached by the first layers; leave out --selector even"
    if reason and thresholds not in ("auto", "none"):
        raise UserError(f"--exit_thresholds {text}: {reason}")
    if reason or thresholds == "none":
        return {"exit_thresholds": "none", "exits": ""}
    return {"exits": " ".join(map(str, exits))}


def _beam_size(options: Mapping[str, str]) -> str:
    """Return how many hypotheses decoding keeps; 1 = greedy search."""
    size = _inference_options(options).get("beam_size", 1)
    return size[-1] if isinstance(size, list) else str(size)


def _inference_options(options: Mapping[str, str]) -> dict[str, Any]:
    """Return what --inference_config says, and --inference_args in lists."""
    given: dict[str, Any] = {}
    if options["inference_config"]:
        given |= merge_files([options["inference_config"]])
    return given | dict(by_name(words_of(options, "inference_args")))


def _num_layers(config: DictConfig) -> Any:
    """Return how many layers the encoder has; None where only the Hub knows."""
    layers = OmegaConf.select(config, "encoder_conf.num_blocks")
    if layers is not None or config.get("encoder") != "ld_hf":
        return layers
    file = Path(str(OmegaConf.select(config, "encoder_conf.model")), "config.json")
    if not file.is_file():
        return None
    try:
        model = json.loads(file.read_text(encoding="utf-8"))
        return model.get("encoder_layers", model.get("num_hidden_layers"))
    except (ValueError, AttributeError):
        raise UserError(
            f"{file} is not the JSON object of a Hugging Face model: fetch it again"
        ) from None


def _check_training(options: Mapping[str, str], config: DictConfig) -> None:
    """Refuse a schedule that is not there, and an encoder that can not be built."""
    if config.get("scheduler") == "transformers":
        check_schedule(config.get("scheduler_conf") or {})
    refuse_unknown_options(config)
    if config.get("encoder") != "ld_hf":
        return
    values = OmegaConf.to_container(config).get("encoder_conf") or {}
    check_values(**values)
    is_trained = options["skip_train"] == "true" or int(options["stage"]) > 11
    if values.get("hf_config") or is_trained:
        return  # the model has been read before, and need not be there any more
    model = str(values.get("model"))
    is_path = model.startswith(("/", "./", "../"))
    if is_path and not Path(model, "config.json").is_file():
        raise UserError(
            f"encoder_conf model: {model} has no config.json: name the directory of a "
            "Hugging Face model, or a model on the Hub"
        )


def _check_waveforms(options: Mapping[str, str], config: DictConfig) -> None:
    """Refuse features for an encoder that takes speech of 16 kHz as it is."""
    if config.get("encoder") != "ld_hf":
        return
    for name, needed in (("feats_type", "raw"), ("feats_normalize", "none")):
        if options[name] != needed:
            raise UserError(
                f"--{name} {options[name]}: encoder: ld_hf takes speech as it is; say "
                f"--{name} {needed}"
            )
    if parsed(sampling_rate, options, "fs") != 16000:
        raise UserError(
            f"--fs {options['fs']}: encoder: ld_hf takes speech of 16 kHz; say --fs "
            "16k, to which stage 3 resamples"
        )


def _check_inference(options: Mapping[str, str]) -> None:
    """Refuse what decoding, calibration and report have to know alike."""
    given = _inference_options(options)
    for name, instead in OF_THE_RECIPE.items():
        if name in given:
            raise UserError(
                f"--inference_args or --inference_config says {name}: the report has "
                f"to know it, so say {instead}"
            )


def _check_language_model(options: Mapping[str, str]) -> None:
    if options["use_lm"] != "true":
        return
    if not options["lm_exp"] and not options["lm_file"]:
        raise UserError(
            "--use_lm true: name the experiment directory of an existing language "
            "model with --lm_exp, or its checkpoint with --lm_file"
        )
    lm_file = options["lm_file"] or f"{options['lm_exp']}/valid.loss.ave.pth"
    lm_exp = options["lm_exp"] or str(Path(lm_file).parent)
    for needed in (lm_file, f"{lm_exp}/config.yaml"):
        if not Path(needed).is_file():
            raise UserError(f"--use_lm true: there is no {needed}; train it in ESPnet")
    if _beam_size(options) == "1":
        raise UserError(
            "--use_lm true: greedy search takes no language model; say "
            '--inference_args "--beam_size 10"'
        )
