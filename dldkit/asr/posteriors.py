"""CTC posteriors of a reference: in memory, and as they are stored."""

from dataclasses import dataclass
from typing import Optional

import numpy as np
import torch

from dldkit.errors import UserError


@dataclass
class Posteriors:
    """CTC log-posteriors of a reference, for a padded batch.

    Args:
        log_probs: (Batch, Time, Vocab), or (Batch, Time, K + 1) when just the K
            likeliest tokens were kept: the last bin then holds all other tokens.
        lengths: valid frames (Batch,).
        tokens: the K tokens of each frame (Batch, Time, K); None = all tokens.
    """

    log_probs: torch.Tensor
    lengths: torch.Tensor
    tokens: Optional[torch.Tensor] = None


def refuse_impossible_top_k(top_k: Optional[int], vocab_size: int) -> None:
    """Raise a UserError for a number of tokens that can not be kept."""
    if top_k is not None and not 0 < top_k < vocab_size:
        raise UserError(
            f"top_k {top_k} is impossible: the reference has {vocab_size} tokens"
        )
    if top_k is not None and vocab_size > 2**16:
        raise UserError(f"top_k needs at most {2**16} tokens, not {vocab_size}")


def pack(log_probs: torch.Tensor, top_k: Optional[int]) -> np.ndarray:
    """Turn log-posteriors (Time, Vocab) into the matrix that is stored.

    All of them as float16 (Time, Vocab); or, of the `top_k` likeliest tokens, their
    numbers and the bits of float16 side by side as int16 (Time, 2 * K).
    """
    if top_k is None:
        return log_probs.cpu().numpy().astype(np.float16)
    values, tokens = log_probs.topk(top_k, dim=-1)
    bits = values.cpu().numpy().astype(np.float16).view(np.int16)
    numbers = tokens.cpu().numpy().astype(np.uint16).view(np.int16)
    return np.concatenate([numbers, bits], axis=1)


def unpack(
    stored: torch.Tensor, lengths: torch.Tensor, top_k: Optional[int]
) -> Posteriors:
    """Turn a padded batch of stored matrices, as ESPnet reads them, into posteriors.

    Args:
        stored: float (Batch, Time, Vocab), or integers (Batch, Time, 2 * K).
        lengths: valid frames (Batch,).
    """
    if top_k is None:
        return Posteriors(stored, lengths)
    frames = torch.arange(stored.size(1), device=stored.device)
    padding = frames >= lengths[:, None]
    tokens, bits = stored.masked_fill(padding[..., None], 0).split(top_k, -1)
    log_probs = bits.to(torch.int16).view(torch.float16).float()
    kept = log_probs.exp().sum(-1, keepdim=True)
    rest = (1.0 - kept).clamp(min=1e-8).log()
    log_probs = torch.cat([log_probs, rest], -1).log_softmax(-1)
    return Posteriors(log_probs, lengths, tokens & 0xFFFF)
