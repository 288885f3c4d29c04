"""A trained student as a plain Hugging Face directory, at any depth."""

import copy
import json
import logging
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Optional, Sequence, Union

import torch
from transformers import HubertModel, Wav2Vec2FeatureExtractor

from dldkit.asr.loading import check_weights, read_checkpoint
from dldkit.depth.selector import select_layers
from dldkit.errors import UserError
from dldkit.step import Lock
from dldkit.train.trainer import CHECKPOINT, pending

# In config.json: the slots that the layers were taken from. transformers keeps it, and
# it tells an export, which may be written anew, from other models, which may not.
_MARK = "student_layers"


def export(
    model_file: Union[str, Path],
    output_dir: Union[str, Path],
    config: Union[str, Path, None] = None,
    depth: Optional[int] = None,
    layers: Optional[Sequence[int]] = None,
    selector: Optional[str] = None,
) -> tuple[int, ...]:
    """Write a student trained with dldkit as a Hugging Face directory.

    Args:
        model_file: a checkpoint of `dldkit.bin.sfm_distill_train`.
        output_dir: holds config.json, model.safetensors and preprocessor_config.json
            afterwards; an earlier export in it is replaced.
        config: of the training; None = config.yaml beside the checkpoint.
        depth: number of layers; None = all.
        layers: the slots themselves, instead of a depth.
        selector: `even` or `prefix`, for a depth; None = as the training drew layers.

    Returns:
        The slots that were exported.

    Raises:
        UserError: for a checkpoint that does not fit its config, an impossible depth,
            layers that had not grown yet, or an `output_dir` that holds something else.
    """
    from dldkit.tasks.sfm import SFMDistillTask

    config = Path(config or Path(model_file).parent / "config.yaml")
    if not config.is_file():
        raise UserError(f"no {config}: name the training's config.yaml with --config")
    states = read_checkpoint(model_file)
    try:
        model, _ = SFMDistillTask.build_model_from_file(config, model_file)
    except RuntimeError as error:
        raise UserError(f"{model_file} does not fit {config}: {error}") from error
    check_weights(model, states, model_file)
    if unknown := sorted(set(states) - set(model.state_dict())):
        raise UserError(
            f"{model_file} has weights that the model lacks ({unknown[0]} ...): it "
            f"belongs to another config than {config}"
        )
    student = model.student
    slots = select_layers(
        student.config.num_hidden_layers, depth, layers, selector or model.selector
    )
    if why := student.encoder.layers.why_untrained(len(slots)):
        logging.warning(why)
    grown = _layers_so_far(Path(model_file))
    if grown is not None and max(slots) >= grown:
        raise UserError(
            f"{model_file}: the student had grown to {grown} layers then, and the "
            f"others are as they were drawn: export it with --depth {grown} "
            "--selector prefix, or export a later checkpoint"
        )
    export_student(student, model.normalize, slots, output_dir, model.sampling_rate)
    return slots


def _layers_so_far(model_file: Path) -> Optional[int]:
    """Return how deep a growing student was at the end of an epoch, if that is known.

    Best and averaged models are of the full depth (`FullDepthReporter`).
    """
    model_file = model_file.resolve()  # latest.pth is a link to the epoch's
    epoch = re.fullmatch(r"(\d+)epoch\.pth", model_file.name)
    if not epoch:
        return None
    resume = model_file.with_name(CHECKPOINT)
    # in this order, as the first becomes the second
    for file in (pending(resume), resume):
        with suppress(FileNotFoundError):
            states = torch.load(file, map_location="cpu", weights_only=True)
            stats = states["reporter"]["stats"].get(int(epoch[1]), {}).get("valid", {})
            if "stage" in stats:
                return round(float(stats["depth"]))
    return None


def export_student(
    student: HubertModel,
    normalize: bool,
    layers: Sequence[int],
    output_dir: Union[str, Path],
    sampling_rate: int = 16000,
) -> None:
    """Write the given slots of a student as a HubertModel of so many layers.

    The directory appears complete or not at all: a killed export leaves nothing that
    loads.

    Args:
        normalize: the student was trained on waveforms of zero mean and unit variance.
        sampling_rate: in Hz, of its training.

    Raises:
        UserError: when `output_dir` holds something else than an earlier export.
    """
    output_dir = Path(output_dir).resolve()
    _refuse_other_content(output_dir)
    plain = plain_hubert(student, layers)
    extractor = Wav2Vec2FeatureExtractor(
        sampling_rate=sampling_rate,
        do_normalize=normalize,
        # a CNN with GroupNorm was never trained with masks: padding enters its norm
        return_attention_mask=student.config.feat_extract_norm == "layer",
    )
    partial = output_dir.with_name(output_dir.name + ".partial")
    former = output_dir.with_name(output_dir.name + ".former")
    with Lock(output_dir.with_name(f".{output_dir.name}.lock")):
        for leftover in (partial, former):
            shutil.rmtree(leftover, ignore_errors=True)
        plain.save_pretrained(partial)
        extractor.save_pretrained(partial)
        if output_dir.exists():
            output_dir.replace(former)
        partial.replace(output_dir)
        shutil.rmtree(former, ignore_errors=True)


def plain_hubert(student: HubertModel, layers: Sequence[int]) -> HubertModel:
    """Return a HubertModel with copies of the student's weights at the given slots."""
    config = copy.deepcopy(student.config)
    config.update(
        {
            "num_hidden_layers": len(layers),
            # off, so that those who fine-tune it decide about them
            "layerdrop": 0.0,
            "apply_spec_augment": False,
            "mask_time_prob": 0.0,
            "mask_feature_prob": 0.0,
            _MARK: list(layers),
        }
    )
    prefix = "encoder.layers."
    position = {str(slot): i for i, slot in enumerate(layers)}
    states: dict[str, torch.Tensor] = {}
    for key, value in student.state_dict().items():
        if key.startswith(prefix):
            slot, name = key[len(prefix) :].split(".", 1)
            if slot in position:
                states[f"{prefix}{position[slot]}.{name}"] = value
        elif key != "masked_spec_embed":  # which a model without masking has not
            states[key] = value
    plain = HubertModel(config)
    plain.load_state_dict(states)
    return plain.eval()


def _refuse_other_content(output_dir: Path) -> None:
    if not output_dir.exists() or (
        output_dir.is_dir() and not any(output_dir.iterdir())
    ):
        return
    try:
        earlier = _MARK in json.loads((output_dir / "config.json").read_text())
    except (OSError, ValueError):
        earlier = False
    if not earlier:
        raise UserError(
            f"{output_dir} holds something else than an earlier export: name a "
            "directory for the export alone"
        )
