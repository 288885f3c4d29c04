"""Batches of unlabelled speech: crops, or padding.

`speech` is a waveform (Samples,), or cached features of the teacher's CNN (Time,
Channels). What is cached is that of whole utterances, which for teacher and student are
the same only if the student hears them whole. So these are padded, never cropped.
"""

from pathlib import Path
from typing import Any, Collection, Sequence

import numpy as np
import torch
from espnet2.train.collate_fn import common_collate_fn
from espnet2.train.preprocessor import CommonPreprocessor

from dldkit.data.audio import BadAudio, declared_length
from dldkit.data.datadir import read_table, read_text, splits_of
from dldkit.data.frames import DATA_TYPE
from dldkit.data.segments import FRAME, SHORTEST, longest
from dldkit.errors import UserError
from dldkit.sfm.int8 import unpack

TARGETS = "targets"  # the name of the data, and of their table
CLEAN = "clean"  # speech that the teacher hears, where the student hears another one
FEATURES = "features"  # the table of the teacher's CNN features, and its directory


class NoisySpeech(CommonPreprocessor):
    """Noise and reverberation for the student, added by ESPnet's own preprocessor.

    Args:
        keep_clean: keep the speech as it was, too, as `clean`, for a live teacher.
        options: of ESPnet, such as `noise_scp` and `rir_scp`.
    """

    def __init__(self, keep_clean: bool, **options: Any):
        super().__init__(train=True, force_single_channel=True, **options)
        self.keep_clean = keep_clean

    def __call__(self, uid: str, data: dict[str, Any]) -> dict[str, Any]:
        """Return the data of an utterance, with `speech` (Samples,) changed."""
        kept = {CLEAN: data["speech"].copy()} if self.keep_clean else {}
        return {**super().__call__(uid, data), **kept}


class CropCollateFn:
    """Cuts the utterances of a batch to one length, or pads them.

    Args:
        train: crops begin at random places; otherwise they are taken from the middle.
        crop: cut all to the shortest one; False, or with cached targets = pad to the
            longest one.
        max_seconds: cut what is longer; of cached targets, refuse it.
        fs: sampling rate in Hz.

    Raises:
        UserError: when `max_seconds` is less than the shortest utterance allowed.
    """

    def __init__(
        self,
        train: bool,
        crop: bool = True,
        max_seconds: float = 15.6,
        fs: int = 16000,
    ):
        self.train = train
        self.crop = crop
        self.fs = fs
        self.max_samples = longest(max_seconds, fs)

    def __call__(
        self, data: Collection[tuple[str, dict[str, np.ndarray]]]
    ) -> tuple[list[str], dict[str, torch.Tensor]]:
        """Return names and `speech`, `speech_lengths`, ... (Batch, ...).

        `lengths_on_host` has the lengths once more as lists, which stay on the CPU.
        The data may have cached `targets`, one for each frame, and `clean` speech, of
        which the same is cut out.

        Raises:
            UserError: when an utterance is shorter than two frames, or has cached
                targets of other audio, or of more than `max_seconds`.
        """
        is_wave = data[0][1]["speech"].ndim == 1
        unit = 1 if is_wave else FRAME  # samples
        most = int(self.max_samples // unit)
        sizes = [min(len(d["speech"]), most) for _, d in data]
        if is_wave and min(sizes) < SHORTEST:
            utt = [u for u, d in data][int(np.argmin(sizes))]
            raise UserError(
                f"utterance {utt} is too short to learn from ({min(sizes)} samples): "
                "leave short ones out (stage 4, --min_wav_duration)"
            )
        if self.crop and TARGETS not in data[0][1]:
            sizes = [min(sizes)] * len(sizes)
        crops = []
        for (utt, whole), size in zip(data, sizes):
            start = self._start(len(whole["speech"]) - size)
            heard = [name for name in ("speech", CLEAN) if name in whole]
            crop = {name: whole[name][start : start + size] for name in heard}
            if TARGETS in whole:
                targets = whole[TARGETS]
                crop[TARGETS] = (
                    unpack(targets) if targets.dtype.kind == "i" else targets
                )
                samples = unit * len(whole["speech"])
                frames = len(crop[TARGETS])
                self._refuse_others_targets(utt, samples, unit * size, frames)
            crops.append((utt, crop))
        utts, batch = common_collate_fn(crops)
        batch["lengths_on_host"] = {
            name: [len(crop[name]) for _, crop in crops] for name in crops[0][1]
        }
        return utts, batch

    def _start(self, spare: int) -> int:
        frames = spare // FRAME
        # numpy's generator: ESPnet seeds it by epoch, and in each worker
        frame = np.random.randint(frames + 1) if self.train else frames // 2
        return int(frame) * FRAME

    def _refuse_others_targets(
        self, utt: str, samples: int, heard: int, frames: int
    ) -> None:
        # HuBERT's CNN gives a frame less where the last one would need more samples
        if abs(frames - samples // FRAME) > 1:
            raise UserError(
                f"utterance {utt} has {samples} samples and {frames} cached targets, "
                f"one for {FRAME} samples: they were collected from other audio; "
                "collect them again (python -m dldkit.bin.sfm_collect_targets)"
            )
        if samples > heard:
            raise UserError(
                f"utterance {utt} is longer than max_seconds "
                f"({self.max_samples / self.fs:g} s), and its cached targets are those "
                "of all of it: cut the data into segments (python -m "
                "dldkit.bin.sfm_cut_data) and collect them again, or set max_seconds"
            )


def refuse_other_rates(
    data: Sequence[tuple[str, str, str]], sampling_rate: int
) -> None:
    """Refuse waveforms of another sampling rate, in Hz, than the teacher's, or stereo.

    Args:
        data: path, name and type of ESPnet's data entries; `noise` is the type of its
            noise_scp and rir_scp, whose lines may be files alone.

    Raises:
        UserError: naming the table, and an utterance; or for an empty table.
    """
    for path, name, kind in data:
        if name != "speech" or kind == DATA_TYPE:
            continue
        if kind == "noise":
            if not Path(path).is_file():
                raise UserError(f"{path} does not exist")
            lines = read_text(Path(path)).splitlines()
            words = [line.split(maxsplit=1) for line in lines if line.strip()]
            table = {w[0]: w[-1] for w in words}
        else:
            table = read_table(splits_of(path)[0])
        if not table:
            raise UserError(f"{path} lists no utterance")
        utt, file = next(iter(table.items()))
        try:
            _, found, channels = declared_length(file)
        except BadAudio as error:
            raise UserError(f"{path}: utterance {utt}: {error}") from error
        if found != sampling_rate:
            raise UserError(
                f"{path}: utterance {utt} has {found} Hz, but the teacher takes "
                f"{sampling_rate} Hz: format the data with --fs {sampling_rate} "
                "(stage 3)"
            )
        if channels > 1 and kind != "noise":
            raise UserError(
                f"{path}: utterance {utt} has {channels} channels, but the teacher "
                "takes one: format the data (stage 3), which mixes them"
            )
