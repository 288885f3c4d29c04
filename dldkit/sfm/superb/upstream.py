"""The frozen models that SUPERB scores: those of Hugging Face, and those of s3prl."""

import hashlib
import json
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Optional

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModel

from dldkit.asr.hf_encoder import weight_files
from dldkit.errors import UserError
from dldkit.report.cost import counted_macs
from dldkit.sfm.pretrained import load_pretrained
from dldkit.sfm.teacher.wave import WAVE_MODELS
from dldkit.step import digest

RATE, SECONDS = 16000, 10  # of the audio on which MACs are counted
_FILES = ("config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class Upstream:
    """What s3prl builds: a name of its hub and, for a Hugging Face model, its files.

    `identity` is what tells it from others: a digest of the files, or that name.
    """

    name: str
    directory: Optional[Path]
    identity: str


def find_upstream(words: str) -> Upstream:
    """Find a directory, a name on the Hugging Face Hub, or one of s3prl's upstreams.

    A model of the Hub is downloaded, unless it was before.

    Raises:
        UserError: it is none of these, or no model on waveforms.
    """
    if Path(words).is_dir():
        return _on_disk(words, Path(words).resolve())
    if "/" in words:
        try:
            patterns = ["*.json", "*.safetensors", "pytorch_model*.bin"]
            place = snapshot_download(words, allow_patterns=patterns)
        except (OSError, ValueError) as error:
            raise UserError(
                f"--upstream {words}: no such directory, and the Hugging Face Hub "
                f"gives no model of this name ({error})"
            ) from error
        return _on_disk(words, Path(place))
    known = s3prl_hub().options(only_registered_ckpt=True)
    if words not in known:
        near = ", ".join(get_close_matches(words, known)) or "such as wavlm_base_plus"
        raise UserError(
            f"--upstream {words} is no directory, no name on the Hugging Face Hub "
            f"(user/model), and none of s3prl's upstreams ({near})"
        )
    return Upstream(words, None, words)


def _on_disk(words: str, directory: Path) -> Upstream:
    weights = weight_files(directory)
    missing = [name for name in _FILES if not (directory / name).is_file()]
    if missing or not weights:
        raise UserError(
            f"--upstream {words} has no {', '.join(missing) or 'weights'}: name a "
            "Hugging Face model on waveforms; export a student with python -m "
            "dldkit.bin.sfm_export"
        )
    family = json.loads((directory / "config.json").read_text()).get("model_type")
    if family not in WAVE_MODELS:
        raise UserError(
            f"--upstream {words} is a {family} model: choose one of "
            f"{', '.join(WAVE_MODELS)}, or one of s3prl's upstreams"
        )
    files = [*(directory / name for name in _FILES), *weights]
    digests = b"".join(bytes.fromhex(digest(file)) for file in files)
    identity = hashlib.sha256(digests).hexdigest()
    return Upstream("hf_hubert_custom", directory, identity)


def s3prl_hub() -> ModuleType:
    """Return s3prl.hub, whose `hf_hubert_custom` loads all families of WAVE_MODELS.

    As it is, it makes a HuBERT of a WavLM, with random weights where they differ.
    """
    from s3prl import hub
    from s3prl.upstream.hf_hubert import expert

    load = partial(load_pretrained, AutoModel, role="upstream")
    expert.HubertModel = SimpleNamespace(from_pretrained=load)
    return hub


@torch.no_grad()
def cost_of(upstream: Upstream) -> dict[str, int]:
    """Count the parameters, and the multiply-accumulates of SECONDS of audio.

    Raises:
        UserError: the model can not be loaded.
    """
    place = {} if upstream.directory is None else {"ckpt": str(upstream.directory)}
    try:
        model = getattr(s3prl_hub(), upstream.name)(**place).eval()
    except (OSError, ImportError) as error:  # s3prl downloads it now
        raise UserError(
            f"s3prl can not make its upstream {upstream.name}: {error}"
        ) from error
    audio = torch.arange(float(RATE * SECONDS)).sin()
    macs = counted_macs(lambda: model([audio]))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, "macs": macs}
