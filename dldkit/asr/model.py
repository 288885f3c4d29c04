"""ESPnet's ASR model, pulled to a frozen reference by KL on the CTC posteriors."""

from typing import Optional, Sequence

import torch
from espnet2.asr.espnet_model import ESPnetASRModel
from espnet2.torch_utils.device_funcs import force_gatherable

from dldkit.asr.losses import CTCPosteriorKL
from dldkit.asr.reference import Reference, open_reference
from dldkit.depth.sampler import FullSampler
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
        valid_depths: depths at which validation computes CTC's loss; None = all layers
            and half of them, for an encoder that trains or exits at several depths.
            `loss_ctc_depth6` and so on are reported, and `loss_ctc_depths`, their mean,
            which best_model_criterion may name.

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
        valid_depths: Optional[Sequence[int]] = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.valid_layers = self._layers_to_validate(valid_depths)
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
        posteriors: Optional[torch.Tensor] = None,
        posteriors_lengths: Optional[torch.Tensor] = None,
        **kwargs,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """Return the loss, its parts, and the batch size.

        Args:
            speech: (Batch, Samples) or (Batch, Time, Dim).
            speech_lengths: (Batch,).
            text: (Batch, Length).
            text_lengths: (Batch,).
            posteriors: of a cached reference, as ESPnet read them (Batch, Time, ...).
            posteriors_lengths: (Batch,).
            kwargs: `utt_id`, a list, for messages.
        """
        stored = dict(posteriors=posteriors, posteriors_lengths=posteriors_lengths)
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
            reference = self.open_reference()
            found = reference(speech, speech_lengths, **stored)
            if not torch.equal(found.lengths, lengths.to(found.lengths)):
                raise UserError(
                    f"the reference {reference.path} gives {found.lengths.tolist()} "
                    f"frames where the student gives {lengths.tolist()} (utterances "
                    f"{kwargs.get('utt_id')}); posteriors that were collected from "
                    "other audio, or features, have to be collected again (stage 9)"
                )
            loss_kd = self.kd_loss(self.ctc.ctc_lo(encoder_out), found)
            loss = loss + self.kd_weight * loss_kd
            new_stats["loss_kd"] = loss_kd.detach()
            new_stats["loss"] = loss.detach()
        if not self.training:
            batch = (speech, speech_lengths, text, text_lengths)
            new_stats.update(self._losses_at_depths(*batch))
        stats.update(force_gatherable(new_stats, loss.device))
        return loss, stats, weight

    def _layers_to_validate(
        self, depths: Optional[Sequence[int]]
    ) -> dict[int, tuple[int, ...]]:
        """Return the layers of each depth that validation runs.

        Raises:
            UserError: for depths that the model does not have.
        """
        if not hasattr(self.encoder, "set_depth"):
            if depths:
                raise UserError(
                    f"valid_depths {list(depths)}: {type(self.encoder).__name__} has "
                    "no run-time depth; remove it, or choose an ld_* encoder"
                )
            return {}
        gates = self.encoder.gates
        if depths is None:
            dynamic = not isinstance(gates.sampler, FullSampler)
            exits = self.encoder.selector == "prefix"
            depths = [len(gates), len(gates) // 2] if dynamic or exits else []
        if self.ctc is None:
            return {}
        for depth in depths:
            if not isinstance(depth, int):
                raise UserError(f"valid_depths: {depth!r} is no number of layers")
        return {depth: self.encoder.choose_layers(depth) for depth in depths}

    def _losses_at_depths(
        self,
        speech: torch.Tensor,
        speech_lengths: torch.Tensor,
        text: torch.Tensor,
        text_lengths: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Return CTC's loss at each depth of `valid_depths`, and their mean."""
        if not self.valid_layers or (
            len(self.encoder.active_layers) < len(self.encoder.gates)
        ):
            return {}  # a growing model has no other depths yet
        text = text[:, : text_lengths.max()]
        losses = {}
        for depth, layers in self.valid_layers.items():
            features = speech.clone() if self.frontend is None else speech
            with self.encoder.running(layers):
                encoded, lengths = super().encode(features, speech_lengths)
            if isinstance(encoded, tuple):  # with intermediate outputs
                encoded = encoded[0]
            loss = self.ctc(encoded, lengths, text, text_lengths)
            losses[f"loss_ctc_depth{depth}"] = loss.detach()
        losses["loss_ctc_depths"] = sum(losses.values()) / len(losses)
        return losses

    def open_reference(self) -> Reference:
        """Open the reference at its first use.

        Raises:
            UserError: when it can not be loaded, or does not fit this model.
        """
        if self._reference is None:
            self._reference = open_reference(self.reference_path, self)
        return self._reference


DLDModel.__signature__ = merged_signature(DLDModel)
