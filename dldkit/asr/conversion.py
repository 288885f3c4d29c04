"""A trained ESPnet model becomes what a training of variable depth starts from.

Its encoder gets the name of its ld_* twin, whose weights have the same names, so that
nothing but the training changes: at full depth the student begins as the model it was.
"""

import argparse
import copy
import inspect
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Union

import yaml
from espnet2.tasks.asr import encoder_choices
from espnet2.utils.pretrained import download_pretrained

import dldkit
from dldkit.asr.encoder import LayerDropEncoder
from dldkit.asr.loading import (
    files_of_asr,
    find_checkpoint,
    load_asr_model,
    unpacked,
)
from dldkit.asr.model import DLDModel
from dldkit.config_files import (
    BARE_NAMES,
    copy_files,
    named_files,
    resolved_config,
    set_file,
    without_files,
)
from dldkit.errors import UserError
from dldkit.options import sampling_rate
from dldkit.step import Step, atomic

dldkit.register()

ENCODERS = ("conformer", "transformer", "branchformer", "e_branchformer", "ld_hf")
TOKEN_TYPES = ("bpe", "char", "word")
# What a model is; the other keys of a config say how it is trained.
ARCHITECTURE = "token_type token_list bpemodel non_linguistic_symbols cleaner g2p"
ARCHITECTURE += " input_size frontend frontend_conf specaug specaug_conf normalize"
ARCHITECTURE += " normalize_conf preencoder preencoder_conf encoder encoder_conf"
ARCHITECTURE += " decoder decoder_conf ctc_conf model_conf"
STUDENT = "student.yaml"


@contextmanager
def opened(model: str) -> Iterator[tuple[dict[str, Any], Path]]:
    """Yield the config of a trained model, with its files found, and its checkpoint.

    Args:
        model: an experiment directory, one of its checkpoints, a zip that ESPnet or
            dldkit packed, or a name on Hugging Face.

    Raises:
        UserError: when there is no such model, or it is none of speech recognition.
    """
    path = Path(model)
    with tempfile.TemporaryDirectory() as directory:
        if path.is_dir():
            checkpoint = find_checkpoint(path)
            config = path / "config.yaml"
        elif path.is_file() and path.suffix != ".zip":
            checkpoint, config = path, path.with_name("config.yaml")
        else:
            found = unpacked(path, directory) if path.is_file() else _download(model)
            config, checkpoint = files_of_asr(model, found)
        for needed in (checkpoint, config):
            if not needed.is_file():
                raise UserError(f"{model} can not be used: there is no {needed}")
        with resolved_config(config) as file, file.open(encoding="utf-8") as lines:
            yield yaml.load(lines, yaml.CSafeLoader), checkpoint


def _download(name: str) -> dict[str, str]:
    try:
        return download_pretrained(name)
    except Exception as error:  # of the network, the hub or the zoo
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{name} is no directory or file here, and could not be had from Hugging "
            f"Face ({type(error).__name__}: {reason})"
        ) from error


def name_of(model: str) -> str:
    """Return a name for the directories of what starts from `model`."""
    path = Path(model)
    name = path.resolve().name if path.is_dir() else model
    if path.is_file():
        is_zip = path.suffix == ".zip"
        name = path.stem if is_zip else f"{path.resolve().parent.name}_{path.stem}"
    return "from_" + re.sub(r"[^\w.-]+", "_", name.removeprefix("asr_"))


def refuse_unfit(model: str, config: Mapping[str, Any]) -> None:
    """Raise a UserError for a model that can not be trained at several depths."""
    model_conf = config.get("model_conf") or {}
    encoder, kind = str(config.get("encoder")), config.get("model") or "espnet"
    why = None
    if not {encoder, encoder.removeprefix("ld_")} & set(ENCODERS):
        why = f"its encoder is {encoder}; choose a model with one of "
        why += ", ".join(ENCODERS)
    elif config.get("decoder") == "transducer":
        why = "it is a transducer; choose a CTC or CTC/attention model"
    elif kind not in ("espnet", "dld"):
        why = f"it is a {kind} model; choose a CTC or CTC/attention model"
    elif model_conf.get("ctc_weight", 0.5) == 0:
        why = "it was trained without CTC (ctc_weight: 0)"
    elif config.get("token_type") not in TOKEN_TYPES:
        why = f"its token_type is {config.get('token_type')}; choose a model with one "
        why += f"of {', '.join(TOKEN_TYPES)}"
    elif config.get("postencoder"):
        why = "it has a postencoder, which follows the full depth only"
    elif (config.get("encoder_conf") or {}).get("interctc_use_conditioning"):
        why = "its layers are conditioned on intermediate CTC"
        why += " (interctc_use_conditioning)"
    elif model_conf.get("shared_head") is False:
        why = "it has an output layer for each exit (shared_head: false)"
    if why:
        raise UserError(f"{model} can not be started from: {why}")


def refuse_other_features(
    model: str, config: Mapping[str, Any], feats_type: str, fs: int, n_mels: int
) -> None:
    """Raise a UserError if the recipe's features are not what the model takes."""
    size = config.get("input_size")
    if config.get("encoder") == "ld_hf":
        size = None  # audio, of one dimension as ESPnet says
    if (size is None) != (feats_type == "raw"):
        takes = "audio" if size is None else f"features of {size} dimensions"
        raise UserError(
            f"{model} takes {takes}, and --feats_type is {feats_type}: choose "
            f"{'raw' if size is None else 'fbank or extracted'}"
        )
    if feats_type == "fbank" and size != n_mels:
        raise UserError(
            f"{model} takes features of {size} dimensions, and --n_mels is {n_mels}"
        )
    if size is None:
        rate = sampling_rate(str((config.get("frontend_conf") or {}).get("fs", "16k")))
        if rate != fs:
            raise UserError(f"{model} takes audio of {rate} Hz, and --fs is {fs}")


def converted(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the same model with an encoder of run-time depth.

    What made it dynamic is gone: drawn depths, exits, the reference.
    """
    config = copy.deepcopy(dict(config))
    name = "ld_" + str(config["encoder"]).removeprefix("ld_")
    defaults = inspect.signature(encoder_choices.get_class(name)).parameters
    options = {"num_blocks": defaults["num_blocks"].default}
    options |= _without(config.get("encoder_conf"), LayerDropEncoder)
    # it does nothing in ESPnet's encoders, and ours refuse it
    options.pop("layer_drop_rate", None)
    config["encoder"] = name
    config["encoder_conf"] = {**options, "depth_sampler": "full"}
    config["model_conf"] = _without(config.get("model_conf"), DLDModel)
    return config


def student_config(
    recipe: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the recipe's training config with the architecture of a trained model.

    What is drawn, exits and the reference are up to the system that is merged over it.
    """
    config = converted(config)
    student = {k: v for k, v in recipe.items() if k not in ARCHITECTURE.split()}
    student |= {k: config[k] for k in ARCHITECTURE.split() if k in config}
    encoder_conf = student["encoder_conf"]
    model_conf = student["model_conf"]
    del encoder_conf["depth_sampler"]
    if encoder_conf.pop("interctc_layer_idx", None):
        logging.info("Without the intermediate CTC that it was trained with")
    for name in ("interctc_weight", "aux_ctc"):  # exits take their place
        model_conf.pop(name, None)
    # what is measured while it trains depends on what is installed here
    given = recipe.get("model_conf") or {}
    student["model_conf"] = model_conf | {
        name: value for name, value in given.items() if name.startswith("report_")
    }
    # other implementations of CTC's loss have no losses of exits, and the same weights
    student["ctc_conf"] = {**(student.get("ctc_conf") or {}), "ctc_type": "builtin"}
    return student


def _without(options: Any, cls: type) -> dict[str, Any]:
    """Return `options` without those that `cls` adds to ESPnet's class."""
    own = inspect.signature(cls.__init__).parameters
    return {name: value for name, value in (options or {}).items() if name not in own}


def convert(model: str, recipe: Mapping[str, Any], outpath: Union[str, Path]) -> None:
    """Write an experiment directory with what a training needs to start from `model`.

    Args:
        model: see `opened`.
        recipe: training config: the optimiser, batches and epochs.
        outpath: the checkpoint. Beside it come config.yaml, with an ld_* encoder, the
            files that it names, and student.yaml, the recipe's config with the
            architecture, the tokens and the normalisation of the model.

    Raises:
        UserError: when there is no such model, or it does not fit.
    """
    outpath = Path(outpath)
    directory = outpath.parent
    with opened(model) as (config, checkpoint):
        refuse_unfit(model, config)
        files = {"model": checkpoint, **named_files(config)}
        options = dict(config=without_files(config), recipe=recipe)
        with Step(directory, files, keep=True, name=outpath.name, **options) as step:
            if step.done:
                return
            ours = argparse.Namespace(**converted(config))
            ours.output_dir = str(directory)
            copy_files(ours)
            tokens = directory / BARE_NAMES["token_list"]
            if isinstance(ours.token_list, (list, tuple)):
                with atomic(tokens) as part:
                    part.write_text("\n".join(ours.token_list) + "\n", encoding="utf-8")
                ours.token_list = tokens.name
            with atomic(outpath) as part:
                shutil.copyfile(checkpoint, part)
            _write(directory / "config.yaml", vars(ours))
            load_asr_model(outpath)  # refuses weights that do not fit
            student = student_config(recipe, vars(ours))
            for key, path in named_files(student).items():
                set_file(student, key, str(directory / path))
            _write(directory / STUDENT, student)


def _write(path: Path, config: Mapping[str, Any]) -> None:
    with atomic(path) as part:
        text = yaml.safe_dump(dict(config), allow_unicode=True, sort_keys=False)
        part.write_text(text, encoding="utf-8")
