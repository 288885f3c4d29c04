"""Teachers that take waveforms: HuBERT, WavLM, wav2vec2 and their like."""

import copy
from typing import Optional, Sequence

import torch
import transformers

from dldkit.asr.hf_encoder import weight_files
from dldkit.errors import UserError
from dldkit.sfm.pretrained import expected_speech, load_pretrained
from dldkit.sfm.teacher import hub
from dldkit.sfm.teacher.live import LiveTeacher
from dldkit.sfm.teacher.protocol import PathLike, Targets, TeacherInfo
from dldkit.sfm.wave import (
    cnn_features,
    frame_lengths,
    hidden_states,
    normalize_speech,
)

WAVE_MODELS = ("hubert", "wavlm", "wav2vec2", "unispeech-sat", "data2vec-audio")


class WaveTeacher(LiveTeacher):
    """HuBERT, WavLM, wav2vec2 and their like, of Hugging Face transformers."""

    @staticmethod
    def describe(path: PathLike) -> TeacherInfo:
        """Read config.json and preprocessor_config.json."""
        config = hub.read_config(path)
        if config.model_type not in WAVE_MODELS:
            raise UserError(
                f"the teacher {path} is a {config.model_type} model: choose one of "
                f"{', '.join(WAVE_MODELS)} or whisper"
            )
        rate, normalize = expected_speech(path)
        return TeacherInfo(
            config.hidden_size, config.num_hidden_layers, rate, normalize
        )

    weight_files = staticmethod(weight_files)

    def load(self, path: PathLike) -> torch.nn.Module:
        """Build the model."""
        config = hub.read_config(path)
        config.add_adapter = False  # it would follow the output and lower its rate
        model = load_pretrained(transformers.AutoModel, path, "teacher", config=config)
        stable = getattr(config, "do_stable_layer_norm", False)
        norm = "layer_norm" if stable else None  # else it precedes the first block
        self.truncate(model.encoder, model.encoder.layers, norm)
        return model

    def forward(
        self,
        speech: torch.Tensor,
        speech_lengths: torch.Tensor,
        utt_ids: Optional[Sequence[str]],
    ) -> Targets:
        """Return the hidden states of all layers, and the valid frames."""
        if speech.dim() == 3:
            return hidden_states(self.model, speech, speech_lengths), speech_lengths
        lengths = frame_lengths(self.model, speech_lengths)
        if int(lengths.min()) < 1:
            place = int(lengths.argmin())
            samples = int(speech_lengths[place])
            self.refuse(utt_ids, place, samples, "too few, filter it away,")
        features = self.cnn_features(speech, speech_lengths)
        return hidden_states(self.model, features, lengths), lengths

    def cnn_features(
        self, speech: torch.Tensor, speech_lengths: torch.Tensor
    ) -> torch.Tensor:
        """Return the CNN's features (Batch, Time, Channels) of (Batch, Samples)."""
        if self.info.normalize:
            speech = normalize_speech(speech, speech_lengths)
        return cnn_features(self.model, speech, speech_lengths)

    def save_cnn(self, path: PathLike) -> None:
        """Write the CNN to a directory, as a model of its family without layers."""
        config = copy.deepcopy(self.model.config)
        config.num_hidden_layers = 0
        model = type(self.model)(config)
        model.feature_extractor.load_state_dict(
            self.model.feature_extractor.state_dict()
        )
        model.save_pretrained(path)
