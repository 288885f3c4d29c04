"""Speech of a data directory, as a trained model takes it."""

import argparse
from pathlib import Path
from typing import Union

import numpy as np
import soundfile
from espnet2.tasks.asr import ASRTask
from espnet2.train.dataset import ESPnetDataset

from dldkit.data.audio import is_in_archive
from dldkit.data.datadir import read_table
from dldkit.errors import UserError


def speech_source(data_dir: Union[str, Path]) -> tuple[str, str, str]:
    """Return ESPnet's path, name and type of the speech in a data directory.

    Raises:
        UserError: when there is neither wav.scp nor feats.scp.
    """
    for name in ("feats.scp", "wav.scp"):
        path = Path(data_dir) / name
        if path.is_file():
            with path.open(encoding="utf-8", errors="replace") as scp:
                _, _, entry = scp.readline().partition(" ")
            in_arks = name == "feats.scp" or is_in_archive(entry.strip())
            return str(path), "speech", "kaldi_ark" if in_arks else "sound"
    raise UserError(f"{data_dir} has neither wav.scp nor feats.scp: run stage 3 first")


def utterance_ids(data_dir: Union[str, Path]) -> list[str]:
    """Return the utterances of a data directory, in the order of its files."""
    return list(read_table(speech_source(data_dir)[0]))


def refuse_missing_speech(scp: Union[str, Path], data_type: str) -> None:
    """Refuse a table of speech that is empty, or whose first entry can not be opened.

    Args:
        data_type: ESPnet's; tables that are neither `sound` nor `kaldi_ark` may hold
            anything.

    Raises:
        UserError: naming the table, the utterance and the file.
    """
    if data_type not in ("sound", "kaldi_ark"):
        return
    table = read_table(scp)
    if not table:
        raise UserError(f"{scp} is empty: it has no utterance")
    utt, entry = next(iter(table.items()))
    if entry.endswith("|"):
        return
    file = entry.rpartition(":")[0] if data_type == "kaldi_ark" else entry
    if not Path(file).is_file():
        raise UserError(
            f"{scp}: {utt} is to be in {file}, which does not exist: mend the table, "
            "or start in the directory that its paths begin at"
        )
    if data_type == "sound":
        try:
            soundfile.info(file)
        except soundfile.LibsndfileError as error:
            raise UserError(f"{scp}: {utt} is no audio: {error}") from None


def readable_speech(data_dir: Union[str, Path]) -> tuple[str, str, str]:
    """Return what `speech_source` does, if its first entry can be opened.

    Raises:
        UserError: see `refuse_missing_speech`.
    """
    source = speech_source(data_dir)
    refuse_missing_speech(source[0], source[2])
    return source


class SpeechReader:
    """Reads utterances, preprocessed as the model's training did (without noise).

    Args:
        data_dir: with wav.scp or feats.scp.
        train_args: the model's training config.
    """

    def __init__(self, data_dir: Union[str, Path], train_args: argparse.Namespace):
        self.dataset = ESPnetDataset(
            [readable_speech(data_dir)],
            preprocess=ASRTask.build_preprocess_fn(train_args, False),
        )

    def __call__(self, utt_id: str) -> np.ndarray:
        """Return (Samples,) or (Time, Dim)."""
        return self.dataset[utt_id][1]["speech"]
