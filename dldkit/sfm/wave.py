"""The parts that HuBERT, WavLM and wav2vec2 of Hugging Face transformers share.

Lengths may lie on the CPU while the rest is on a GPU: what is decided by them then does
not wait for the GPU.
"""

from contextlib import contextmanager
from typing import Iterable, Iterator, Optional, Sequence

import torch
from transformers import PreTrainedModel, WhisperFeatureExtractor
from transformers.models.hubert.modeling_hubert import _compute_mask_indices


def normalize_speech(
    speech: torch.Tensor, speech_lengths: torch.Tensor
) -> torch.Tensor:
    """Bring each utterance to zero mean and unit variance, as feature extractors do.

    Args:
        speech: (Batch, Samples).
        speech_lengths: (Batch,).
    """
    speech_lengths = speech_lengths.to(speech.device, non_blocking=True)
    valid = frame_mask(speech_lengths, speech.size(1))
    count = speech_lengths[:, None]
    mean = (speech * valid).sum(1, keepdim=True) / count
    centred = (speech - mean) * valid
    variance = centred.square().sum(1, keepdim=True) / count
    return centred / (variance + 1e-7).sqrt()


def frame_mask(lengths: torch.Tensor, size: int) -> torch.Tensor:
    """Return which of `size` positions are valid: (Batch, size), bool."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def frame_lengths(model: PreTrainedModel, speech_lengths: torch.Tensor) -> torch.Tensor:
    """Return how many frames (Batch,) the model's CNN makes of so many samples."""
    return model._get_feat_extract_output_lengths(speech_lengths).long()


def cnn_features(
    model: PreTrainedModel,
    speech: torch.Tensor,
    speech_lengths: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Return the features of the model's CNN front end: (Batch, Time, Channels).

    Args:
        speech: (Batch, Samples).
        speech_lengths: (Batch,), if speech is padded: a CNN with GroupNorm, whose norm
            is over all of the time, would hear the padding.
    """
    first = model.feature_extractor.conv_layers[0]
    norm = getattr(first, "layer_norm", None)
    if (
        speech_lengths is None
        or int(speech_lengths.min()) == speech.size(1)
        or not isinstance(norm, torch.nn.GroupNorm)
    ):
        return model.feature_extractor(speech).transpose(1, 2)
    kernel, stride = first.conv.kernel_size[0], first.conv.stride[0]
    lengths = (speech_lengths - kernel) // stride + 1
    lengths = lengths.to(speech.device, non_blocking=True)
    hook = norm.register_forward_hook(
        lambda _, args, output: _norm_over_valid(norm, args[0], lengths)
    )
    try:
        return model.feature_extractor(speech).transpose(1, 2)
    finally:
        hook.remove()


def _norm_over_valid(
    norm: torch.nn.GroupNorm, x: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Norm each channel of x (Batch, Channels, Time) over its valid frames alone."""
    valid = frame_mask(lengths, x.size(2))[:, None]
    count = lengths[:, None, None]
    x = x.float()
    centred = x - (x * valid).sum(2, keepdim=True) / count
    variance = (centred * valid).square().sum(2, keepdim=True) / count
    normed = centred / (variance + norm.eps).sqrt()
    return normed * norm.weight[:, None] + norm.bias[:, None]


def log_mel(extractor: WhisperFeatureExtractor, speech: torch.Tensor) -> torch.Tensor:
    """Return what Whisper's extractor does (Batch, Mel, Time), on the speech's device.

    Args:
        speech: (Batch, Samples).
    """
    device = speech.device
    with torch.autocast(device.type, enabled=False):
        window = torch.hann_window(extractor.n_fft, device=device)
        spectrum = torch.stft(
            speech.float(),
            extractor.n_fft,
            extractor.hop_length,
            window=window,
            return_complex=True,
        )
        power = (spectrum[..., :-1].abs() ** 2).contiguous()
        filters = torch.from_numpy(extractor.mel_filters).float()
        mel = filters.to(device, non_blocking=True).T @ power
        logs = mel.clamp(min=1e-10).log10()
        logs = torch.maximum(logs, logs.amax((1, 2), keepdim=True) - 8.0)
        return (logs + 4.0) / 4.0


def projected_features(model: PreTrainedModel, features: torch.Tensor) -> torch.Tensor:
    """Return the CNN's features in the width of the layers: (Batch, Time, Dim)."""
    projected = model.feature_projection(features)
    if isinstance(projected, tuple):  # wav2vec2 and WavLM return the input as well
        return projected[0]
    return projected


def mask_spans(
    model: PreTrainedModel, projected: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Put the model's mask embedding in place of spans of frames (Batch, Time, Dim).

    transformers draws the spans; its own masking with them would wait for a GPU.

    Args:
        lengths: valid frames (Batch,); a batch shorter than a span is not masked.
    """
    config, (size, frames, _) = model.config, projected.shape
    if frames < config.mask_time_length:
        return projected
    drawn = _compute_mask_indices(
        (size, frames),
        config.mask_time_prob,
        config.mask_time_length,
        frame_mask(lengths, frames),
        config.mask_time_min_masks,
    )
    masked = torch.from_numpy(drawn).to(projected.device, non_blocking=True)
    embedding = model.masked_spec_embed.to(projected.dtype)
    return torch.where(masked[..., None], embedding, projected)


def hidden_states(
    model: PreTrainedModel, features: torch.Tensor, lengths: torch.Tensor
) -> list[torch.Tensor]:
    """Return what enters the first layer, and what comes out of each that runs.

    The last one is the model's output, after its final LayerNorm if it has one.
    transformers' own forward would build an attention mask for a batch without padding,
    which costs time. In training, spans of the input are masked if `mask_time_prob` and
    `apply_spec_augment` of the model's config say so.

    Args:
        features: (Batch, Time, Channels), see `cnn_features`.
        lengths: valid frames (Batch,).
    """
    projected = projected_features(model, features)
    config = model.config  # that of data2vec has no apply_spec_augment
    masks = getattr(config, "apply_spec_augment", True) and config.mask_time_prob > 0
    if model.training and masks:
        projected = mask_spans(model, projected, lengths)
    mask = None
    if int(lengths.min()) < features.size(1):
        lengths = lengths.to(features.device, non_blocking=True)
        mask = frame_mask(lengths, features.size(1))
    with outputs_of(model.encoder.layers.children()) as states:
        output = model.encoder(projected, attention_mask=mask)
    return [*states[:-1], output.last_hidden_state]


def states_of_depth(
    model: PreTrainedModel, states: Sequence[torch.Tensor], depth: int
) -> list[torch.Tensor]:
    """Return what `hidden_states` gives where just the first `depth` layers run.

    Args:
        states: what it gave where at least these ran (Batch, Time, Dim).
    """
    if depth == len(states) - 1:
        return list(states)
    output = states[depth]
    if model.config.do_stable_layer_norm:  # it ends in a LayerNorm
        output = model.encoder.layer_norm(output)
    return [*states[:depth], output]


@contextmanager
def outputs_of(layers: Iterable[torch.nn.Module]) -> Iterator[list[torch.Tensor]]:
    """Gather what enters the first of the layers that run, and what each returns."""
    states: list[torch.Tensor] = []

    def gather(layer, args, kwargs, output):
        if not states:
            states.append(_first(args, kwargs))
        states.append(_first((output,), None))

    handles = [
        layer.register_forward_hook(gather, with_kwargs=True) for layer in layers
    ]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _first(args: tuple, kwargs: Optional[dict]) -> torch.Tensor:
    value = args[0] if args else next(iter(kwargs.values()))
    while isinstance(value, tuple):  # ESPnet's layers pass (x, positions), mask
        value = value[0]
    return value
