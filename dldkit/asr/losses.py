"""What pulls a student's exits to its reference: divergences between posteriors."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dldkit.asr.posteriors import Posteriors
from dldkit.errors import UserError

BLANK = 0  # ESPnet's index of CTC's blank


@dataclass
class Pull:
    """One term of the loss: some posteriors of the exits, pulled to the reference's.

    Args:
        posteriors: which ones, of those that student and reference have: `ctc`.
        divergence: takes the student's (Exits, Batch, Time, Vocab) and the reference's
            `Posteriors`, and returns (Exits,).
        weight: of this term in the loss.
    """

    posteriors: str
    divergence: torch.nn.Module
    weight: float

    def __call__(
        self,
        students: Mapping[str, torch.Tensor],
        references: Mapping[str, Posteriors],
    ) -> torch.Tensor:
        """Return the divergence of each exit (Exits,)."""
        return self.divergence(students[self.posteriors], references[self.posteriors])


class CTCPosteriorKL(torch.nn.Module):
    """KL divergence between the CTC posteriors of reference and student.

    Args:
        temperature: both distributions are softened by it; the loss is scaled by its
            square, which keeps the size of its gradient.
        direction: `forward` = KL(reference‖student) | `reverse` = KL(student‖reference)
            | `symmetric` = their mean.
        reduction: `utterance` = sum over frames, mean over the batch, the scale of
            ESPnet's CTC loss | `frame` = mean over frames.
        blank: frames that the reference takes for blank, nearly all of them: `keep` |
            `drop` = those where blank is the likeliest token | `scale` = each frame
            counts by the probability that it is none.

    Raises:
        UserError: for an option out of its range.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        direction: str = "forward",
        reduction: str = "utterance",
        blank: str = "keep",
    ):
        super().__init__()
        if temperature <= 0:
            raise UserError(
                f"kd_temperature {temperature} is impossible: it is above 0"
            )
        for name, value, choices in (
            ("direction", direction, ("forward", "reverse", "symmetric")),
            ("reduction", reduction, ("utterance", "frame")),
            ("blank", blank, ("keep", "drop", "scale")),
        ):
            if value not in choices:
                raise UserError(
                    f"unknown kd_{name} {value!r}: choose {', '.join(choices[:-1])} or "
                    f"{choices[-1]}"
                )
        self.temperature = temperature
        self.direction = direction
        self.reduction = reduction
        self.blank = blank

    def forward(self, log_probs: torch.Tensor, reference: Posteriors) -> torch.Tensor:
        """Return the loss of the student's log-posteriors.

        Args:
            log_probs: (Batch, Time, Vocab), or those of several exits
                (Exits, Batch, Time, Vocab).

        Returns:
            A scalar, or (Exits,).

        Raises:
            UserError: for a temperature with posteriors that are not complete.
        """
        if reference.tokens is not None and self.temperature != 1.0:
            raise UserError(
                "kd_temperature needs the reference's full posteriors: collect them "
                "without --top_k, or set kd_temperature: 1.0"
            )
        # in float32, also under autocast: logarithms of small probabilities
        student, teacher = log_probs.float(), reference.log_probs.float()
        if reference.tokens is not None:
            tokens = reference.tokens.expand(*student.shape[:-1], -1)
            student = _with_rest_bin(student, tokens)
        elif self.temperature != 1.0:
            student = (student / self.temperature).log_softmax(-1)
            teacher = (teacher / self.temperature).log_softmax(-1)
        weight = self._weight_of_frames(reference)
        # what stands in the padding may be anything
        teacher = teacher.masked_fill(weight[..., None] == 0, 0.0)
        divergence = self._divergence(teacher.expand_as(student), student)
        per_frame = (divergence * self.temperature**2).masked_fill(weight == 0, 0.0)
        total = (per_frame * weight).sum((-2, -1))
        if self.reduction == "utterance":
            return total / reference.lengths.numel()
        # without a frame that counts, total is 0 as well
        return total / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)

    def _weight_of_frames(self, reference: Posteriors) -> torch.Tensor:
        """Return how much each frame counts (Batch, Time)."""
        teacher = reference.log_probs.float()
        frames = torch.arange(teacher.size(1), device=teacher.device)
        weight = (frames < reference.lengths.to(teacher.device)[:, None]).float()
        if self.blank == "keep":
            return weight
        if reference.tokens is None:
            blank = teacher[..., BLANK]
        else:
            teacher = teacher[..., :-1]  # the last bin is of all other tokens
            is_blank = reference.tokens == BLANK
            blank = teacher.masked_fill(~is_blank, float("-inf")).amax(-1)
        if self.blank == "scale":
            return weight * -torch.expm1(blank)
        return weight * (blank < teacher.amax(-1))

    def _divergence(self, teacher, student):
        forward = _kl(teacher, student)
        if self.direction == "forward":
            return forward
        reverse = _kl(student, teacher)
        return reverse if self.direction == "reverse" else (forward + reverse) / 2


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p‖q) of log-probabilities over the last dimension; 0 log 0 is 0."""
    # not with probabilities as target: where one is 0, its gradient would be NaN, and
    # in the reverse direction the target is the student
    divergence = F.kl_div(q, p, reduction="none", log_target=True)
    return divergence.masked_fill(p.isneginf(), 0.0).sum(-1)


def _with_rest_bin(log_probs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Keep `tokens` of the vocabulary and add up all others in a last bin."""
    kept = log_probs.gather(-1, tokens)
    others = log_probs.scatter(-1, tokens, float("-inf"))
    return torch.cat([kept, others.logsumexp(-1, keepdim=True)], -1)
