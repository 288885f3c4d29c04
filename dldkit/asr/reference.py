"""The frozen reference: where the posteriors that pull the student come from."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Optional, Protocol, Union

import torch
import yaml
from espnet2.asr.espnet_model import ESPnetASRModel

from dldkit.asr.loading import find_checkpoint, load_asr_model
from dldkit.asr.posteriors import Posteriors, unpack
from dldkit.data.frames import DATA_TYPE, collected_from
from dldkit.errors import UserError
from dldkit.random_state import untouched_random_numbers

POSTERIORS = "posteriors"  # the name of the data, and of their table
DESCRIPTION = "reference.yaml"


class Reference(Protocol):
    """A source of reference posteriors, for a batch that the student sees as well."""

    path: Union[str, Path]

    def __call__(
        self,
        speech: torch.Tensor,
        speech_lengths: torch.Tensor,
        **stored: torch.Tensor,
    ) -> Posteriors:
        """Return the posteriors of a batch.

        Args:
            speech: (Batch, Samples) or (Batch, Time, Dim).
            speech_lengths: (Batch,).
            stored: `posteriors` and `posteriors_lengths`, where ESPnet read them.

        Raises:
            UserError: when the batch has no posteriors, and none can be computed.
        """


@dataclass
class Description:
    """What reference and student must share, frame by frame.

    Args:
        token_list: the CTC units.
        sampling_rate: in Hz; None where the frontend does not tell, or for features.
        frames: encoder frames for 16000 samples, as a measure of the frame rate; None
            for models that take features.
        top_k: tokens kept per frame in cached posteriors; None = all.
    """

    token_list: list[str]
    sampling_rate: Optional[int]
    frames: Optional[int]
    top_k: Optional[int] = None

    @classmethod
    @torch.no_grad()
    def of(cls, model: ESPnetASRModel) -> "Description":
        """Describe a model, by asking its frontend and probing it with silence."""
        if model.frontend is None:
            return cls(list(model.token_list), None, None)
        logmel = getattr(model.frontend, "logmel", None)
        sampling_rate = None if logmel is None else int(logmel.mel_options["sr"])
        silence = torch.zeros(1, 16000, device=next(model.parameters()).device)
        lengths = torch.full((1,), silence.size(1), device=silence.device)
        was_training = model.training
        model.eval()
        _, frames = ESPnetASRModel.encode(model, silence, lengths)
        model.train(was_training)
        return cls(list(model.token_list), sampling_rate, int(frames[0]))

    def refuse_difference(self, student: "Description", where: str) -> None:
        """Raise a UserError that says which value differs between two models."""
        if self.token_list != student.token_list:
            pairs = zip(self.token_list, student.token_list)
            at = next(
                (i for i, (a, b) in enumerate(pairs) if a != b),
                min(len(self.token_list), len(student.token_list)),
            )
            raise UserError(
                f"the reference {where} has another token list: "
                f"{len(self.token_list)} tokens, the student "
                f"{len(student.token_list)}; token {at} is "
                f"{self.token_list[at : at + 1]} there and "
                f"{student.token_list[at : at + 1]} here. Train both with the same "
                "tokens.txt"
            )
        if (
            self.sampling_rate is not None
            and student.sampling_rate is not None
            and self.sampling_rate != student.sampling_rate
        ):
            raise UserError(
                f"the reference {where} has another sampling rate: "
                f"{self.sampling_rate} Hz, the student {student.sampling_rate} Hz"
            )
        if None not in (self.frames, student.frames) and self.frames != student.frames:
            raise UserError(
                f"the reference {where} has another frame rate: {self.frames} encoder "
                f"frames for 16000 samples, the student {student.frames}. Use the same "
                "hop_length and input_layer"
            )

    def save(self, directory: Path) -> None:
        """Write the description beside cached posteriors."""
        text = yaml.safe_dump(asdict(self), allow_unicode=True, sort_keys=False)
        (directory / DESCRIPTION).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> "Description":
        """Read the description beside cached posteriors."""
        text = (directory / DESCRIPTION).read_text(encoding="utf-8")
        return cls(**yaml.safe_load(text))


def open_reference(path: Union[str, Path], student: ESPnetASRModel) -> Reference:
    """Open a trained model, or cached posteriors, as the reference of `student`.

    Raises:
        UserError: when there is no reference at `path`, or it does not fit.
    """
    device = next(student.parameters()).device
    with untouched_random_numbers():
        if is_cached(path):
            reference = CachedReference(path)
        else:
            reference = LiveReference(path, device)
        reference.description.refuse_difference(Description.of(student), str(path))
    return reference


class LiveReference:
    """Forward of a frozen model, on the clean features of its own frontend."""

    def __init__(self, path: Union[str, Path], device: Union[str, torch.device]):
        self.path = path
        model, _ = load_asr_model(path)
        if model.ctc is None:
            raise UserError(f"the reference {path} has no CTC posteriors")
        # in eval mode SpecAug and dropout are off
        self.model = model.requires_grad_(False).eval().to(device)
        self.description = Description.of(self.model)

    @torch.no_grad()
    def __call__(self, speech, speech_lengths, **stored) -> Posteriors:
        """Return what `Reference` promises."""
        encoder_out, lengths = self.model.encode(speech, speech_lengths)
        if isinstance(encoder_out, tuple):  # with intermediate outputs
            encoder_out = encoder_out[0]
        return Posteriors(self.model.ctc.ctc_lo(encoder_out).log_softmax(-1), lengths)


class CachedReference:
    """Posteriors that `dldkit.bin.collect_posteriors` wrote, and ESPnet reads."""

    def __init__(self, path: Union[str, Path]):
        self.path = path
        self.description = Description.load(Path(path))

    def __call__(
        self, speech, speech_lengths, posteriors=None, posteriors_lengths=None
    ) -> Posteriors:
        """Return what `Reference` promises."""
        if posteriors is None:
            raise UserError(
                f"the batch has no posteriors of {self.path}: train with "
                "dldkit.bin.asr_train, or give ESPnet's command the data "
                f"{self.path}/{POSTERIORS}.scp,{POSTERIORS},{DATA_TYPE} for training "
                "and validation, and --allow_variable_data_keys true"
            )
        return unpack(posteriors, posteriors_lengths, self.description.top_k)


def is_cached(path: Union[str, Path, None]) -> bool:
    """Say whether `path` is a directory of cached posteriors."""
    return path is not None and (Path(path) / f"{POSTERIORS}.scp").is_file()


def reference_file(path: Union[str, Path]) -> Path:
    """Return the file whose content says which reference it is.

    Raises:
        UserError: when there is no reference at `path`.
    """
    path = Path(path)
    if is_cached(path):
        return collected_from(path, POSTERIORS)
    found = find_checkpoint(path) if path.is_dir() else path
    if not found.is_file():
        raise UserError(
            f"no {path}: name a trained experiment directory, one of its checkpoints, "
            "a packed zip, or cached posteriors"
        )
    return found
