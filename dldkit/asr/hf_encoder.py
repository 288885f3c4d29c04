"""Speech encoders of Hugging Face transformers, with run-time depth."""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional, Union

import torch
from espnet2.asr.encoder.abs_encoder import AbsEncoder
from espnet2.legacy.nets.pytorch_backend.transformer.subsampling import TooShortUttError

from dldkit.asr.encoder import ExitingEncoder
from dldkit.depth.layers import optimizer_steps
from dldkit.depth.sampler import DepthSampler
from dldkit.errors import UserError
from dldkit.hf_options import check_values, needs_transformers
from dldkit.options import sampling_rate
from dldkit.signature import checked_options

RATE = 16000


class TooLongUttError(UserError, TooShortUttError):
    """Speech that an encoder has no positions for.

    A training has to leave it out. In decoding it is like speech that is too short:
    ESPnet writes an empty hypothesis, and goes on.
    """


def _drop_count(encoder: torch.nn.Module, weights: dict, prefix: str, *_) -> None:
    """Leave out the count of a model that was frozen at first, which is no weight."""
    weights.pop(f"{prefix}steps_done", None)


class LDHuggingFaceEncoder(ExitingEncoder, AbsEncoder):
    """WavLM, HuBERT, wav2vec2, data2vec-audio or Whisper's encoder, of any depth.

    It takes waveforms of 16 kHz (`input_size: 1`, no specaug, no normalize), which it
    normalises as the checkpoint expects. The library's own LayerDrop is off. What is
    padding has no part in the attention; where the CNN has a GroupNorm, as in
    hubert-base and wav2vec2-base, padding enters that norm, as in transformers.

    Args:
        input_size: 1, as ESPnet calls speech that no frontend changed.
        model: name on the Hub, as microsoft/wavlm-base-plus, or a directory.
        freeze_cnn: keep the CNN front end as it is; of Whisper, the two convolutions.
        freeze_steps: optimiser steps in which all that is pretrained is kept.
        layer_weights: what the output is: `last` = the last layer that runs |
            `weighted_sum` = a learnt mean of what enters the first layer and of the
            layers that run. The model's final norm follows, if it has one.
        gradient_checkpointing: compute layers anew in the backward pass.
        apply_spec_augment: mask spans in training, as transformers' fine-tuning does.
        mask_time_prob: share of frames where a span begins, times its length; None =
            as the checkpoint says.
        whisper_pad: give Whisper 30 s, as it was trained, with silence after the
            speech. Else it gets the speech alone: 3,000 frames for a word are a waste.
        num_blocks: layers of the model to use, the first ones; None = all.
        depth_sampler: how many layers a training step runs, see `LayerDropEncoder`.
        keep_prob: see `LayerDropEncoder`.
        min_depth: see `LayerDropEncoder`.
        layer_choice: see `LayerDropEncoder`.
        exits: see `LayerDropEncoder`.
        hf_config: content of the model's config.json, which training writes into the
            experiment's config.yaml. The weights come from its checkpoint then, and
            `model` need not exist any more.
        normalize: bring speech to zero mean and unit variance; None = as the model
            expects, which training writes into config.yaml, too.

    Raises:
        UserError: for options out of range, or a model that can not be had or used.
    """

    @checked_options
    def __init__(
        self,
        input_size: Optional[int],
        model: str,
        freeze_cnn: bool = True,
        freeze_steps: int = 0,
        layer_weights: str = "last",
        gradient_checkpointing: bool = False,
        apply_spec_augment: bool = False,
        mask_time_prob: Optional[float] = None,
        whisper_pad: bool = False,
        num_blocks: Optional[int] = None,
        depth_sampler: Union[str, Mapping[int, float]] = "bernoulli",
        keep_prob: float = 0.5,
        min_depth: int = 1,
        layer_choice: str = "random",
        exits: Union[int, Sequence[int]] = (),
        hf_config: Optional[Mapping[str, Any]] = None,
        normalize: Optional[bool] = None,
    ):
        super().__init__()
        families = _families()
        if input_size != 1:
            raise UserError(
                f"encoder: ld_hf takes waveforms, not {input_size} features: set "
                "input_size: 1, which leaves the frontend out"
            )
        check_values(
            freeze_cnn=freeze_cnn,
            freeze_steps=freeze_steps,
            layer_weights=layer_weights,
            gradient_checkpointing=gradient_checkpointing,
            apply_spec_augment=apply_spec_augment,
            mask_time_prob=mask_time_prob,
            whisper_pad=whisper_pad,
            num_blocks=num_blocks,
            normalize=normalize,
        )
        self.is_pretrained = hf_config is None
        if self.is_pretrained:
            hf_config, expected = families.describe(model)
            normalize = expected if normalize is None else normalize
        config = families.read_config(
            hf_config, num_blocks, apply_spec_augment, mask_time_prob
        )
        family = families.family_of(config)
        is_whisper = family is families.WhisperFamily
        if whisper_pad and not is_whisper:
            raise UserError(
                f"whisper_pad: true, and {model} is a {config.model_type} model: "
                "remove it"
            )
        self.family = family(config, whisper_pad if is_whisper else bool(normalize))
        self.saved_options = {
            "num_blocks": getattr(config, family.layers_key),
            "hf_config": dict(hf_config),
            "normalize": bool(normalize),
        }
        self.source = (model, config)
        if self.is_pretrained:
            self.model = family.load(*self.source)
        else:
            self.model = family.build(config)
        if gradient_checkpointing:
            self.model.activation_checkpointing_enable()
        sampler = DepthSampler(depth_sampler, keep_prob, min_depth, layer_choice, exits)
        self.family.gate(self.model, sampler)
        self.follow_sampler()
        self.layer_logits = None
        if layer_weights == "weighted_sum":
            self.layer_logits = torch.nn.Parameter(torch.zeros(len(self.gates) + 1))
        self.freeze_cnn = freeze_cnn
        if freeze_cnn:
            for module in self.family.cnn(self.model):
                module.requires_grad_(False)
        self.freeze_steps = freeze_steps
        self._held: list[torch.nn.Parameter] = []  # those that thaw
        self._counted: Optional[int] = None  # steps of this process
        self._features: Optional[list[torch.Tensor]] = None  # of `cnn_computed_once`
        if freeze_steps:
            # Not an integer: ESPnet's averaging of checkpoints would add them up.
            self.register_buffer("steps_done", torch.zeros(()))
        else:
            self.register_load_state_dict_pre_hook(_drop_count)

    @property
    def masking(self) -> torch.nn.Module:
        """What masks the CNN's features in training."""
        return self.family.masking

    def output_size(self) -> int:
        """Return the dimension of the output."""
        return self.model.config.hidden_size

    def forward(
        self,
        xs_pad: torch.Tensor,
        ilens: torch.Tensor,
        prev_states: Optional[torch.Tensor] = None,
        ctc: Optional[torch.nn.Module] = None,
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Return the output (Batch, Time, Dim), and its valid frames (Batch,).

        Args:
            xs_pad: speech (Batch, Samples), padded with zeros.
            ilens: (Batch,).

        Raises:
            TooShortUttError: for an utterance without a frame.
            TooLongUttError: for speech that Whisper has no positions for.
        """
        if self.training and self.freeze_steps:
            self._freeze_or_thaw()
        speech = xs_pad[:, : int(ilens.max())]
        lengths = self.family.lengths(self.model, ilens)
        if int(lengths.min()) < 1:
            short = int(ilens.min())
            message = f"has {short} samples, which are too few for {self.source[0]}"
            raise TooShortUttError(message, short, 400)
        found = [] if self._features is None else self._features
        if not found:
            is_trained = not (self.freeze_cnn or self._held)
            with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained):
                found.append(self.family.features(self.model, speech, ilens))
        flow = self.family.enter(self.model, found[0], lengths)
        if self.layer_logits is not None:
            flow = flow.weighted(self.layer_logits.softmax(0))
        for layer in self.gates:
            flow = layer(flow)
        return self.output_of(flow), lengths, None

    def shares_cnn_with(self, other: torch.nn.Module) -> bool:
        """Say whether this frozen CNN and another encoder's give the same."""
        if not isinstance(other, LDHuggingFaceEncoder) or not self.freeze_cnn:
            return False
        if self.family.masks_input and self.model.config.apply_spec_augment:
            return False
        mine, theirs = (
            torch.nn.ModuleList(e.family.cnn(e.model)).state_dict()
            for e in (self, other)
        )
        return (
            self.saved_options["hf_config"] == other.saved_options["hf_config"]
            and self.family.option == other.family.option
            and all(torch.equal(mine[name], theirs[name]) for name in mine)
        )

    def output_of(self, output: Any) -> torch.Tensor:
        """Return the encoder's output, if `output` is what its last layer gave."""
        norm = self.family.final_norm(self.model)
        result = output.result if norm is None else norm(output.result)
        return result[:, : output.frames]

    def lengths_of(self, output: Any) -> torch.Tensor:
        """Return the valid frames (Batch,) of what a layer gave."""
        return output.lengths

    def kept_of(self, output: Any, stays: torch.Tensor) -> Any:
        """Return what a layer gave, for those utterances (Batch,) that stay."""
        return output.kept(stays)

    def changed(
        self, output: Any, change: Callable[[torch.Tensor], torch.Tensor]
    ) -> Any:
        """Return what a layer gave, with another hidden state (Batch, Time, Dim)."""
        return output.changed(change)

    def train(self, mode: bool = True) -> "LDHuggingFaceEncoder":
        """Switch to training, all but a frozen CNN."""
        super().train(mode)
        if self.freeze_cnn:
            for module in self.family.cnn(self.model):
                module.eval()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the state; the last step was done after the last forward."""
        self._count_steps()
        return super().state_dict(*args, **kwargs)

    def _count_steps(self) -> None:
        """Add the steps since the last call to those that a checkpoint holds."""
        if self._counted is not None:
            self.steps_done += optimizer_steps() - self._counted
            self._counted = optimizer_steps()

    def _freeze_or_thaw(self) -> None:
        """Hold the pretrained weights for the first steps, and let them go then."""
        if self._counted is None:  # the first forward of this process
            self._counted = optimizer_steps()
        self._count_steps()
        is_frozen = float(self.steps_done) < self.freeze_steps
        if is_frozen and not self._held:
            # by requires_grad at run time: torch's distributed training and the
            # optimiser have to know them from the beginning
            self._held = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in self._held:
            parameter.requires_grad_(not is_frozen)
        if not is_frozen:
            self._held = []

    def reload_pretrained_parameters(self) -> None:
        """Load the pretrained weights: ESPnet calls it where `init` drew others."""
        if self.is_pretrained:
            self.model.load_state_dict(self.family.load(*self.source).state_dict())

    @staticmethod
    def check_arguments(args: argparse.Namespace) -> None:
        """Refuse a config of ESPnet's that would change the waveforms.

        Raises:
            UserError: naming what to set.
        """
        rate = sampling_rate(str((args.frontend_conf or {}).get("fs", RATE)))
        if rate != RATE:
            raise UserError(
                f"encoder: ld_hf takes speech of {RATE} Hz, and fs is {rate}: set fs "
                "(--fs) to 16k, which resamples in stage 3"
            )
        parts = ["specaug", "preencoder"]
        if not getattr(args, "collect_stats", False):  # where none is used yet
            parts.append("normalize")
        for name in parts:
            if getattr(args, name, None) is not None:
                instead = {
                    "specaug": "for masks, set encoder_conf: apply_spec_augment: true",
                    "normalize": "in asr.sh, by --feats_normalize none",
                }.get(name, "the model has its own")
                raise UserError(
                    f"encoder: ld_hf takes waveforms as they are, and the config has "
                    f"{name}: {getattr(args, name)}: set {name}: null ({instead})"
                )


@contextmanager
def cnn_computed_once(*encoders: torch.nn.Module) -> Iterator[None]:
    """Let encoders that share their CNN, and hear the same speech, compute it once."""
    features: list[torch.Tensor] = []
    for encoder in encoders:
        encoder._features = features
    try:
        yield
    finally:
        for encoder in encoders:
            encoder._features = None


def weight_files(model: Union[str, Path]) -> list[Path]:
    """Return the files of a local model's weights; none on the Hub."""
    path = Path(model)
    return sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))


def _families():
    try:
        from dldkit.asr import hf_families
    except ImportError as error:  # it is missing, or too old
        raise needs_transformers("encoder: ld_hf", f" ({error})") from error
    return hf_families
