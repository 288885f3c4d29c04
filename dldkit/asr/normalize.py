"""ESPnet's normalisation of features, without its side effect.

ESPnet's classes write into the tensor that they are given. Where features are the input
of the model, that is the batch itself: whoever runs it through a second depth, or a
second model, would see it normalised twice.
"""

from typing import Optional

import torch
from espnet2.layers.global_mvn import GlobalMVN as InPlaceGlobalMVN
from espnet2.layers.utterance_mvn import UtteranceMVN as InPlaceUtteranceMVN


class GlobalMVN(InPlaceGlobalMVN):
    """Normalises by the mean and variance of the training data."""

    def forward(
        self, x: torch.Tensor, ilens: Optional[torch.Tensor] = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalise features (Batch, Time, Dim), which stay as they are."""
        return super().forward(x.clone(), ilens)


class UtteranceMVN(InPlaceUtteranceMVN):
    """Normalises by the mean and variance of each utterance."""

    def forward(
        self, x: torch.Tensor, ilens: Optional[torch.Tensor] = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalise features (Batch, Time, Dim), which stay as they are."""
        return super().forward(x.clone(), ilens)
