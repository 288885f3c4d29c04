"""Run s3prl.main with what it needs and newer torchaudio and pandas have no more.

python -m dldkit.sfm.superb.s3prl_main LIST_DIR PROBLEM [--option value]...
"""

import functools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Sequence, Union

import numpy as np
import pandas
import soundfile
import torch
import torchaudio

from dldkit.sfm.superb.tasks import LEXICONS
from dldkit.sfm.superb.upstream import s3prl_hub


def audio_info(path: Union[str, Path]) -> SimpleNamespace:
    """Return ``num_frames`` and ``sample_rate``, as torchaudio.info did."""
    info = soundfile.info(str(path))
    return SimpleNamespace(num_frames=info.frames, sample_rate=info.samplerate)


def apply_effects_tensor(
    speech: torch.Tensor, sample_rate: int, effects: Sequence[Sequence[str]]
) -> tuple[torch.Tensor, int]:
    """Apply SoX effects to speech (1, Samples), as torchaudio.sox_effects did."""
    for name, *values in effects:
        if (name, *values) in {("channels", "1"), ("rate", str(sample_rate))}:
            continue  # s3prl loads mono at this rate already
        if name == "gain" and len(values) == 1:
            speech = (speech * 10 ** (float(values[0]) / 20)).clamp(-1, 1)
        else:
            speech = _sox(speech, sample_rate, [name, *values])
    return speech, sample_rate


def _sox(speech: torch.Tensor, sample_rate: int, effect: list[str]) -> torch.Tensor:
    raw = ["-t", "f32", "-r", str(sample_rate), "-c", "1", "-"]
    output = subprocess.run(
        ["sox", "-D", *raw, *raw, *effect],
        input=speech.numpy().astype("<f4").tobytes(),
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    return torch.from_numpy(np.frombuffer(output, "<f4").copy()).unsqueeze(0)


def main() -> None:
    """Run a problem of s3prl with splits and lexicons from LIST_DIR."""
    list_dir = Path(sys.argv.pop(1))
    if not hasattr(torchaudio, "info"):
        torchaudio.info = audio_info
    if not hasattr(torchaudio, "sox_effects"):
        torchaudio.sox_effects = SimpleNamespace(
            apply_effects_tensor=apply_effects_tensor
        )

    if not hasattr(pandas.Series, "iteritems"):
        pandas.Series.iteritems = pandas.Series.items

    s3prl_hub()
    from s3prl.main import main as s3prl_main
    from s3prl.problem.asr import superb_pr
    from s3prl.problem.common import superb_sid

    # These two have no option for it, and would download into the home directory.
    superb_sid.VoxCeleb1SID = functools.partial(
        superb_sid.VoxCeleb1SID, cache_root=list_dir
    )
    superb_pr.G2P = functools.partial(
        superb_pr.G2P, file_list=[list_dir / name for name in LEXICONS]
    )
    s3prl_main()


if __name__ == "__main__":
    main()
