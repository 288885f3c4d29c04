"""The frozen teacher: the model whose hidden states the student learns to give."""

import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Protocol, Sequence, Union

import humanfriendly
import torch
import torch.nn.functional as F
import transformers
import yaml
from espnet2.main_funcs.pack_funcs import unpack
from espnet2.tasks.ssl import SSLTask
from espnet2.tasks.ssl import encoder_choices as ssl_encoders
from espnet2.utils.get_default_kwargs import get_default_kwargs

from dldkit.asr.loading import check_weights, find_checkpoint, read_checkpoint
from dldkit.data.frames import collected_from
from dldkit.errors import UserError
from dldkit.random_state import untouched_random_numbers
from dldkit.sfm.data import FRAME, TARGETS
from dldkit.sfm.pretrained import expected_speech, load_pretrained, load_whisper_encoder
from dldkit.sfm.wave import (
    cnn_features,
    frame_lengths,
    frame_mask,
    hidden_states,
    log_mel,
    normalize_speech,
    outputs_of,
)

TARGETS_DESCRIPTION = "teacher.yaml"
WAVE_MODELS = ("hubert", "wavlm", "wav2vec2", "unispeech-sat", "data2vec-audio")

PathLike = Union[str, Path]
Targets = tuple[list[torch.Tensor], torch.Tensor]


class Teacher(Protocol):
    """A source of hidden states; `layers` says which, `info` of what kind."""

    info: "TeacherInfo"
    layers: list[int]

    def __call__(
        self,
        speech: torch.Tensor,
        speech_lengths: torch.Tensor,
        utt_ids: Optional[Sequence[str]] = None,
        **known: torch.Tensor,
    ) -> Targets:
        """Return float32 (Batch, Time, Dim) for each layer, and valid frames (Batch,).

        Args:
            speech: (Batch, Samples), as it was recorded: the teacher normalises it.
            speech_lengths: (Batch,), best on the CPU, where the valid frames are.
            utt_ids: the utterances' names, for messages.
            known: what a kind of teacher need not compute, see there.

        Raises:
            UserError: for speech that the teacher can not take.
        """


@dataclass
class TeacherInfo:
    """What the student must know of a teacher.

    Args:
        hidden_size: dimension of its hidden states.
        num_layers: N. Layer 0 is what enters the first block, 1 to N - 1 are the
            blocks' outputs, and N is the model's output, after its final LayerNorm if
            it has one.
        sampling_rate: in Hz.
        normalize: it takes waveforms of zero mean and unit variance.
        layers: those that a directory of cached targets holds; None for a model.
    """

    hidden_size: int
    num_layers: int
    sampling_rate: int
    normalize: bool
    layers: Optional[list[int]] = None


def teacher_info(path: PathLike) -> TeacherInfo:
    """Describe a teacher by its configuration, without reading its weights.

    Args:
        path: name or directory of a Hugging Face model; experiment directory,
            checkpoint or packed zip of an ESPnet SSL model; or a directory of targets
            that `dldkit.bin.sfm_collect_targets` wrote.

    Raises:
        UserError: when there is no such teacher.
    """
    return _teacher_class(path).describe(path)


def open_teacher(
    path: PathLike,
    layers: Sequence[int],
    device: Union[str, torch.device] = "cpu",
) -> Teacher:
    """Open a teacher that gives the hidden states of `layers`.

    Args:
        path: see `teacher_info`.
        layers: see `TeacherInfo`; what lies above the deepest one is not computed.

    Raises:
        UserError: when it can not be loaded, or lacks one of the layers.
    """
    info, layers = teacher_info(path), list(layers)
    wrong = [layer for layer in layers if not 0 <= layer <= info.num_layers]
    if wrong or not layers:
        raise UserError(
            f"the teacher {path} has the layers 0 (input) to {info.num_layers} "
            f"(output): choose among them, not {layers}"
        )
    with untouched_random_numbers():
        return _teacher_class(path)(path, info, layers, device)


def is_cached(path: PathLike) -> bool:
    """Say whether `path` is a directory of cached targets."""
    return (Path(path) / TARGETS_DESCRIPTION).is_file()


def weight_files(path: PathLike) -> list[Path]:
    """Return the files whose content says which teacher it is; none on the Hub."""
    path = Path(path)
    if is_cached(path):
        return [collected_from(path, TARGETS)]
    if path.is_file():
        return [path]
    if (path / "config.yaml").is_file():
        return [find_checkpoint(path)]
    return sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))


def _teacher_class(path: PathLike) -> type:
    directory = Path(path)
    if is_cached(path):
        return CachedTeacher
    if directory.is_file() or (directory / "config.yaml").is_file():
        return ESPnetTeacher
    if directory.is_dir() and not (directory / "config.json").is_file():
        raise UserError(
            f"no teacher in {path}: it has neither config.json (Hugging Face), nor "
            f"config.yaml (ESPnet SSL), nor {TARGETS_DESCRIPTION} (cached targets)"
        )
    is_whisper = _read_config(path).model_type == "whisper"
    return WhisperTeacher if is_whisper else WaveTeacher


class LiveTeacher:
    """Forward of a frozen model, up to the deepest layer that is asked for.

    It computes in float32, or as the autocast says that it is called in.
    """

    info: TeacherInfo

    def __init__(self, path, info, layers, device):
        self.path, self.info, self.layers = path, info, layers
        # in eval mode dropout, LayerDrop and SpecAugment are off
        self.model = self.load(path).requires_grad_(False).eval().to(device)

    @torch.no_grad()
    def __call__(self, speech, speech_lengths, utt_ids=None, features=None) -> Targets:
        """Return what `Teacher` promises.

        Args:
            features: (Batch, Time, Channels) of the teacher's own CNN, where they are
                known already; only for models with `model.feature_extractor`.
        """
        if next(self.model.parameters()).device != speech.device:
            self.model.to(speech.device)
        lengths = speech_lengths.cpu()  # where they are in training already
        states, lengths = self.forward(speech, lengths, utt_ids, features)
        longest = int(lengths.max())
        return [states[layer][:, :longest].float() for layer in self.layers], lengths

    def truncate(self, encoder, blocks, final_norm: Optional[str]) -> None:
        """Delete the blocks above the deepest layer, and the norm that follows them."""
        deepest = max(self.layers)
        if deepest < self.info.num_layers:
            del blocks[max(deepest, 1) :]
            if final_norm is not None:
                setattr(encoder, final_norm, torch.nn.Identity())

    def refuse(self, utt_ids, place: int, samples: int, why: str) -> None:
        """Raise a UserError that names an utterance of the batch."""
        name = f"number {place} of a batch" if utt_ids is None else utt_ids[place]
        raise UserError(
            f"utterance {name} has {samples} samples: {why} for the teacher {self.path}"
        )


class WaveTeacher(LiveTeacher):
    """HuBERT, WavLM, wav2vec2 and their like, of Hugging Face transformers."""

    @staticmethod
    def describe(path: PathLike) -> TeacherInfo:
        """Read config.json and preprocessor_config.json."""
        config = _read_config(path)
        if config.model_type not in WAVE_MODELS:
            raise UserError(
                f"the teacher {path} is a {config.model_type} model: choose one of "
                f"{', '.join(WAVE_MODELS)} or whisper"
            )
        rate, normalize = expected_speech(path)
        return TeacherInfo(
            config.hidden_size, config.num_hidden_layers, rate, normalize
        )

    def load(self, path: PathLike) -> torch.nn.Module:
        """Build the model."""
        config = _read_config(path)
        config.add_adapter = False  # it would follow the output and lower its rate
        model = load_pretrained(transformers.AutoModel, path, "teacher", config=config)
        stable = getattr(config, "do_stable_layer_norm", False)
        norm = "layer_norm" if stable else None  # else it precedes the first block
        self.truncate(model.encoder, model.encoder.layers, norm)
        return model

    def forward(self, speech, speech_lengths, utt_ids, features):
        """Return the hidden states of all layers, and the valid frames."""
        lengths = frame_lengths(self.model, speech_lengths)
        if int(lengths.min()) < 1:
            place = int(lengths.argmin())
            samples = int(speech_lengths[place])
            self.refuse(utt_ids, place, samples, "too few, filter it away,")
        if features is None:
            if self.info.normalize:
                speech = normalize_speech(speech, speech_lengths)
            features = cnn_features(self.model, speech, speech_lengths)
        return hidden_states(self.model, features, lengths), lengths


class WhisperTeacher(LiveTeacher):
    """Whisper's encoder, fed as it was trained: 30 s of log-mel features.

    A frame belongs to the speech when all of its 320 samples do: that is never more
    than one frame away from what the CNN of HuBERT gives.
    """

    @staticmethod
    def describe(path: PathLike) -> TeacherInfo:
        """Read config.json and preprocessor_config.json."""
        config = _read_config(path)
        rate = WhisperTeacher.feature_extractor(path).sampling_rate
        return TeacherInfo(config.d_model, config.encoder_layers, rate, False)

    @staticmethod
    def feature_extractor(path: PathLike):
        """Return what makes log-mel features of waveforms."""
        try:
            return transformers.WhisperFeatureExtractor.from_pretrained(path)
        except OSError:  # all Whisper models agree but for the number of mel bins
            bins = _read_config(path).num_mel_bins
            return transformers.WhisperFeatureExtractor(feature_size=bins)

    def load(self, path: PathLike) -> torch.nn.Module:
        """Build the encoder, which is the whole of a checkpoint or a part of it."""
        self.extract = self.feature_extractor(path)
        encoder = load_whisper_encoder(path, "teacher", _read_config(path))
        self.truncate(encoder, encoder.layers, "layer_norm")
        return encoder

    def forward(self, speech, speech_lengths, utt_ids, features):
        """Return the hidden states of all layers, and the valid frames."""
        lengths = speech_lengths // FRAME
        limit = self.extract.n_samples
        for place, samples in enumerate(speech_lengths.tolist()):
            if samples > limit:
                why = f"more than {limit} are too many, lower max_seconds or filter it,"
                self.refuse(utt_ids, place, samples, why)
            if samples < FRAME:
                self.refuse(utt_ids, place, samples, "too few, filter it away,")
        samples = speech_lengths.to(speech.device, non_blocking=True)
        heard = speech * frame_mask(samples, speech.size(1))
        mel = log_mel(self.extract, F.pad(heard, (0, limit - speech.size(1))))
        with outputs_of(self.model.layers) as states:
            output = self.model(mel)
        return [*states[:-1], output.last_hidden_state], lengths


class ESPnetTeacher(LiveTeacher):
    """A model of ESPnet's SSL task."""

    @staticmethod
    def describe(path: PathLike) -> TeacherInfo:
        """Read config.yaml."""
        config = _read_espnet_config(Path(path))
        options = {
            **get_default_kwargs(ssl_encoders.get_class(config["encoder"])),
            **config["encoder_conf"],
        }
        rate = config["frontend_conf"].get("fs", 16000)
        if isinstance(rate, str):
            rate = humanfriendly.parse_size(rate)
        return TeacherInfo(options["output_size"], options["num_blocks"], rate, False)

    def load(self, path: PathLike) -> torch.nn.Module:
        """Build the model."""
        path = Path(path)
        if path.suffix == ".zip":
            with tempfile.TemporaryDirectory() as directory:
                files = unpack(path, directory)
                model = self.build(files["ssl_train_config"], files["ssl_model_file"])
        else:
            checkpoint = find_checkpoint(path) if path.is_dir() else path
            model = self.build(checkpoint.parent / "config.yaml", checkpoint)
        encoder = model.encoder
        norm = "after_norm" if hasattr(encoder, "after_norm") else None
        self.truncate(encoder, encoder.encoders, norm)
        return model

    @staticmethod
    def build(config: PathLike, checkpoint: PathLike) -> torch.nn.Module:
        """Build the model of a config, and check that its weights arrived."""
        states = read_checkpoint(checkpoint)
        try:
            model, _ = SSLTask.build_model_from_file(config, checkpoint)
        except Exception as error:
            raise UserError(f"{checkpoint} does not fit {config}: {error}") from error
        check_weights(model, states, checkpoint)
        return model

    def forward(self, speech, speech_lengths, utt_ids, features):
        """Return the hidden states of all layers, and the valid frames."""
        with outputs_of(self.model.encoder.encoders) as states:
            output, _, lengths = self.model.inference_encode(
                speech, speech_lengths.to(speech.device)
            )
        return [*states[:-1], output], lengths.cpu()


class CachedTeacher:
    """Hidden states that `dldkit.bin.sfm_collect_targets` wrote, and ESPnet reads."""

    def __init__(self, path, info, layers, device):
        lacking = sorted(set(layers) - set(info.layers))
        if lacking:
            raise UserError(
                f"{path} holds the targets of the layers {info.layers}, not of "
                f"{lacking}: collect them again with all that you want"
            )
        self.path, self.info, self.layers = path, info, layers
        self.made_by = _read_description(path)["teacher"]
        self.columns = [info.layers.index(layer) for layer in layers]

    @staticmethod
    def describe(path: PathLike) -> TeacherInfo:
        """Read teacher.yaml."""
        description = _read_description(path)
        del description["teacher"]
        return TeacherInfo(**description)

    def __call__(
        self,
        speech,
        speech_lengths,
        utt_ids=None,
        targets=None,
        targets_lengths=None,
    ) -> Targets:
        """Return what `Teacher` promises.

        Args:
            targets: what was cached for the batch (Batch, Time, Layers, Dim).
            targets_lengths: (Batch,).
        """
        if targets is None:
            raise UserError(
                f"the batch has no targets of {self.path}: only training reads them"
            )
        states = [targets[:, :, column] for column in self.columns]
        return states, targets_lengths.cpu()


def _read_description(path: PathLike) -> dict[str, Any]:
    file = Path(path) / TARGETS_DESCRIPTION
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def _read_config(path: PathLike) -> transformers.PretrainedConfig:
    try:
        return transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no teacher {path}: name a Hugging Face model or its directory, an ESPnet "
            f"SSL experiment, or cached targets ({error})"
        ) from error


def _read_espnet_config(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as packed:
                meta = yaml.safe_load(packed.read("meta.yaml"))
                name = meta["yaml_files"]["ssl_train_config"]
                config = yaml.safe_load(packed.read(name))
        else:
            directory = path if path.is_dir() else path.parent
            text = (directory / "config.yaml").read_text(encoding="utf-8")
            config = yaml.safe_load(text)
        if not {"util", "encoder", "encoder_conf", "frontend_conf"} <= set(config):
            raise ValueError("it is no config of ESPnet's SSL task")
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            f"the teacher {path} is no SSL model of ESPnet ({error!r}): name an "
            "experiment of espnet2.bin.ssl_train, one of its checkpoints, or a zip of "
            "`espnet2.bin.pack ssl`"
        ) from error
    return config
