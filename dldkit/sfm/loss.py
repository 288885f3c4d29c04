"""How far the student's hidden states are from the teacher's."""

import math
from typing import Callable, Optional, Sequence, Union

import torch
import torch.nn.functional as F

from dldkit.depth.growth import last_copies
from dldkit.errors import UserError
from dldkit.options import flat_layers
from dldkit.sfm.wave import frame_mask


def carriers(depth: int, num_teacher_layers: int) -> list[int]:
    """Return which of the student's running layers carries which teacher layer.

    The teacher layers are spread evenly: of three, a student of 3, 6, 9 and 12 layers
    carries them on its layers (1, 2, 3), (2, 4, 6), (3, 6, 9) and (4, 8, 12). These are
    the last clones of each group of interleaved stacking that starts with 3 layers.

    Args:
        depth: number of running layers.

    Returns:
        Running layers, from 1, one for each teacher layer.
    """
    return [
        math.ceil(depth * (i + 1) / num_teacher_layers)
        for i in range(num_teacher_layers)
    ]


def carriers_of_copies(
    method: str, depths: Sequence[int], num_teacher_layers: int
) -> dict[int, list[int]]:
    """Return the carriers at each depth of a growing student, as its layers are copied.

    In the first stage they are those of `carriers`; later, the last copies of these.

    Args:
        method, depths: of stacking, see `dldkit.depth.growth`.
    """
    first = carriers(depths[0], num_teacher_layers)
    return {
        depth: [places[layer - 1] for layer in first]
        for depth, places in last_copies(method, depths).items()
    }


def mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error of each frame.

    Args:
        student: projected to the teacher's size (Batch, Time, Dim).
        teacher: (Batch, Time, Dim).
    """
    return (student - teacher).square().mean(-1)


def l1_cosine(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return L1 - log sigmoid(cosine) of each frame (DistilHuBERT, arXiv 2110.01900).

    Args:
        student: projected to the teacher's size (Batch, Time, Dim).
        teacher: (Batch, Time, Dim).
    """
    distance = (student - teacher).abs().mean(-1)
    return distance - F.logsigmoid(F.cosine_similarity(student, teacher, dim=-1))


def frame_average(
    lengths: torch.Tensor, like: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that averages values (Batch, Time) over valid frames.

    Args:
        lengths: valid frames (Batch,).
        like: (Batch, Time, ...).
    """
    if int(lengths.min()) == like.size(1):
        return torch.mean
    count = int(lengths.sum())
    padding = ~frame_mask(lengths.to(like.device, non_blocking=True), like.size(1))
    return lambda values: values.masked_fill(padding, 0.0).sum() / count


DISTANCES = {"mse": mse, "l1_cosine": l1_cosine}


class HiddenStateLoss(torch.nn.Module):
    """Output term + layer_weight x layer-to-layer term (arXiv 2606.11766).

    The output term compares the student's output with the deepest of the targets, the
    layer term is the mean over all targets. A target is a teacher layer, or the mean of
    a group of them. Each comparison has a linear projection of its own, which is not
    part of the student.

    Args:
        student_size: dimension of the student's hidden states.
        teacher_size: dimension of the teacher's.
        teacher_layers: the teacher's layers, from 1, in ascending order; a list in it
            is a group, as in [[1, 2, 3], 4].
        layer_weight: weight of the layer-to-layer term.
        distance: `mse` | `l1_cosine`.
        target_norm: `none` | `layer`: bring each frame of the teacher to zero mean and
            unit variance, for teachers with dimensions far larger than the others.

    Raises:
        UserError: for an unknown distance or norm, or layers out of order.
    """

    def __init__(
        self,
        student_size: int,
        teacher_size: int,
        teacher_layers: Sequence[Union[int, Sequence[int]]],
        layer_weight: float = 0.5,
        distance: str = "mse",
        target_norm: str = "none",
    ):
        super().__init__()
        if distance not in DISTANCES:
            raise UserError(
                f"unknown loss {distance!r}: choose {' or '.join(DISTANCES)}"
            )
        if target_norm not in ("none", "layer"):
            raise UserError(
                f"unknown target_norm {target_norm!r}: choose none or layer"
            )
        self.groups = [flat_layers([group]) for group in teacher_layers]
        layers = flat_layers(teacher_layers)
        in_order = layers == sorted(set(layers)) and min(layers, default=0) >= 1
        if not in_order or not all(self.groups):
            raise UserError(
                f"teacher_layers {teacher_layers}: list layers from 1 up, or lists of "
                "them, whose means are learnt, all in ascending order"
            )
        self.distance = DISTANCES[distance]
        self.target_norm = target_norm
        self.teacher_layers = layers
        self.layer_weight = layer_weight
        self.output_projection = torch.nn.Linear(student_size, teacher_size)
        self.layer_projections = torch.nn.ModuleList(
            torch.nn.Linear(student_size, teacher_size) for _ in self.groups
        )

    def targets(self, teacher: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return each group's mean (Batch, Time, Dim).

        Args:
            teacher: hidden states (Batch, Time, Dim), one for each teacher layer.
        """
        states = iter(teacher)
        groups = [[next(states) for _ in group] for group in self.groups]
        return [torch.stack(g).mean(0) if len(g) > 1 else g[0] for g in groups]

    def forward(
        self,
        student: Sequence[torch.Tensor],
        teacher: Sequence[torch.Tensor],
        lengths: torch.Tensor,
        carried_by: Optional[Sequence[int]] = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss, averaged over valid frames, and its parts.

        Args:
            student: hidden states (Batch, Time, Dim): what enters the first running
                layer, and what comes out of each.
            teacher: hidden states (Batch, Time, Dim), one for each teacher layer.
            lengths: valid frames (Batch,), best on the CPU.
            carried_by: the student's running layer, from 1, for each target; None =
                `carriers`.
        """
        teacher = self.targets(teacher)
        if self.target_norm == "layer":
            teacher = [F.layer_norm(state, state.shape[-1:]) for state in teacher]
        average = frame_average(lengths, teacher[0])

        def compare(projection, state, target):
            return average(self.distance(projection(state), target))

        depth = len(student) - 1
        carried_by = carried_by or carriers(depth, len(teacher))
        output = compare(self.output_projection, student[-1], teacher[-1])
        layers = [
            compare(projection, student[layer], target)
            for projection, layer, target in zip(
                self.layer_projections, carried_by, teacher, strict=True
            )
        ]
        loss = output + self.layer_weight * sum(layers) / len(layers)
        stats = {"loss_output": output.detach()}
        for group, value in zip(self.groups, layers):
            name = "_".join(map(str, group))
            stats[f"loss_layer{name}"] = value.detach()
        return loss, stats


def trim(
    student: Sequence[torch.Tensor],
    student_lengths: torch.Tensor,
    teacher: Sequence[torch.Tensor],
    teacher_lengths: torch.Tensor,
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Cut two models' hidden states (Batch, Time, Dim) to the frames both have.

    Lengths are on the CPU. Front ends round differently at the end of the audio, which
    costs a frame.

    Raises:
        UserError: when they differ by more than one frame.
    """
    if (student_lengths - teacher_lengths).abs().max() > 1:
        raise UserError(
            f"the teacher gives {teacher_lengths.tolist()} frames where the student "
            f"gives {student_lengths.tolist()}: their frame rates differ. Set "
            "conv_stride and conv_kernel of student_conf for the teacher's frame rate "
            "(50 frames/s for HuBERT, WavLM, wav2vec2 and Whisper)"
        )
    lengths = torch.minimum(student_lengths, teacher_lengths)
    size = int(lengths.max())
    return [x[:, :size] for x in student], [x[:, :size] for x in teacher], lengths
