"""ESPnet's ASR model, trained at several depths and pulled to a reference by KL."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Optional, Union

import torch
import torch.nn.functional as F
from espnet2.asr.espnet_model import ESPnetASRModel
from espnet2.torch_utils.device_funcs import force_gatherable

from dldkit.asr.exits import ExitHeads, ExitWeights
from dldkit.asr.hf_encoder import cnn_computed_once
from dldkit.asr.losses import CTCPosteriorKL, Pull
from dldkit.asr.posteriors import Posteriors
from dldkit.asr.reference import Reference, open_reference
from dldkit.depth.statistics import running_statistics_kept
from dldkit.errors import UserError
from dldkit.random_state import repeated_draws
from dldkit.signature import checked_options, merged_signature

SELF = "self"  # the reference of a model that is its own


@dataclass
class Pass:
    """One forward through the encoder: what is asked of it, and what it gave.

    Attributes:
        layers: those that run; None = those that the encoder chose.
        collect: smaller depths whose outputs are wanted as well.
        outputs: of these depths (Batch, Time, Dim), the shallowest first.
        log_probs: CTC's, of the outputs and the end (Exits, Batch, Time, Vocab).
        lengths: valid frames (Batch,).
        weights: of the exits, with the sum 1 (Exits,).
        losses: CTC's, of the exits (Exits,).
    """

    layers: Optional[tuple[int, ...]] = None
    collect: tuple[int, ...] = ()
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)
    log_probs: Optional[torch.Tensor] = None
    lengths: Optional[torch.Tensor] = None
    weights: Optional[torch.Tensor] = None
    losses: Optional[torch.Tensor] = None


class DLDModel(ESPnetASRModel):
    """CTC(student) + kd_weight x KL(reference‖student) (DLD, arXiv 2601.16117).

    With an encoder that has `exits`, both terms are means over the depth that a step
    runs and the exits below it (early exit: arXiv 2309.09546).

    Every option of ESPnetASRModel, plus:

    Args:
        kd_weight: weight of the KL term.
        kd_temperature: see `CTCPosteriorKL`.
        kd_direction: see `CTCPosteriorKL`.
        kd_reduction: see `CTCPosteriorKL`.
        kd_blank: see `CTCPosteriorKL`.
        reference: a trained ESPnet experiment directory, one of its checkpoints, a
            packed zip, or a directory of cached posteriors; `self` = the full depth in
            the same step; None = no KL term.
        exit_weights: how much each exit counts, see `ExitWeights`.
        exit_gradient: share of the gradient from deeper layers that an exit hands down
            to those below it, from 0 to 1 (1908.06294 weighs these gradients, too).
            Below 1, the layers up to an exit are rather its own.
        shared_head: one CTC output layer for all exits, or one for each.
        sandwich: drawn depths that a step runs beside the full one and the smallest one
            (arXiv 1903.05134); None = one drawn depth alone. With `reference: self`
            and a depth that is drawn, the default is 1.
        specaug_masks: of the forwards of one step: `shared` | `own`.
        valid_depths: depths at which validation computes CTC's loss; None = all layers
            and half of them, for an encoder that trains or exits at several depths.
            `loss_ctc_depth6` and so on are reported, and `loss_ctc_depths`, their mean,
            which best_model_criterion may name.

    Raises:
        UserError: when the options can not work together.
    """

    @checked_options
    def __init__(
        self,
        *args,
        kd_weight: float = 1.0,
        kd_temperature: float = 1.0,
        kd_direction: str = "forward",
        kd_reduction: str = "utterance",
        kd_blank: str = "keep",
        reference: Optional[str] = None,
        exit_weights: Union[str, Sequence[float]] = "equal",
        exit_gradient: float = 1.0,
        shared_head: bool = True,
        sandwich: Optional[int] = None,
        specaug_masks: str = "shared",
        valid_depths: Optional[Sequence[int]] = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.exits = tuple(getattr(self.encoder, "exits", ()))
        if not self.exits and (exit_weights != "equal" or not shared_head):
            raise UserError(
                "exit_weights and shared_head: false are for an encoder that has exits"
            )
        if kd_weight < 0:
            raise UserError(f"kd_weight {kd_weight} is impossible: write one from 0")
        self.exit_weights = ExitWeights(exit_weights, self.exits)
        self.exit_gradient = exit_gradient
        self.valid_layers = self._layers_to_validate(valid_depths)
        kl = CTCPosteriorKL(kd_temperature, kd_direction, kd_reduction, kd_blank)
        self.pulls = [Pull("ctc", kl, kd_weight)]
        self.reference_path = reference
        # No submodule on purpose: the reference stays out of the state dict, the
        # optimiser, averaging and the packed zip. It is opened at the first training
        # step, so inference, packing and collect_stats do without it.
        self._reference: Optional[Reference] = None
        # this encoder and the reference's, if their frozen CNNs are the same
        self._share_cnn: tuple[torch.nn.Module, ...] = ()
        self._pass: Optional[Pass] = None  # the one that runs
        if reference == SELF and sandwich is None and self._draws_depths():
            sandwich = 1
        self.sandwich = sandwich
        self.specaug_masks = specaug_masks
        self._refuse_what_does_not_fit()
        if self.exits and not shared_head:
            gates = self.encoder.gates
            self.ctc.ctc_lo = ExitHeads(self.ctc.ctc_lo, self.exits, gates)

    def _draws_depths(self) -> bool:
        return self._is_dynamic() and not self.encoder.gates.sampler.is_full

    def _is_dynamic(self) -> bool:
        return hasattr(self.encoder, "set_depth")

    def _refuse_what_does_not_fit(self) -> None:
        if self.specaug_masks not in ("shared", "own"):
            raise UserError(
                f"unknown specaug_masks {self.specaug_masks!r}: choose shared or own"
            )
        if self.sandwich is not None and (
            self.sandwich < 0 or not self._draws_depths()
        ):
            raise UserError(
                f"sandwich {self.sandwich}: write how many depths a step draws, from "
                "0, for an ld_* encoder whose depth_sampler is not full"
            )
        if not 0.0 <= self.exit_gradient <= 1.0 or (
            self.exit_gradient < 1.0 and not self.exits
        ):
            raise UserError(
                f"exit_gradient {self.exit_gradient}: write a share from 0 to 1, for "
                "an encoder that has exits"
            )
        if self.exits and (self.ctc is None or self.ctc.ctc_type != "builtin"):
            raise UserError("exits need ctc_weight above 0, and ctc_type: builtin")
        if self.exits and self.postencoder is not None:
            raise UserError("exits leave the postencoder out: remove one of them")
        if self.specaug_masks == "own" and (
            self.sandwich is None or self._collects_sandwich()
        ):
            raise UserError(
                "specaug_masks: own is for steps of several forwards: set sandwich, "
                "and layer_choice: random or even"
            )
        if self.specaug_masks == "own" and self.reference_path == SELF:
            self._refuse_time_warp()
        if self.reference_path is None:
            return
        if self.ctc is None:
            raise UserError(
                "distillation compares CTC posteriors: ctc_weight has to be above 0"
            )
        if self.reference_path == SELF:
            if not self.exits and not self._draws_depths():
                raise UserError(
                    "reference: self needs smaller depths to teach: set exits, or "
                    "another depth_sampler than full"
                )
        else:
            self._refuse_time_warp()

    def _refuse_time_warp(self) -> None:
        if getattr(self.specaug, "apply_time_warp", False):
            raise UserError(
                "SpecAug's time warp shifts the student's frames against the "
                "reference's: set specaug_conf apply_time_warp: false, or reference: "
                "null"
            )

    def _collects_sandwich(self) -> bool:
        """Whether the first layers give on the way to the full depth what is asked."""
        return (
            self.encoder.selector == "prefix"
            and self.encoder.gates.sampler.layer_choice == "prefix"
            and self.postencoder is None
            and self.ctc is not None
            and self.ctc.ctc_type == "builtin"
        )

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

        Of several forwards in a step, `depth` is the mean, and `layers_run` the sum.

        Args:
            speech: (Batch, Samples) or (Batch, Time, Dim).
            speech_lengths: (Batch,).
            text: (Batch, Length).
            text_lengths: (Batch,).
            posteriors: of a cached reference, as ESPnet read them (Batch, Time, ...).
            posteriors_lengths: (Batch,).
            kwargs: `utt_id`, a list, for messages.
        """
        references = {}
        batch = (speech, speech_lengths, text, text_lengths)
        results = []
        with ExitStack() as step:
            if self.reference_path not in (None, SELF):
                reference = self.open_reference()
                step.enter_context(cnn_computed_once(*self._share_cnn))
                references["ctc"] = reference(
                    speech,
                    speech_lengths,
                    posteriors=posteriors,
                    posteriors_lengths=posteriors_lengths,
                )
            passes = self._passes()
            step.enter_context(self._masks_of_step(len(passes)))
            for this in passes:
                # a sandwich's full depth is the one the running statistics are of
                others = (
                    running_statistics_kept(self.encoder) if results else nullcontext()
                )
                with others:
                    results.append(self._run(this, batch, references, **kwargs))
        losses, all_stats, weights = zip(*results)
        loss = sum(losses) / len(losses)
        stats = {**all_stats[0], "loss": loss.detach()}
        if "depth" in stats:
            stats["layers_run"] = sum(s["depth"] for s in all_stats)
        for name in {"depth", "loss_kd"} & stats.keys():
            stats[name] = sum(s[name] for s in all_stats) / len(all_stats)
        if not self.training:
            stats.update(self._losses_at_depths(passes[0], stats, *batch))
        return loss, force_gatherable(stats, loss.device), weights[0]

    def _passes(self) -> list[Pass]:
        """Return the forwards of a step, the deepest one first."""
        if not self.training:
            prefixes = {
                depth
                for depth, layers in self.valid_layers.items()
                if self.encoder.is_passed_by(layers, self.encoder.active_layers)
                and self.postencoder is None
            }
            return [Pass(collect=tuple(prefixes))]
        if self.sandwich is None:
            return [Pass(collect=self.exits)]
        gates = self.encoder.gates
        full, *smaller = gates.sandwich_of_step(self.sandwich)
        if self._collects_sandwich():
            depths = {*self.exits, *map(len, smaller)} - {len(full)}
            return [Pass(full, tuple(depths))]
        return [Pass(layers) for layers in (full, *smaller)]

    def _masks_of_step(self, number: int) -> AbstractContextManager[None]:
        masks = ExitStack()
        if number > 1 and self.specaug_masks == "shared":
            # transformers' encoders mask what their CNN gives
            for module in (self.specaug, getattr(self.encoder, "masking", None)):
                if module is not None:
                    masks.enter_context(repeated_draws(module))
        return masks

    def _run(
        self,
        this: Pass,
        batch: tuple[torch.Tensor, ...],
        references: dict[str, Posteriors],
        **kwargs,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """Return the loss, its parts and the batch size of one forward."""
        speech, *others = batch
        # ESPnet masks features in place, and the next forward needs them as they are
        features = speech.clone() if self.frontend is None else speech
        self._pass = this
        try:
            with self._running(this):
                loss, stats, weight = super().forward(features, *others, **kwargs)
        finally:
            self._pass = None
        if this.losses is not None:
            stats["loss_ctc"] = this.losses[-1].detach()
        if self._is_dynamic():
            layers = this.layers or self.encoder.active_layers
            stats["depth"] = torch.tensor(float(len(layers)))
        if self.reference_path == SELF and self.training and not references:
            log_probs = this.log_probs[-1].detach()
            references["ctc"] = Posteriors(log_probs, this.lengths)
        if references:
            self._refuse_other_frames(this, references["ctc"], kwargs.get("utt_id"))
            for pull in self.pulls:
                divergence = (
                    this.weights * pull({"ctc": this.log_probs}, references)
                ).sum()
                loss = loss + pull.weight * divergence
                stats["loss_kd"] = stats.get("loss_kd", 0.0) + divergence.detach()
        return loss, stats, weight

    def _running(self, this: Pass) -> AbstractContextManager[None]:
        if this.layers is None:
            return nullcontext()
        return self.encoder.running(this.layers)

    def _refuse_other_frames(self, this: Pass, found: Posteriors, utts) -> None:
        if not torch.equal(found.lengths, this.lengths.to(found.lengths)):
            raise UserError(
                f"the reference {self.reference_path} gives {found.lengths.tolist()} "
                f"frames where the student gives {this.lengths.tolist()} (utterances "
                f"{utts}); posteriors that were collected from other audio, or "
                "features, have to be collected again (stage 9)"
            )

    def encode(
        self, speech: torch.Tensor, speech_lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ESPnetASRModel.encode; `forward` keeps what smaller depths gave."""
        this = self._pass
        if this is None or not this.collect:
            return super().encode(speech, speech_lengths)
        gradient = self.exit_gradient
        with self.encoder.collected(this.collect, gradient) as this.outputs:
            return super().encode(speech, speech_lengths)

    def _calc_ctc_loss(self, encoder_out, encoder_out_lens, ys_pad, ys_pad_lens):
        """As ESPnetASRModel's; in training the mean over the exits and the end."""
        this = self._pass
        inputs = (encoder_out, encoder_out_lens, ys_pad, ys_pad_lens)
        if this is None or this.lengths is not None:
            return super()._calc_ctc_loss(*inputs)  # ESPnet's intermediate CTC
        this.lengths = encoder_out_lens
        outputs = this.outputs if self.training else {}
        if not outputs and not self.reference_path:
            return super()._calc_ctc_loss(*inputs)
        this.log_probs = self._log_probs(outputs, encoder_out)
        depths = [*outputs, len(self.encoder.active_layers) if outputs else 1]
        this.weights = self.exit_weights(depths).to(this.log_probs)
        if not self.training or self.ctc.ctc_type != "builtin":
            return super()._calc_ctc_loss(*inputs)
        this.losses = self._ctc_losses(this.log_probs, *inputs[1:])
        return (this.weights * this.losses).sum(), None

    def _log_probs(
        self, outputs: Mapping[int, torch.Tensor], encoder_out: torch.Tensor
    ) -> torch.Tensor:
        """Return CTC's log-posteriors of each exit (Exits, Batch, Time, Vocab)."""
        head = self.ctc.ctc_lo
        hidden = torch.stack([*outputs.values(), encoder_out])
        hidden = F.dropout(hidden, self.ctc.dropout_rate, self.training)
        if isinstance(head, ExitHeads):
            exits = [head.at(depth, x) for depth, x in zip(outputs, hidden)]
            logits = torch.stack([*exits, head(hidden[-1])])
        else:
            logits = head(hidden)
        return logits.float().log_softmax(-1)

    def _ctc_losses(
        self,
        log_probs: torch.Tensor,
        lengths: torch.Tensor,
        text: torch.Tensor,
        text_lengths: torch.Tensor,
    ) -> torch.Tensor:
        """Return CTC's loss of each exit (Exits,), all in one call."""
        number, batch_size = log_probs.shape[:2]
        losses = self.ctc.ctc_loss(
            log_probs.flatten(0, 1).transpose(0, 1),
            text.clamp(min=0).repeat(number, 1),
            lengths.repeat(number),
            text_lengths.repeat(number),
        )
        return losses.view(number, batch_size).mean(1)

    def _layers_to_validate(
        self, depths: Optional[Sequence[int]]
    ) -> dict[int, tuple[int, ...]]:
        """Return the layers of each depth that validation runs.

        Raises:
            UserError: for depths that the model does not have.
        """
        if not self._is_dynamic():
            if depths:
                raise UserError(
                    f"valid_depths {list(depths)}: {type(self.encoder).__name__} has "
                    "no run-time depth; remove it, or choose an ld_* encoder"
                )
            return {}
        number = len(self.encoder.gates)
        if depths is None:
            has_exits = self.encoder.selector == "prefix"
            half = max((d for d in self.exits if d <= number / 2), default=number // 2)
            depths = {number, half} if self._draws_depths() or has_exits else ()
            depths = sorted(set(depths) - {0}, reverse=True)
        if self.ctc is None:
            return {}
        for depth in depths:
            if not isinstance(depth, int):
                raise UserError(f"valid_depths: {depth!r} is no number of layers")
        return {depth: self.encoder.choose_layers(depth) for depth in depths}

    def _losses_at_depths(
        self,
        full: Pass,
        stats: Mapping[str, torch.Tensor],
        speech: torch.Tensor,
        speech_lengths: torch.Tensor,
        text: torch.Tensor,
        text_lengths: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Return CTC's loss at each depth of `valid_depths`, and their mean.

        Args:
            full: the forward of the full depth, and `stats` what it gave.
        """
        if not self.valid_layers or (
            len(self.encoder.active_layers) < len(self.encoder.gates)
        ):
            return {}  # a growing model has no other depths yet
        text = text[:, : text_lengths.max()]
        losses = {}
        for depth, layers in self.valid_layers.items():
            name = f"loss_ctc_depth{depth}"
            if depth == len(self.encoder.gates):
                losses[name] = stats["loss_ctc"]
                continue
            with self.encoder.running(layers):
                if depth in full.outputs:
                    encoded, lengths = full.outputs[depth], full.lengths
                else:
                    features = speech.clone() if self.frontend is None else speech
                    encoded, lengths = super().encode(features, speech_lengths)
                if isinstance(encoded, tuple):  # with intermediate outputs
                    encoded = encoded[0]
                losses[name] = self.ctc(encoded, lengths, text, text_lengths).detach()
        losses["loss_ctc_depths"] = sum(losses.values()) / len(losses)
        return losses

    def open_reference(self) -> Reference:
        """Open the reference at its first use.

        Raises:
            UserError: when it can not be loaded, or does not fit this model.
        """
        if self._reference is None:
            self._reference = open_reference(self.reference_path, self)
            theirs = getattr(self._reference, "model", None)
            shares = getattr(self.encoder, "shares_cnn_with", None)
            if theirs is not None and shares is not None and shares(theirs.encoder):
                self._share_cnn = (self.encoder, theirs.encoder)
        return self._reference


DLDModel.__signature__ = merged_signature(DLDModel)
