"""ESPnet's ASR model, pulled to a frozen reference by KL on the CTC posteriors."""

from typing import Optional

import torch
from espnet2.asr.espnet_model import ESPnetASRModel
from espnet2.torch_utils.device_funcs import force_gatherable

from dldkit.asr.losses import CTCPosteriorKL
from dldkit.asr.reference import Reference, open_reference
from dldkit.errors import UserError
from dldkit.signature import merged_signature


class DLDModel(ESPnetASRModel):
    """CTC(student) + kd_weight x KL(reference‖student) (DLD, arXiv 2601.16117).

    Every option of ESPnetASRModel, plus:

    Args:
        kd_weight: weight of the KL term.
        kd_temperature: see `CTCPosteriorKL`.
        kd_direction: see `CTCPosteriorKL`.
        kd_reduction: see `CTCPosteriorKL`.
        reference: a trained ESPnet experiment directory, one of its checkpoints, a
            packed zip, or a directory of cached posteriors; None = no KL term.

    Raises:
        UserError: when the options can not work together.
    """

    def __init__(
        self,
        *args,
        kd_weight: float = 1.0,
        kd_temperature: float = 1.0,
        kd_direction: str = "forward",
        kd_reduction: str = "utterance",
        reference: Optional[str] = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.kd_weight = kd_weight
        self.kd_loss = CTCPosteriorKL(kd_temperature, kd_direction, kd_reduction)
        self.reference_path = reference
        # No submodule on purpose: the reference stays out of the state dict, the
        # optimiser, averaging and the packed zip. It is opened at the first training
        # step, so inference, packing and collect_stats do without it.
        self._reference: Optional[Reference] = None
        self._encoded = None
        if reference is not None:
            self._refuse_what_cannot_be_distilled()

    def _refuse_what_cannot_be_distilled(self) -> None:
        if self.ctc is None:
            raise UserError(
                "distillation compares CTC posteriors: ctc_weight has to be above 0"
            )
        if getattr(self.specaug, "apply_time_warp", False):
            raise UserError(
                "SpecAug's time warp shifts the student's frames against the "
                "reference's: set specaug_conf apply_time_warp: false, or reference: "
                "null"
            )

    def encode(
        self, speech: torch.Tensor, speech_lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ESPnetASRModel.encode; `forward` reads what it returned for the loss."""
        encoded = super().encode(speech, speech_lengths)
        if self.reference_path is not None:
            self._encoded = encoded
        return encoded

    def forward(
        self,
        speech: torch.Tensor,
        speech_lengths: torch.Tensor,
        text: torch.Tensor,
        text_lengths: torch.Tensor,
        **kwargs,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """Return the loss, its parts, and the batch size.

        Args:
            speech: (Batch, Samples) or (Batch, Time, Dim).
            speech_lengths: (Batch,).
            text: (Batch, Length).
            text_lengths: (Batch,).
            kwargs: `utt_id`, a list, finds cached posteriors.
        """
        # ESPnet normalises features in place, and the reference needs them as they are
        features = speech.clone() if self.frontend is None else speech
        loss, stats, weight = super().forward(
            features, speech_lengths, text, text_lengths, **kwargs
        )
        new_stats = {}
        if hasattr(self.encoder, "active_layers"):
            new_stats["depth"] = float(len(self.encoder.active_layers))
        if self.reference_path is not None:
            (encoder_out, lengths), self._encoded = self._encoded, None
            if isinstance(encoder_out, tuple):  # with intermediate outputs
                encoder_out = encoder_out[0]
            posteriors = self.open_reference()(
                speech, speech_lengths, lengths, kwargs.get("utt_id")
            )
            loss_kd = self.kd_loss(self.ctc.ctc_lo(encoder_out), posteriors)
            loss = loss + self.kd_weight * loss_kd
            new_stats["loss_kd"] = loss_kd.detach()
            new_stats["loss"] = loss.detach()
        stats.update(force_gatherable(new_stats, loss.device))
        return loss, stats, weight

    def open_reference(self) -> Reference:
        """Open the reference at its first use.

        Raises:
            UserError: when it can not be loaded, or does not fit this model.
        """
        if self._reference is None:
            self._reference = open_reference(self.reference_path, self)
        return self._reference


DLDModel.__signature__ = merged_signature(DLDModel)
