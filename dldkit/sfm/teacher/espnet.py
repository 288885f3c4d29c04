"""Models of ESPnet's SSL task as teachers."""

import tempfile
import zipfile
from pathlib import Path
from typing import Any, Optional, Sequence

import humanfriendly
import torch
import yaml
from espnet2.main_funcs.pack_funcs import unpack
from espnet2.tasks.ssl import SSLTask
from espnet2.tasks.ssl import encoder_choices as ssl_encoders
from espnet2.utils.get_default_kwargs import get_default_kwargs
from torch.nn.utils.rnn import pad_sequence

from dldkit.asr.loading import check_weights, find_checkpoint, read_checkpoint
from dldkit.errors import UserError
from dldkit.sfm.teacher.live import LiveTeacher
from dldkit.sfm.teacher.protocol import PathLike, Targets, TeacherInfo
from dldkit.sfm.wave import outputs_of


class ESPnetTeacher(LiveTeacher):
    """A model of ESPnet's SSL task."""

    @staticmethod
    def describe(path: PathLike) -> TeacherInfo:
        """Read config.yaml."""
        config = _read_config(Path(path))
        options = {
            **get_default_kwargs(ssl_encoders.get_class(config["encoder"])),
            **config["encoder_conf"],
        }
        rate = config["frontend_conf"].get("fs", 16000)
        if isinstance(rate, str):
            rate = humanfriendly.parse_size(rate)
        return TeacherInfo(options["output_size"], options["num_blocks"], rate, False)

    @staticmethod
    def weight_files(path: PathLike) -> list[Path]:
        """Return the checkpoint, or the packed zip."""
        path = Path(path)
        return [path if path.is_file() else find_checkpoint(path)]

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

    def forward(
        self,
        speech: torch.Tensor,
        speech_lengths: torch.Tensor,
        utt_ids: Optional[Sequence[str]],
    ) -> Targets:
        """Return the hidden states of all layers, and the valid frames.

        Utterances of another length run by themselves: the convolutions and the
        GroupNorm of ESPnet's models hear padding. With `normalize_audio`, each does:
        ESPnet takes mean and variance over all of the batch.
        """
        each = getattr(self.model.frontend, "normalize_audio", False)
        alike: dict[tuple[int, int], list[int]] = {}
        for place, samples in enumerate(speech_lengths.tolist()):
            alike.setdefault((samples, place if each else 0), []).append(place)
        if len(alike) == 1:  # as most batches are: no copy of them, nor of the states
            return self.encode(speech[:, : int(speech_lengths[0])], speech_lengths)
        found: list[list[torch.Tensor]] = [[] for _ in speech_lengths]
        frames = torch.zeros_like(speech_lengths)
        for (samples, _), places in alike.items():
            states, frames[places] = self.encode(
                speech[places, :samples], speech_lengths[places]
            )
            for i, place in enumerate(places):
                found[place] = [state[i] for state in states]
        return [pad_sequence(layer, True) for layer in zip(*found)], frames

    def encode(self, speech: torch.Tensor, speech_lengths: torch.Tensor) -> Targets:
        """Return what `forward` does, of utterances that are equally long."""
        with outputs_of(self.model.encoder.encoders) as states:
            output, _, lengths = self.model.inference_encode(
                speech, speech_lengths.to(speech.device)
            )
        return [*states[:-1], output], lengths.cpu()


def _read_config(path: Path) -> dict[str, Any]:
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
