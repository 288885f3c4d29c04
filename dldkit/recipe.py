"""The options of a recipe, checked before its first stage begins.

What the options and the configs alone can tell is refused here, in less than a second:
neither ESPnet nor torch is imported, but to look into a model to start from.
"""

import json
import math
import os
import re
import shlex
import shutil
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dldkit.bin.merge_config import merge_files
from dldkit.errors import UserError
from dldkit.options import (
    depth_list,
    exit_thresholds,
    flat_layers,
    learning_rates,
    sampling_rate,
)

CHOICES = {
    "feats_type": ["raw", "fbank", "extracted"],
    "audio_format": ["flac", "wav", "flac.ark", "wav.ark"],
    "token_type": ["char", "bpe", "word"],
    "bpemode": ["unigram", "bpe"],
    "kd_source": ["live", "cached"],
    "targets": ["live", "cached", "cached_features"],
    "targets_dtype": ["float16", "int8"],
    "feats_normalize": ["global_mvn", "utterance_mvn", "none"],
    "selector": ["", "even", "prefix"],
    "probe": ["probe", "superb", "none"],
}
LEAST = {  # of options that are integers
    **dict.fromkeys(["num_nodes", "num_threads", "nj", "inference_nj", "nbpe"], 1),
    **dict.fromkeys(["n_mels", "calibration_utts", "top_k", "stats_utts"], 1),
    **dict.fromkeys(["rtf_utts", "seed", "ngpu"], 0),
}
UNSET = {"top_k": "", "seed": "", "ngpu": "auto"}  # which they may be instead
FILES = ["parallel_config", "bpe_train_text", "nlsyms_txt", "pretrained_model"]
FILES += ["asr_config", "reference_config", "sfm_config", "inference_config", "lm_file"]
DIRECTORIES = ["dumpdir", "expdir", "asr_exp", "asr_stats_dir", "lm_exp"]
ARGUMENTS = ["launch_args", "local_data_opts", "reference_args", "asr_args"]
ARGUMENTS += ["inference_args", "sfm_args", "probe_args", "superb_args"]
CRITERIA = [  # ESPnet's defaults
    ["train", "loss", "min"],
    ["valid", "loss", "min"],
    ["train", "acc", "max"],
    ["valid", "acc", "max"],
]


def check_asr(options: Mapping[str, str], systems: Path) -> dict[str, str]:
    """Check the options of asr.sh; return those to set, by name.

    Args:
        systems: the directory of the shared systems' configs.

    Raises:
        UserError: naming the option, and what it may be.
    """
    settings = _check_common(options)
    if not options["test_sets"].split():
        raise UserError("--test_sets is empty: name at least one directory of data/")
    for factor in options["speed_perturb_factors"].split():
        _number("speed_perturb_factors", factor, 0.0)
    reference = options["reference"]
    if reference and not Path(reference).exists():
        raise UserError(
            f"--reference {reference} does not exist: name an experiment directory, a "
            "checkpoint, a packed zip or cached posteriors"
        )
    config = _config(options, "asr", systems)
    if start := _model_to_start_from(options):
        from dldkit.asr.conversion import name_of

        settings["start_name"] = name_of(options["start_from"])
        settings["token_type"] = start["token_type"]
        config = _config(options, "asr", systems, start)
    settings["needs_reference"] = str(is_open(config, "model_conf.reference")).lower()
    settings.update(_reference(options, config, systems))
    decoded = config
    if options["asr_exp"] and int(options["stage"]) > 11:  # it was trained before
        existing = Path(options["asr_exp"], "config.yaml")
        decoded = merge_files([str(existing)]) if existing.is_file() else config
    _check_waveforms(options, config)
    layers = _num_layers(decoded)
    depths = _depths(options, "inference_depths", layers)
    if not depths:
        raise UserError('--inference_depths is empty: name depths, such as "12 6 2"')
    settings["inference_depths"] = depths
    settings["valid_depths"] = _valid_depths(config, depths)
    settings.update(_early_stopping(options, decoded))
    _check_checkpoint(options, "inference_asr_model", decoded, options["asr_exp"])
    _check_language_model(options)
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
        rate = _parsed(sampling_rate, options, "fs")
        size = int(options["n_mels"])
        refuse_other_features(model, config, options["feats_type"], rate, size)
        return config


def check_sfm(options: Mapping[str, str], systems: Path) -> dict[str, str]:
    """Check the options of sfm.sh; see `check_asr`."""
    if not find_spec("transformers"):
        raise UserError(
            "distillation needs transformers: run tools/install.sh, or pip install "
            "'dldkit[sfm]'"
        )
    settings = _check_common(options)
    config = _config(options, "sfm", systems)
    layers = OmegaConf.select(config, "student_conf.num_hidden_layers")
    exits = OmegaConf.select(config, "model_conf.exits") or []
    depths = _depths(options, "export_depths", layers)
    settings["export_depths"] = depths or _depths_of_exits(exits, layers)
    _check_checkpoint(options, "inference_model", config)
    settings["teacher"] = options["teacher"] or os.environ.get("TEACHER", "")
    if not settings["teacher"] and _runs(options, 9, 10, 11, 13):
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
    if options["probe"] == "superb" and _runs(options, 13):
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


def _check_common(options: Mapping[str, str]) -> dict[str, str]:
    """Check what the recipes have in common; return options in their plain form."""
    for name, choices in CHOICES.items():
        if options.get(name, choices[0]) not in choices:
            allowed = ", ".join(choice for choice in choices if choice)
            raise UserError(f"--{name} {options[name]}: choose one of {allowed}")
    for name in ("stage", "stop_stage"):
        _integer(name, options[name], 1, 15)
    if int(options["stage"]) > int(options["stop_stage"]):
        raise UserError(
            f"--stage {options['stage']} comes after --stop_stage "
            f"{options['stop_stage']}: nothing would run"
        )
    skipped = options["skip_stages"].replace(",", " ").split()
    for stage in skipped:
        _integer("skip_stages", stage, 1, 15)
    for name, least in LEAST.items():
        if name in options and options[name] != UNSET.get(name):
            _integer(name, options[name], least)
    if "frame_shift" in options:
        _number("frame_shift", options["frame_shift"], 0.0)
    longest = _number("max_wav_duration", options["max_wav_duration"], 0.0)
    if _number("min_wav_duration", options["min_wav_duration"], -1e-9) >= longest:
        raise UserError(
            f"--min_wav_duration {options['min_wav_duration']} is not below "
            f"--max_wav_duration {options['max_wav_duration']}: no utterance would be "
            "left"
        )
    for name in FILES:
        _check_file(name, options.get(name, ""))
    for name in DIRECTORIES:
        _check_directory(name, options.get(name, ""))
    for name in ARGUMENTS:
        _words(options, name)
    _check_sets(options)
    if options["hf_repo"] and not re.fullmatch(r"[\w.-]+/[\w.-]+", options["hf_repo"]):
        raise UserError(f"--hf_repo {options['hf_repo']}: write user/name")
    _check_launch(options)
    rate = _parsed(sampling_rate, options, "fs")
    return {"fs": str(rate), "skip_stages": " ".join(skipped)}


def _check_launch(options: Mapping[str, str]) -> None:
    """Refuse a launch that does not know where to."""
    if options["launch_args"].split()[:1] == ["srun"]:
        _check_srun(options)
        return
    launch = dict(_by_name(_words(options, "launch_args")))
    if not launch and int(options["num_nodes"]) == 1:
        return
    if not {"cmd", "host"} & set(launch):
        raise UserError(
            f"--num_nodes {options['num_nodes']} --launch_args "
            f"'{options['launch_args']}': say where to train, such as --launch_args "
            '"srun --nodes 2" (and --num_nodes 1), or "--host node1,node2"'
        )
    if script := " ".join(launch.get("cmd", [])).split():
        if not shutil.which(script[0]):
            raise UserError(
                f"--launch_args {options['launch_args']}: there is no {script[0]}; "
                "name the path of such a script of Kaldi's, or train through Slurm "
                'with --launch_args "srun --ntasks 2"'
            )


def _check_srun(options: Mapping[str, str]) -> None:
    given = f"--launch_args '{options['launch_args']}'"
    for name, of_srun in (("num_nodes", "--nodes"), ("ngpu", "--ntasks-per-node")):
        if options[name] not in ("auto", "0", "1"):
            raise UserError(
                f"{given}: say {of_srun} {options[name]} to srun, and --{name} 1 here; "
                "each of its tasks trains on one GPU"
            )
    if not shutil.which("srun"):
        raise UserError(f"{given}: there is no srun here; start it where Slurm is")


def _check_sets(options: Mapping[str, str]) -> None:
    for name in ("train_set", "valid_set"):
        if not re.fullmatch(r"[^\s/,]+", options[name]):
            raise UserError(f'--{name} "{options[name]}": name a directory of data/')
    if options["train_set"] == options["valid_set"]:
        raise UserError(
            f"--train_set and --valid_set are both {options['train_set']}: the best "
            "model is chosen on the validation set, so name another one"
        )


def _parsed(parse: Callable[[str], Any], options: Mapping[str, str], name: str) -> Any:
    """Read an option as the commands do."""
    try:
        return parse(options[name])
    except ArgumentTypeError as error:
        raise UserError(f"--{name} {error}") from None


def _integer(name: str, text: str, least: int, most: float = math.inf) -> None:
    if re.fullmatch(r"\d+", text) and least <= int(text) <= most:
        return
    bounds = f"from {least} to {most}" if most < math.inf else f"of at least {least}"
    unset = f", or {UNSET[name] or 'nothing'}" if name in UNSET else ""
    raise UserError(f"--{name} {text}: write an integer {bounds}{unset}")


def _number(name: str, text: str, above: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not above < number < math.inf:
        raise UserError(f"--{name} {text}: write a number above {max(above, 0):g}")
    return number


def _words(options: Mapping[str, str], name: str) -> list[str]:
    try:
        return shlex.split(options.get(name, ""))
    except ValueError as error:
        raise UserError(f"--{name} {options[name]}: {error}") from None


def _check_file(name: str, text: str) -> None:
    # of --init_param's FILE:SOURCE:TARGET:EXCLUDE, only the first is a file
    path = Path(text.partition(":")[0] if name == "pretrained_model" else text)
    if text and text != "none" and not path.is_file():
        raise UserError(f"--{name} {path}: there is no such file")


def _check_directory(name: str, text: str) -> None:
    # ESPnet separates file, name and type by commas, and parts of init_param by colons
    if re.search("[,:\n]", text):
        raise UserError(f"--{name} {text}: choose a path without commas and colons")
    for path in (Path(text), *Path(text).parents):
        if path.is_file():
            raise UserError(f"--{name} {text}: {path} is a file; choose a directory")


def _config(
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
    files = _files_of_system(option, options[option], systems)
    config = merge_files([options[f"{kind}_config"]])
    if start:
        from dldkit.asr.conversion import student_config

        recipe = OmegaConf.to_container(config)
        config = OmegaConf.create(student_config(recipe, start))
    config = OmegaConf.merge(config, merge_files(files))
    given = _by_name(_words(options, f"{kind}_args"))
    try:
        return OmegaConf.merge(config, *(_overrides(*item) for item in given))
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError) as error:
        raise UserError(
            f"--{kind}_args {options[f'{kind}_args']} can not be read: {error}"
        ) from None


def _files_of_system(option: str, system: str, systems: Path) -> list[str]:
    """Return the configs of a system: the recipe's own may change a shared one."""
    name = f"{system}.yaml"
    files = [systems / name, Path("conf", "systems", name)]
    files = [str(file) for file in files if file.is_file()]
    if not files:
        known = {file.stem for file in systems.glob("*.yaml")}
        known |= {file.stem for file in Path("conf", "systems").glob("*.yaml")}
        raise UserError(
            f"--{option} {system}: there is no {name} in {systems} or conf/systems; "
            f"choose one of {', '.join(sorted(known))}"
        )
    return files


def reference_system(config: DictConfig) -> str:
    """Return what the reference of a student is trained as, if nothing is said."""
    # a student that begins with its weights begins with trained exits
    return "early_exit" if is_open(config, "init_param") else "static"


def _reference(
    options: Mapping[str, str], student: DictConfig, systems: Path
) -> dict[str, str]:
    """Return what the reference is trained as, and what the student begins with."""
    system = options["reference_system"] or reference_system(student)
    settings = {"reference_system": system, "begins_with": ""}
    given = options["reference_config"] or options["asr_config"]
    options = {**options, "reference_system": system, "reference_config": given}
    config = _config(options, "reference", systems)
    if is_open(config, "model_conf.reference"):
        raise UserError(
            f"--reference_system {system}: it needs a reference itself; choose one "
            "that needs none, such as static or early_exit"
        )
    if is_open(student, "init_param"):
        fits = not options["reference"] and _weights(config) == _weights(student)
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


def _by_name(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Cut `--a 1 --b=2 3` into [(a, [1]), (b, [2, 3])]."""
    given: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            given.append((name, [value] if equals else []))
        elif given:
            given[-1][1].append(word)
    return given


def _overrides(name: str, values: list[str]) -> DictConfig:
    """Return what one option of ESPnet's training commands sets in the config."""
    if name.endswith("_conf"):
        return OmegaConf.from_dotlist(
            [f"{name}.{value}" for value in values if "=" in value]
        )
    value: Any = [yaml.safe_load(value) for value in values]
    return OmegaConf.create({name: value[0] if len(value) == 1 else value})


def _valid_depths(config: DictConfig, depths: str) -> str:
    """Return the depths to validate at, as [12,6,2]: full, half, and the smallest used.

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
    chosen = {layers, layers // 2, min(map(int, depths.split()))} - {0}
    return f"[{','.join(map(str, sorted(chosen, reverse=True)))}]"


def _early_stopping(options: Mapping[str, str], config: DictConfig) -> dict[str, str]:
    """Return the thresholds to decode with, and the exits that they may stop at.

    `auto` is `none` where nothing can stop early.
    """
    text = options["exit_thresholds"]
    thresholds = _parsed(exit_thresholds, options, "exit_thresholds")
    exits = OmegaConf.select(config, "encoder_conf.exits")
    given = dict(_by_name(_words(options, "inference_args")))
    if options["inference_config"]:
        given |= merge_files([options["inference_config"]])
    reason = ""
    if not exits:
        reason = f"{options['system']} has no exits; anytime and early_exit have"
    elif "beam_size" in given and given["beam_size"] not in (1, ["1"]):
        reason = "a beam search does not stop early; leave out --beam_size"
    elif options["selector"] == "even":
        reason = "exits are reached by the first layers; leave out --selector even"
    if reason and thresholds not in ("auto", "none"):
        raise UserError(f"--exit_thresholds {text}: {reason}")
    if reason or thresholds == "none":
        return {"exit_thresholds": "none", "exits": ""}
    return {"exits": _depths_of_exits(exits, _num_layers(config))}


def _depths_of_exits(exits: int | Sequence[int], layers: Any) -> str:
    """Return `exits` of a config as "2 4"; every so many layers need their number."""
    if isinstance(exits, int):
        exits = range(exits, layers or 0, exits)
    return " ".join(map(str, exits))


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
    if _parsed(sampling_rate, options, "fs") != 16000:
        raise UserError(
            f"--fs {options['fs']}: encoder: ld_hf takes speech of 16 kHz; say --fs "
            "16k, to which stage 3 resamples"
        )


def _num_layers(config: DictConfig) -> Any:
    """Return how many layers the encoder has; None where only the Hub knows."""
    layers = OmegaConf.select(config, "encoder_conf.num_blocks")
    if layers is not None or config.get("encoder") != "ld_hf":
        return layers
    file = Path(str(OmegaConf.select(config, "encoder_conf.model")), "config.json")
    if not file.is_file():
        return None
    model = json.loads(file.read_text(encoding="utf-8"))
    return model.get("encoder_layers", model.get("num_hidden_layers"))


def is_open(config: DictConfig, key: str) -> bool:
    """Whether the config leaves a key to the recipe, by ???."""
    return key in OmegaConf.missing_keys(config)


def _depths(options: Mapping[str, str], name: str, layers: Any) -> str:
    """Return "12,6 2" as "12 6 2"."""
    if not options[name].strip():
        return ""
    depths = _parsed(depth_list, options, name)
    if isinstance(layers, int) and max(depths) > layers:
        raise UserError(
            f"--{name} {options[name]}: the encoder has {layers} layers, so choose "
            f"depths from 1 to {layers}"
        )
    return " ".join(map(str, depths))


def _check_checkpoint(
    options: Mapping[str, str], option: str, config: DictConfig, exp: str = ""
) -> None:
    """Refuse a checkpoint that the training will not make."""
    name = options[option]
    if name == "latest.pth" or (exp and Path(exp, name).is_file()):
        return
    epochs = config.get("max_epoch", 40)
    if match := re.fullmatch(r"(\d+)epoch\.pth", name):
        if not isinstance(epochs, int) or 1 <= int(match[1]) <= epochs:
            return
        raise UserError(f"--{option} {name}: the training has {epochs} epochs")
    criteria = config.get("best_model_criterion", CRITERIA)
    criteria = [criteria] if isinstance(criteria, str) else criteria
    criteria = [c.split(",") if isinstance(c, str) else list(c) for c in criteria]
    kept = config.get("keep_nbest_models", 10)
    kept = list(kept) if isinstance(kept, Sequence) else [kept]
    averages = {f"ave_{n}best" for n in (1, *kept)}
    made = [f"{phase}.{value}" for phase, value, *_ in criteria]
    for best in made:
        if name in {f"{best}.{kind}.pth" for kind in {"best", "ave", *averages}}:
            return
    raise UserError(
        f"--{option} {name}: this training will not make it; its config "
        f"(best_model_criterion, keep_nbest_models) makes "
        + ", ".join(f"{best}.ave.pth, {best}.best.pth" for best in made)
        + " and latest.pth"
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
    given = dict(_by_name(_words(options, "inference_args")))
    if options["inference_config"]:
        given |= merge_files([options["inference_config"]])
    if "beam_size" not in given:
        raise UserError(
            "--use_lm true: greedy search takes no language model; say "
            '--inference_args "--beam_size 10"'
        )


def _check_superb(options: Mapping[str, str]) -> None:
    from dldkit.sfm.superb.checks import check_tasks, fetch_lists
    from dldkit.sfm.superb.tasks import CORPORA

    words = _by_name(_words(options, "superb_args"))
    given = {name: " ".join(values) for name, values in words}
    corpora = {c: given.get(c) or os.environ.get(c.upper()) for c in CORPORA}
    dscore = given.get("dscore") or os.environ.get("DSCORE")
    rates = _parsed(learning_rates, {"lr": "", **given}, "lr")
    tasks = given.get("tasks", "").split()
    tasks, _ = check_tasks(tasks, corpora, dscore, rates, downloads=_runs(options, 1))
    fetch_lists(tasks, Path(given.get("list_dir", "downloads/superb")))


def _runs(options: Mapping[str, str], *stages: int) -> bool:
    """Whether one of these stages is to be run."""
    first, last = int(options["stage"]), int(options["stop_stage"])
    skipped = options["skip_stages"].replace(",", " ").split()
    skipped += ["1"] if options["skip_data_prep"] == "true" else []
    skipped += ["13"] if options["skip_eval"] == "true" else []
    skipped += ["9", "10", "11"] if options["skip_train"] == "true" else []
    return any(first <= n <= last and str(n) not in skipped for n in stages)
