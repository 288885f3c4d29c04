"""What differs between the speech encoders of Hugging Face transformers.

Each family is read, built, fed and run in its own way; `dldkit.asr.hf_encoder` does the
rest. transformers' own forwards are not used: Whisper's takes 30 s or nothing, and the
others build their attention mask once, so no utterance could leave the batch. Their
LayerDrop is in those forwards, and so it is off.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Optional

import torch
import torch.nn.functional as F
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from dldkit.asr.hf_encoder import RATE, TooLongUttError
from dldkit.depth.layers import GatedModuleList
from dldkit.depth.sampler import DepthSampler
from dldkit.errors import UserError
from dldkit.sfm.pretrained import (
    expected_speech,
    load_pretrained,
    load_whisper_encoder,
)
from dldkit.sfm.wave import (
    cnn_features,
    frame_lengths,
    frame_mask,
    log_mel,
    normalize_speech,
    projected_features,
)

WAVE_ENCODERS = ("wavlm", "hubert", "wav2vec2", "data2vec-audio")
# Of config.json: where it came from, and in which precision it was stored.
NOT_SAVED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


@dataclass(frozen=True)
class Flow:
    """What goes from layer to layer.

    Attributes:
        hidden: (Batch, Time, Dim).
        lengths: valid frames (Batch,).
        frames: how many of the frames are the output's.
        mask: of the attention, as the family's layers take it; None = no padding.
        bias: of the attention, by relative position (Batch x Heads, Time, Time).
        shares: of what enters the first layer and of each layer's output in the
            weighted sum (Layers + 1,); None = the last layer's output alone.
        mixed: the weighted sum so far (Batch, Time, Dim).
        share: the sum of the shares in it.
    """

    hidden: torch.Tensor
    lengths: torch.Tensor
    frames: int
    mask: Optional[torch.Tensor] = None
    bias: Optional[torch.Tensor] = None
    shares: Optional[torch.Tensor] = None
    mixed: Optional[torch.Tensor] = None
    share: Optional[torch.Tensor] = None

    def weighted(self, shares: torch.Tensor) -> "Flow":
        """Begin a weighted sum."""
        mixed = shares[0] * self.hidden
        return replace(self, shares=shares, mixed=mixed, share=shares[0])

    def after(self, slot: int, hidden: torch.Tensor) -> "Flow":
        """Return what goes on when a layer gave `hidden`."""
        if self.shares is None:
            return replace(self, hidden=hidden)
        share = self.shares[slot + 1]
        return replace(
            self,
            hidden=hidden,
            mixed=self.mixed + share * hidden,
            share=self.share + share,
        )

    @property
    def result(self) -> torch.Tensor:
        """The last layer's output, or the mean of those that ran, by their shares."""
        return self.hidden if self.shares is None else self.mixed / self.share

    def kept(self, stays: torch.Tensor) -> "Flow":
        """Return what is there of the utterances (Batch,) that stay."""
        of_utterances = {
            name: getattr(self, name)[stays]
            for name in ("hidden", "lengths", "mask", "mixed")
            if getattr(self, name) is not None
        }
        return replace(self, **of_utterances)

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Flow":
        """Return the same with other hidden states (Batch, Time, Dim)."""
        mixed = None if self.mixed is None else change(self.mixed)
        return replace(self, hidden=change(self.hidden), mixed=mixed)


class HFLayers(GatedModuleList):
    """transformers' layers, which here take and give a `Flow`."""

    def called(self, slot: int, layer: torch.nn.Module) -> Callable[[Flow], Flow]:
        return partial(self.run, slot, layer)

    def run(self, slot: int, layer: torch.nn.Module, flow: Flow) -> Flow:
        """Run a layer."""
        return flow.after(slot, layer(flow.hidden, attention_mask=flow.mask))

    def pass_through(self, layer: torch.nn.Module) -> Callable[[Flow], Flow]:
        """Return what runs in place of a layer: nothing."""
        return lambda flow: flow


class WavLMLayers(HFLayers):
    """WavLM's layers, of which the first owns the position bias of them all."""

    def run(self, slot: int, layer: torch.nn.Module, flow: Flow) -> Flow:
        """Run a layer."""
        # alike for all utterances: those that are left take the first ones
        bias = flow.bias[: len(flow.hidden) * layer.attention.num_heads]
        hidden, _ = layer(
            flow.hidden, attention_mask=flow.mask, position_bias=bias, index=slot
        )
        return flow.after(slot, hidden)

    def position_bias(self, batch: int, frames: int) -> torch.Tensor:
        """Return the bias (Batch x Heads, Time, Time), whatever is skipped."""
        bias = self[0].attention.compute_bias(frames, frames)
        return bias.repeat(batch, 1, 1)

    def kept_parameters(self, layer: torch.nn.Module) -> list[torch.nn.Parameter]:
        """Return the position bias's parameters of the first layer, which owns them."""
        if layer is not self[0]:
            return []
        return list(layer.attention.rel_attn_embed.parameters())


class Masking(torch.nn.Module):
    """Masks spans of frames, as transformers' fine-tuning does: in training only.

    A module, so that the forwards of a step can share what is drawn.
    """

    def forward(
        self,
        mask: Callable[..., torch.Tensor],
        features: torch.Tensor,
        valid: torch.Tensor,
        span: int,
    ) -> torch.Tensor:
        """Return the features, masked by transformers' own function.

        Args:
            mask: takes the features and `attention_mask`.
            features: as `mask` takes them.
            valid: which frames are (Batch, Time).
            span: frames of a span; a shorter batch has no room for one, which
                transformers refuses.
        """
        if not self.training or valid.size(1) < span:
            return features
        return mask(features, attention_mask=valid)


class WaveFamily(torch.nn.Module):
    """WavLM, HuBERT, wav2vec2 and data2vec-audio: a CNN on waveforms.

    Args:
        config: of the model.
        normalize: bring speech to zero mean and unit variance.
    """

    layers_key = "num_hidden_layers"
    masks_input = False  # but what the CNN gives

    def __init__(self, config: PreTrainedConfig, normalize: bool):
        super().__init__()
        self.normalize = self.option = normalize
        self.masking = Masking()
        self.is_wavlm = config.model_type == "wavlm"
        # else the norm precedes the first layer
        self.ends_in_norm = getattr(config, "do_stable_layer_norm", False)
        self.mask_length = config.mask_time_length

    @staticmethod
    def load(model: str, config: PreTrainedConfig) -> PreTrainedModel:
        """Return the pretrained model."""
        return load_pretrained(transformers.AutoModel, model, "model", config=config)

    @staticmethod
    def build(config: PreTrainedConfig) -> PreTrainedModel:
        """Return the model with random weights."""
        return transformers.AutoModel.from_config(config, dtype=torch.float32)

    def gate(self, model: PreTrainedModel, sampler: DepthSampler) -> None:
        """Let the model's layers be switched off."""
        cls = WavLMLayers if self.is_wavlm else HFLayers
        model.encoder.layers = cls(model.encoder.layers, sampler)

    def cnn(self, model: PreTrainedModel) -> list[torch.nn.Module]:
        """Return the CNN front end."""
        return [model.feature_extractor]

    def final_norm(self, model: PreTrainedModel) -> Optional[torch.nn.Module]:
        """Return what follows the last layer."""
        return model.encoder.layer_norm if self.ends_in_norm else None

    def lengths(self, model: PreTrainedModel, samples: torch.Tensor) -> torch.Tensor:
        """Return how many frames (Batch,) so many samples have."""
        return frame_lengths(model, samples)

    def features(
        self, model: PreTrainedModel, speech: torch.Tensor, speech_lengths: torch.Tensor
    ) -> torch.Tensor:
        """Return the CNN's features (Batch, Time, Channels)."""
        if self.normalize:
            speech = normalize_speech(speech, speech_lengths)
        return cnn_features(model, speech)

    def enter(
        self, model: PreTrainedModel, features: torch.Tensor, lengths: torch.Tensor
    ) -> Flow:
        """Return what enters the first layer."""
        hidden = projected_features(model, features)
        frames = hidden.size(1)
        valid = frame_mask(lengths, frames)
        hidden = self.masking(
            model._mask_hidden_states, hidden, valid, self.mask_length
        )
        mask = bias = None
        if int(lengths.min()) < frames:
            hidden = hidden.masked_fill(~valid[..., None], 0.0)
            mask = valid
            if not self.is_wavlm:
                mask = create_bidirectional_mask(model.config, hidden, valid)
        encoder = model.encoder
        hidden = hidden + encoder.pos_conv_embed(hidden)
        if not self.ends_in_norm:
            hidden = encoder.layer_norm(hidden)
        if self.is_wavlm:
            bias = encoder.layers.position_bias(len(hidden), frames)
        return Flow(encoder.dropout(hidden), lengths, frames, mask, bias)


class WhisperFamily(torch.nn.Module):
    """Whisper's encoder: convolutions on log-mel features.

    A frame belongs to the speech when all of its 320 samples do.

    Args:
        config: of the model.
        pad: give the model 30 s, as it was trained, of which silence is the rest; else
            it gets the speech alone, and the first positions.
    """

    layers_key = "encoder_layers"
    masks_input = True

    def __init__(self, config: PreTrainedConfig, pad: bool):
        super().__init__()
        self.pad = self.option = pad
        self.masking = Masking()
        self.mask_length = config.mask_time_length
        # all Whisper models agree in it but for the number of mel bins
        self.mel = transformers.WhisperFeatureExtractor(config.num_mel_bins)
        self.frame = 2 * self.mel.hop_length
        self.longest = config.max_source_positions * self.frame

    @staticmethod
    def load(model: str, config: PreTrainedConfig) -> PreTrainedModel:
        """Return the pretrained encoder."""
        return load_whisper_encoder(model, "model", config)

    @staticmethod
    def build(config: PreTrainedConfig) -> PreTrainedModel:
        """Return the encoder with random weights."""
        return WhisperEncoder(config)

    def gate(self, model: PreTrainedModel, sampler: DepthSampler) -> None:
        """Let the model's layers be switched off."""
        model.layers = HFLayers(model.layers, sampler)
        # sines, which transformers keeps as they are, but forgets when it loads them
        model.embed_positions.requires_grad_(False)

    def cnn(self, model: PreTrainedModel) -> list[torch.nn.Module]:
        """Return the convolutions in front of the layers."""
        return [model.conv1, model.conv2]

    def final_norm(self, model: PreTrainedModel) -> torch.nn.Module:
        """Return what follows the last layer."""
        return model.layer_norm

    def lengths(self, model: PreTrainedModel, samples: torch.Tensor) -> torch.Tensor:
        """Return how many frames (Batch,) so many samples have.

        Raises:
            TooLongUttError: for speech that the model has no positions for.
        """
        if int(samples.max()) > self.longest:
            raise TooLongUttError(
                f"utterance number {int(samples.argmax())} of a batch has "
                f"{int(samples.max())} samples: Whisper takes at most {self.longest}. "
                "Of training and validation data, cut it, or leave it out (stage 4, "
                f"--max_wav_duration {self.longest / RATE:g})"
            )
        return samples // self.frame

    def features(
        self, model: PreTrainedModel, speech: torch.Tensor, speech_lengths: torch.Tensor
    ) -> torch.Tensor:
        """Return the convolutions' features (Batch, Time, Channels)."""
        lengths = speech_lengths // self.frame
        size = self.longest
        if not self.pad:
            # beyond the last window that speech falls into: what follows is silence
            size = min((int(lengths.max()) + 2) * self.frame, self.longest)
        mel = log_mel(self.mel, F.pad(speech, (0, size - speech.size(1))))
        valid = frame_mask(2 * lengths, mel.size(2))
        mel = self.masking(
            # of WhisperModel, which is not built; it reads `config` and `training`
            partial(transformers.WhisperModel._mask_input_features, model),
            mel,
            valid,
            self.mask_length,
        )
        if not self.pad:
            mel = mel[..., : 2 * int(lengths.max())]
            # one utterance alone ends there: a batch must give the same
            mel = mel.masked_fill(~valid[:, None, : mel.size(2)], 0.0)
        mel = mel.to(model.conv1.weight.dtype)
        hidden = F.gelu(model.conv2(F.gelu(model.conv1(mel))))
        return hidden.permute(0, 2, 1)

    def enter(
        self, model: PreTrainedModel, features: torch.Tensor, lengths: torch.Tensor
    ) -> Flow:
        """Return what enters the first layer."""
        frames = features.size(1)
        hidden = features + model.embed_positions.weight[:frames]
        hidden = F.dropout(hidden, model.dropout, self.training)
        mask = None
        if not self.pad and int(lengths.min()) < frames:
            valid = frame_mask(lengths, frames)
            mask = create_bidirectional_mask(model.config, hidden, valid)
        return Flow(hidden, lengths, int(lengths.max()), mask)


def describe(model: str) -> tuple[dict[str, Any], bool]:
    """Return the content of a model's config.json, and whether it normalises speech.

    Args:
        model: name on the Hub, or a directory.

    Raises:
        UserError: when there is no such model, or it is of another kind.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(
            f"encoder_conf model: {model} is no directory of a Hugging Face model, and "
            f"can not be had from the Hub ({error}). Check the name, or the network"
        ) from error
    rate, normalize = RATE, False
    if config.model_type in WAVE_ENCODERS:
        rate, normalize = expected_speech(model)
    elif config.model_type != "whisper":
        raise UserError(
            f"encoder_conf model: {model} is a {config.model_type} model: choose one "
            f"of {', '.join(WAVE_ENCODERS)} or whisper"
        )
    if rate != RATE:
        raise UserError(
            f"encoder_conf model: {model} takes speech of {rate} Hz: choose one that "
            f"takes {RATE} Hz"
        )
    plain = json.loads(config.to_json_string(use_diff=True))
    return {k: v for k, v in plain.items() if k not in NOT_SAVED}, normalize


def read_config(
    hf_config: Mapping[str, Any],
    num_blocks: Optional[int],
    apply_spec_augment: bool,
    mask_time_prob: Optional[float],
) -> PreTrainedConfig:
    """Return the config of transformers, with what `ld_hf` says.

    Raises:
        UserError: for a config or options that are impossible.
    """
    try:
        config = transformers.AutoConfig.for_model(**hf_config)
    except (TypeError, ValueError) as error:
        raise UserError(f"encoder_conf hf_config can not be used: {error}") from error
    config.add_adapter = False  # it would follow the output and lower its rate
    key = family_of(config).layers_key
    available = getattr(config, key)
    if num_blocks is not None and num_blocks > available:
        raise UserError(
            f"encoder_conf num_blocks {num_blocks}: the model has {available} layers; "
            f"choose 1 to {available}, or null for all"
        )
    setattr(config, key, num_blocks or available)
    config.apply_spec_augment = apply_spec_augment
    if not apply_spec_augment:  # else there would be an unused mask embedding
        config.mask_time_prob = config.mask_feature_prob = 0.0
    elif mask_time_prob is not None:
        config.mask_time_prob = mask_time_prob
    return config


def family_of(config: PreTrainedConfig) -> type:
    """Return the class of a config's family."""
    return WhisperFamily if config.model_type == "whisper" else WaveFamily
