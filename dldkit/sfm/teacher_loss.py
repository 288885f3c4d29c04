"""The loss that the teacher itself would have: less can not be learnt."""

import argparse
from typing import Optional

import torch
import yaml
from espnet2.torch_utils.device_funcs import to_device
from espnet2.train.distributed_utils import DistributedOption

from dldkit.config_files import resolved_config
from dldkit.errors import UserError
from dldkit.options import flat_layers
from dldkit.sfm.loss import HiddenStateLoss, trim
from dldkit.sfm.teacher.cached import CachedTeacher
from dldkit.sfm.teacher.opening import open_teacher
from dldkit.tasks.sfm import SFMDistillTask

ENOUGH = 32  # utterances


@torch.no_grad()
def teacher_loss(config: str, teacher: Optional[str] = None) -> dict[str, float]:
    """Compare a teacher, given what the student hears, with the targets of a training.

    It is 0 with a live teacher, and what rounding costs with cached targets. More means
    that the targets were computed from something that the student does not hear.

    Args:
        config: config.yaml of the training, of whose validation set some batches are
            taken: those that hold the first `ENOUGH` utterances.
        teacher: the model; None = the one that the training, or its cache, names.

    Returns:
        `loss` and its parts, as training reports them.

    Raises:
        UserError: `config` is none of a distillation.
    """
    with resolved_config(config) as file:
        args = argparse.Namespace(**yaml.safe_load(file.read_text(encoding="utf-8")))
    conf = getattr(args, "model_conf", None) or {}
    if not {"teacher", "teacher_layers"} <= set(conf):
        raise UserError(
            f"{config}: its model_conf names no teacher and teacher_layers: give the "
            "config.yaml of a training of dldkit.bin.sfm_distill_train"
        )
    layers = conf["teacher_layers"]
    targets = open_teacher(conf["teacher"], flat_layers(layers))
    if teacher is None and isinstance(targets, CachedTeacher):
        teacher = targets.made_by
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # float32, as the cached targets are
    live = open_teacher(teacher or conf["teacher"], flat_layers(layers), device)
    size = live.info.hidden_size
    distance = conf.get("loss", "mse")
    norm = conf.get("target_norm", "none")
    weight = conf.get("layer_weight", 0.5)
    loss = HiddenStateLoss(size, size, layers, weight, distance, norm)
    # what the teacher gives itself is normed as the targets are
    own_norm: torch.nn.Module = torch.nn.Identity()
    if norm == "layer":
        own_norm = torch.nn.LayerNorm(size, elementwise_affine=False)
    loss.output_projection = own_norm
    loss.layer_projections = torch.nn.ModuleList(own_norm for _ in layers)
    total, utterances = torch.zeros(1 + 1 + len(layers)), 0
    batches = SFMDistillTask.build_iter_factory(args, DistributedOption(), "valid")
    for utts, batch in batches.build_iter(1):
        batch = to_device(batch, device)
        heard = batch["speech"], batch["speech_lengths"], utts
        known = {}
        if isinstance(targets, CachedTeacher):
            known = {k: batch[k] for k in ("targets", "targets_lengths")}
        own, expected = live(*heard), targets(*heard, **known)
        own, expected, lengths = trim(*own, *expected)
        carried_by = range(1, len(layers) + 1)
        value, parts = loss([None, *loss.targets(own)], expected, lengths, carried_by)
        total += len(utts) * torch.stack([value, *parts.values()]).cpu()
        utterances += len(utts)
        if utterances >= ENOUGH:
            break
    return dict(zip(["loss", *parts], (total / utterances).tolist()))
