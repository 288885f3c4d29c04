"""Whisper's encoder as the teacher."""

from typing import Optional, Sequence

import torch
import torch.nn.functional as F
import transformers

from dldkit.asr.hf_encoder import weight_files
from dldkit.data.segments import FRAME
from dldkit.sfm.pretrained import load_whisper_encoder
from dldkit.sfm.teacher import hub
from dldkit.sfm.teacher.live import LiveTeacher
from dldkit.sfm.teacher.protocol import PathLike, Targets, TeacherInfo
from dldkit.sfm.wave import frame_mask, log_mel, outputs_of


class WhisperTeacher(LiveTeacher):
    """Whisper's encoder, fed as it was trained: 30 s of log-mel features.

    A frame belongs to the speech when all of its 320 samples do: that is never more
    than one frame away from what the CNN of HuBERT gives.
    """

    @staticmethod
    def describe(path: PathLike) -> TeacherInfo:
        """Read config.json and preprocessor_config.json."""
        config = hub.read_config(path)
        rate = WhisperTeacher.feature_extractor(path).sampling_rate
        return TeacherInfo(config.d_model, config.encoder_layers, rate, False)

    weight_files = staticmethod(weight_files)

    @staticmethod
    def feature_extractor(path: PathLike):
        """Return what makes log-mel features of waveforms."""
        try:
            return transformers.WhisperFeatureExtractor.from_pretrained(path)
        except OSError:  # all Whisper models agree but for the number of mel bins
            bins = hub.read_config(path).num_mel_bins
            return transformers.WhisperFeatureExtractor(feature_size=bins)

    def load(self, path: PathLike) -> torch.nn.Module:
        """Build the encoder, which is the whole of a checkpoint or a part of it."""
        self.extract = self.feature_extractor(path)
        encoder = load_whisper_encoder(path, "teacher", hub.read_config(path))
        self.truncate(encoder, encoder.layers, "layer_norm")
        return encoder

    def forward(
        self,
        speech: torch.Tensor,
        speech_lengths: torch.Tensor,
        utt_ids: Optional[Sequence[str]],
    ) -> Targets:
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
