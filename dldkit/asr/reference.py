"""The frozen reference: where the posteriors that pull the student come from."""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Optional, Protocol, Sequence, Union

import kaldiio
import numpy as np
import torch
import yaml
from espnet2.asr.espnet_model import ESPnetASRModel

from dldkit.asr.loading import load_asr_model
from dldkit.asr.losses import Posteriors
from dldkit.data.frames import utterances_without
from dldkit.errors import UserError
from dldkit.random_state import untouched_random_numbers

POSTERIORS_SCP = "posteriors.scp"
POSTERIORS_DESCRIPTION = "reference.yaml"
TOO_SHORT = "too_short"  # ids of utterances without posteriors, one a line


class Reference(Protocol):
    """A source of reference posteriors, for a batch that the student sees as well."""

    def __call__(
        self,
        speech: torch.Tensor,
        speech_lengths: torch.Tensor,
        frame_lengths: torch.Tensor,
        utt_ids: Optional[Sequence[str]],
    ) -> Posteriors:
        """Return the posteriors of a batch.

        Args:
            speech: (Batch, Samples) or (Batch, Time, Dim).
            speech_lengths: (Batch,).
            frame_lengths: the student's valid frames (Batch,).
            utt_ids: the utterances' names.

        Raises:
            UserError: when the frames are not those of the student.
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
        (directory / POSTERIORS_DESCRIPTION).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> "Description":
        """Read the description beside cached posteriors."""
        text = (directory / POSTERIORS_DESCRIPTION).read_text(encoding="utf-8")
        return cls(**yaml.safe_load(text))


def open_reference(path: Union[str, Path], student: ESPnetASRModel) -> Reference:
    """Open a trained model, or cached posteriors, as the reference of `student`.

    Raises:
        UserError: when there is no reference at `path`, or it does not fit.
    """
    device = next(student.parameters()).device
    with untouched_random_numbers():
        if (Path(path) / POSTERIORS_SCP).is_file():
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
    def __call__(self, speech, speech_lengths, frame_lengths, utt_ids=None):
        encoder_out, lengths = self.model.encode(speech, speech_lengths)
        if isinstance(encoder_out, tuple):  # with intermediate outputs
            encoder_out = encoder_out[0]
        if not torch.equal(lengths.cpu(), frame_lengths.cpu()):
            raise UserError(
                f"the reference {self.path} gives {lengths.tolist()} frames where "
                f"the student gives {frame_lengths.tolist()} (utterances {utt_ids})"
            )
        return Posteriors(self.model.ctc.ctc_lo(encoder_out).log_softmax(-1), lengths)


def check_cached_ids(args: argparse.Namespace) -> None:
    """Refuse training with cached posteriors that lack some of its utterances.

    Args:
        args: those of the training.

    Raises:
        UserError: saying how many are missing, the first, and what is to be done.
    """
    cache = Path((args.model_conf or {}).get("reference") or "")
    if not (cache / POSTERIORS_SCP).is_file():
        return
    missing, needed = utterances_without(cache / POSTERIORS_SCP, args)
    if not missing:
        return
    listed = cache / TOO_SHORT
    known = set(listed.read_text().split()) if listed.is_file() else set()
    short = [utt for utt in missing if utt in known]
    if short:
        raise UserError(
            f"{len(short)} of {needed} utterances are too short for the reference "
            f"and have no posteriors in {cache}, the first is {short[0]}: leave short "
            "ones out (stage 4, --min_wav_duration)"
        )
    raise UserError(
        f"{len(missing)} of {needed} utterances have no posteriors in {cache}, "
        f"the first is {missing[0]}: collect them for all training and validation data "
        "(stage 9, python -m dldkit.bin.collect_posteriors)"
    )


class CachedReference:
    """Posteriors that `dldkit.bin.collect_posteriors` wrote, by utterance id."""

    def __init__(self, path: Union[str, Path]):
        self.path = Path(path)
        self.description = Description.load(self.path)
        self.matrices = kaldiio.load_scp(str(self.path / POSTERIORS_SCP))

    def __call__(self, speech, speech_lengths, frame_lengths, utt_ids=None):
        if utt_ids is None:
            raise UserError("cached posteriors are found by utt_id: the batch has none")
        decoded = [
            self._read(utt_id, int(frames))
            for utt_id, frames in zip(utt_ids, frame_lengths)
        ]
        log_probs, tokens = (
            (
                None
                if parts[0] is None
                else torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).to(
                    speech.device
                )
            )
            for parts in zip(*decoded)
        )
        return Posteriors(log_probs, frame_lengths, tokens)

    def _read(
        self, utt_id: str, frames: int
    ) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        try:
            matrix = self.matrices[utt_id]
        except KeyError:
            raise UserError(
                f"no cached posteriors for utterance {utt_id} in {self.path}: collect "
                "them for all training and validation data (stage 9)"
            ) from None
        if len(matrix) != frames:
            raise UserError(
                f"cached posteriors of utterance {utt_id} in {self.path} have "
                f"{len(matrix)} frames, the student {frames}: they were collected from "
                "other audio, or features; collect them again (stage 9)"
            )
        return unpack_posteriors(matrix, self.description.top_k)


def pack_posteriors(log_probs: torch.Tensor, top_k: Optional[int]) -> np.ndarray:
    """Turn log-posteriors (Time, Vocab) into the matrix that is stored.

    All of them as float16 (Time, Vocab); or, of the `top_k` likeliest tokens, indices
    and float16 bits side by side as uint16 (Time, 2 * K).
    """
    if top_k is None:
        return log_probs.cpu().numpy().astype(np.float16)
    values, tokens = log_probs.topk(top_k, dim=-1)
    bits = values.cpu().numpy().astype(np.float16).view(np.uint16)
    return np.concatenate([tokens.cpu().numpy().astype(np.uint16), bits], axis=1)


def unpack_posteriors(
    matrix: np.ndarray, top_k: Optional[int]
) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
    """Return log-posteriors and tokens, as `Posteriors` holds them (no batch)."""
    if top_k is None:
        return torch.from_numpy(matrix.astype(np.float32)), None
    tokens = torch.from_numpy(matrix[:, :top_k].astype(np.int64))
    bits = np.ascontiguousarray(matrix[:, top_k:])
    log_probs = torch.from_numpy(bits.view(np.float16).astype(np.float32))
    kept = log_probs.exp().sum(-1, keepdim=True)
    rest = (1.0 - kept).clamp(min=1e-8).log()
    return torch.cat([log_probs, rest], -1).log_softmax(-1), tokens
