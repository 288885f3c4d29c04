"""Options of a distillation that are left to the teacher."""

import argparse
import logging
from pathlib import Path
from typing import Any

from espnet2.utils.get_default_kwargs import get_default_kwargs

from dldkit.errors import UserError
from dldkit.options import flat_layers
from dldkit.sfm.data import FEATURES
from dldkit.sfm.loss import carriers_of_copies
from dldkit.sfm.teacher.cached import is_cached
from dldkit.sfm.teacher.opening import teacher_info
from dldkit.sfm.teacher.protocol import TeacherInfo
from dldkit.train.stacking import Stacking


def named_teacher(model_conf: dict[str, Any], option: str = "teacher") -> str:
    """Return the teacher that an option names.

    Raises:
        UserError: they name none.
    """
    teacher = model_conf.get(option)
    if not teacher:
        raise UserError(
            "model_conf names no teacher: set it to a Hugging Face name or directory, "
            "an ESPnet SSL model, or a directory of cached targets"
        )
    return teacher


def refuse_own_cnn(model_conf: dict[str, Any]) -> None:
    """Refuse cached features for a student whose CNN is not the teacher's.

    Raises:
        UserError: saying what to set; also where none are cached.
    """
    stored = Path(named_teacher(model_conf), FEATURES, f"{FEATURES}.scp")
    if not stored.is_file():
        raise UserError(
            f"cached_features: true, but there is no {stored}: set model_conf teacher "
            "to what `sfm_collect_targets --features` wrote, or cached_features: false"
        )
    if model_conf.get("cnn_init") != "teacher" or not model_conf.get("freeze_cnn"):
        raise UserError(
            "cached_features: true needs a student with the teacher's CNN, as it is: "
            "set model_conf cnn_init: teacher and freeze_cnn: true, or "
            "cached_features: false"
        )


def refuse_with_shar(args: argparse.Namespace) -> None:
    """Refuse options that do not go with a streamed corpus.

    Raises:
        UserError: saying what to set.
    """
    of_bins = args.batch_type in ("length", "numel", "catbel", "catpow")
    what = ""
    if args.num_iters_per_epoch is None:
        what = "its length is not known: set num_iters_per_epoch"
    elif is_cached(named_teacher(args.model_conf)) or args.cached_features:
        what = (
            "targets are cached for data with a wav.scp: set model_conf teacher to the "
            "teacher itself, which runs beside the student, and cached_features: false"
        )
    elif args.train_data_path_and_name_and_type:
        what = (
            f"there is {args.train_data_path_and_name_and_type[0][0]} too: leave "
            "train_data_path_and_name_and_type out, or train_shar"
        )
    elif args.collect_stats:
        what = (
            "it needs no statistics, and as valid_shape_file, utt2num_samples of the "
            "validation data will do"
        )
    elif args.multiple_iterator or args.iterator_type != "sequence" or of_bins:
        what = (
            "its batches have batch_size utterances of similar length: set batch_type: "
            "sorted, iterator_type: sequence and multiple_iterator: false"
        )
    if what:
        raise UserError(f"train_shar {args.train_shar}: {what}")


def refuse_wasteful_crops(args: argparse.Namespace) -> None:
    """Refuse to cut batches to their shortest utterance where that may be any one.

    Raises:
        UserError: saying what to set.
    """
    crop = args.collate_fn_conf.get("crop", True)
    if crop and args.iterator_type != "sequence":
        raise UserError(
            f"iterator_type: {args.iterator_type} puts utterances of any length into a "
            "batch, and collate_fn_conf crop: true would cut all to the shortest one: "
            "set crop: false, which pads them, or iterator_type: sequence"
        )


def usual_layers(info: TeacherInfo) -> list[int]:
    """Return the layers that are learnt: all cached ones, or thirds of the depth."""
    cached = [layer for layer in info.layers or () if layer > 0]  # 0 is the input
    return cached or sorted({-(-info.num_layers * i // 3) for i in (1, 2, 3)})


def complete(model_conf: dict[str, Any]) -> dict[str, Any]:
    """Return the options with those filled in that the teachers decide."""
    completed = _completed(model_conf, "teacher", "teacher")
    if model_conf.get("second_teacher"):
        completed = _completed(completed, "second_teacher", "second")
    return completed


def _completed(model_conf: dict[str, Any], option: str, prefix: str) -> dict[str, Any]:
    """Fill in what the teacher that `option` names decides; what is given stays."""
    needed = f"{prefix}_layers", f"{prefix}_size", "normalize", "sampling_rate"
    if all(model_conf.get(name) is not None for name in needed):
        return model_conf
    teacher = named_teacher(model_conf, option)
    info = teacher_info(teacher)
    known = usual_layers(info), info.hidden_size, info.normalize, info.sampling_rate
    found = dict(zip(needed, known))
    given = {k: v for k, v in model_conf.items() if v is not None}
    completed = {**model_conf, **found, **given}
    layers = completed[needed[0]]
    logging.info(f"layers {layers} of {info.num_layers} of the teacher {teacher}")
    deepest = max(flat_layers(layers), default=info.num_layers)
    if deepest < info.num_layers:
        logging.warning(
            f"{needed[0]} {layers}: the teacher {teacher} has "
            f"{info.num_layers} layers, of which those above {deepest} are not learnt; "
            f"leave {needed[0]} out to learn its output"
        )
    return completed


def refuse_unfit_second(model_conf: dict[str, Any], cached_features: bool) -> None:
    """Refuse a second teacher that can not hear what the first one does.

    Raises:
        UserError: saying what does not fit.
    """
    second = model_conf.get("second_teacher")
    if not second:
        return
    info, first = teacher_info(second), teacher_info(named_teacher(model_conf))
    if info.layers is not None:
        raise UserError(
            f"second_teacher {second} is a directory of cached targets: only the "
            "first teacher can be cached; name the model"
        )
    if info.sampling_rate != first.sampling_rate:
        raise UserError(
            f"second_teacher {second} takes {info.sampling_rate} Hz, but the first "
            f"teacher {first.sampling_rate} Hz: choose one of that rate"
        )
    if cached_features:
        raise UserError(
            f"second_teacher {second} hears the audio, which cached_features: true "
            "does not read: set it to false, or leave second_teacher out"
        )


def follow_copies(
    model_conf: dict[str, Any], trainer: str, trainer_conf: dict[str, Any]
) -> dict[str, Any]:
    """Return the options with `student_layers` of `carried_by: copies` filled in.

    A student that does not grow has no copies: its layers carry by position.

    Args:
        model_conf: of `complete`.
        trainer, trainer_conf: of the training, which say how the student grows.
    """
    given = model_conf.get("student_layers") or {}
    if model_conf.get("carried_by") != "copies" or trainer != "stacking":
        return model_conf
    growth = get_default_kwargs(Stacking) | trainer_conf
    layers = carriers_of_copies(
        growth["method"], growth["depths"], len(model_conf["teacher_layers"])
    )
    logging.info(f"the student's layers that carry the teacher's, by depth: {layers}")
    return {**model_conf, "student_layers": {**layers, **given}}


def refuse_lost_layers(
    model_conf: dict[str, Any], trainer: str, trainer_conf: dict[str, Any]
) -> None:
    """Refuse `layer_init` for layers that growth makes of others.

    Raises:
        UserError: saying how many layers there are at first.
    """
    layers = model_conf.get("layer_init") or ()
    depths = (get_default_kwargs(Stacking) | trainer_conf).get("depths")
    if trainer == "stacking" and layers and len(layers) > depths[0]:
        raise UserError(
            f"model_conf layer_init {list(layers)}: the student begins with "
            f"{depths[0]} layers (trainer_conf depths), and later ones are copies of "
            f"them: list {depths[0]} at most"
        )
