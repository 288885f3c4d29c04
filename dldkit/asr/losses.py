"""The distillation loss between CTC posteriors."""

import torch
import torch.nn.functional as F

from dldkit.asr.posteriors import Posteriors
from dldkit.errors import UserError


class CTCPosteriorKL(torch.nn.Module):
    """KL divergence between the CTC posteriors of reference and student.

    Args:
        temperature: both distributions are softened by it; the loss is scaled by its
            square, which keeps the size of its gradient.
        direction: `forward` = KL(reference‖student) | `reverse` = KL(student‖reference)
            | `symmetric` = their mean.
        reduction: `utterance` = sum over valid frames, mean over the batch, the scale
            of ESPnet's CTC loss | `frame` = mean over valid frames.

    Raises:
        UserError: for an option out of its range.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        direction: str = "forward",
        reduction: str = "utterance",
    ):
        super().__init__()
        if temperature <= 0:
            raise UserError(
                f"kd_temperature {temperature} is impossible: it is above 0"
            )
        if direction not in ("forward", "reverse", "symmetric"):
            raise UserError(
                f"unknown kd_direction {direction!r}: choose forward, reverse or "
                "symmetric"
            )
        if reduction not in ("utterance", "frame"):
            raise UserError(
                f"unknown kd_reduction {reduction!r}: choose utterance or frame"
            )
        self.temperature = temperature
        self.direction = direction
        self.reduction = reduction

    def forward(self, logits: torch.Tensor, reference: Posteriors) -> torch.Tensor:
        """Return the loss of the student's `logits` (Batch, Time, Vocab), a scalar.

        Raises:
            UserError: for a temperature with posteriors that are not complete.
        """
        if reference.tokens is not None and self.temperature != 1.0:
            raise UserError(
                "kd_temperature needs the reference's full posteriors: collect them "
                "without --top_k, or set kd_temperature: 1.0"
            )
        # in float32 whatever autocast does around: logarithms of small probabilities
        with torch.autocast(logits.device.type, enabled=False):
            student = (logits.float() / self.temperature).log_softmax(-1)
            teacher = reference.log_probs.float()
            if reference.tokens is not None:
                student = _with_rest_bin(student, reference.tokens)
            else:
                teacher = (teacher / self.temperature).log_softmax(-1)
            per_frame = self._divergence(teacher, student) * self.temperature**2
            frames = torch.arange(logits.size(1), device=logits.device)
            valid = frames < reference.lengths.to(logits.device)[:, None]
            total = per_frame.masked_fill(~valid, 0.0).sum()
        return total / (
            logits.size(0) if self.reduction == "utterance" else valid.sum()
        )

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
