"""Recognition at a chosen depth: greedy CTC, or ESPnet's beam search."""

import logging
import math
import re
import sys
import tempfile
import threading
import zipfile
from argparse import ArgumentParser
from contextlib import AbstractContextManager
from itertools import groupby
from pathlib import Path
from typing import Any, Optional, Sequence, Union

import numpy as np
import soundfile
import torch
import yaml
from espnet2.bin import asr_inference as espnet_inference
from espnet2.legacy.nets.beam_search import Hypothesis
from espnet2.main_funcs.pack_funcs import unpack
from espnet2.torch_utils.device_funcs import to_device
from espnet2.utils.pretrained import download_pretrained
from espnet2.utils.types import str_or_none

import dldkit
from dldkit.asr.hf_encoder import TooLongUttError
from dldkit.asr.loading import check_weights, encoder_states, read_checkpoint
from dldkit.asr.speech import refuse_missing_speech
from dldkit.asr.stopping import (
    BestPath,
    best_paths,
    refuse_impossible_threshold,
    stopping,
    usable_exits,
)
from dldkit.depth.profile import find_profile, fingerprint
from dldkit.depth.selector import SELECTORS
from dldkit.errors import UserError
from dldkit.options import layer_list, positive, threshold
from dldkit.parallel import refuse_missing_gpu
from dldkit.patches import patched

dldkit.register()

Speech = Union[np.ndarray, torch.Tensor]


class GreedyHypothesis(Hypothesis):
    """What greedy search found.

    Attributes:
        depth: how many layers gave it; 0 = an encoder of fixed depth.
    """

    depth: int = 0


class Speech2Text(espnet_inference.Speech2Text):
    """ESPnet's Speech2Text with run-time depth and batched greedy CTC.

    Requests of several threads can share it: they take turns. Every option of ESPnet's
    class, plus:

    Args:
        beam_size: 1 = greedy CTC; more = ESPnet's beam search.
        depth: number of encoder layers to run; None = all.
        layers: the layers themselves, instead of a depth.
        selector: `even` or `prefix`, see `dldkit.depth.selector`; None = as the model
            was trained.
        depth_profile: a file, `auto` = the checkpoint's profile if there is one beside
            it, None = the checkpoint's own BatchNorm statistics.
        exit_threshold: an utterance leaves the encoder at the first exit where CTC's
            entropy is below it (from 0 to 1, see `dldkit.asr.stopping.entropy`), and at
            the depth at the latest; None = at the depth.

    Raises:
        UserError: for an impossible depth or exit_threshold, a checkpoint that does
            not fit, or an exit_threshold for a model without exits or a beam search.
    """

    def __init__(
        self,
        asr_train_config: Union[Path, str, None] = None,
        asr_model_file: Union[Path, str, None] = None,
        *,
        beam_size: int = 1,
        depth: Optional[int] = None,
        layers: Optional[Sequence[int]] = None,
        selector: Optional[str] = None,
        depth_profile: Union[Path, str, None] = "auto",
        exit_threshold: Optional[float] = None,
        **kwargs: Any,
    ):
        if asr_model_file is None:
            raise UserError("no model to decode with: give --asr_model_file")
        # ESPnet's attention and position tables keep what they compute in the module
        self._turn = threading.RLock()
        states = read_checkpoint(asr_model_file)
        try:
            super().__init__(
                asr_train_config, asr_model_file, beam_size=beam_size, **kwargs
            )
        except FileNotFoundError as error:
            raise UserError(
                f"no {error.filename}, which {asr_model_file} needs"
            ) from error
        except RuntimeError as error:
            raise UserError(f"{asr_model_file} can not be used: {error}") from error
        if not kwargs.get("quantize_asr_model"):  # which renames the weights
            check_weights(self.asr_model, states, asr_model_file)
        self.greedy = beam_size == 1
        if self.greedy and self.asr_model.ctc is None:
            raise UserError("greedy search needs CTC: set --beam_size above 1")
        self.selector = selector
        encoder = self.asr_model.encoder
        if depth_profile == "auto":
            depth_profile = None
            if hasattr(encoder, "set_depth"):
                depth_profile = find_profile(asr_model_file, encoder_states(states))
        if depth_profile is not None:
            self._dynamic_encoder().load_depth_profile(
                depth_profile, fingerprint(encoder_states(states))
            )
        if depth is not None or layers is not None or depth_profile is not None:
            self.set_depth(depth, layers)
        self.exit_threshold = exit_threshold
        if exit_threshold is not None:
            self._refuse_beam_search()
            refuse_impossible_threshold(exit_threshold)
            usable_exits(self.asr_model.encoder)

    @classmethod
    def from_pretrained(
        cls, model_tag: Optional[str] = None, **kwargs: Any
    ) -> "Speech2Text":
        """Build from a published model or a packed zip, as ESPnet's method does."""
        if model_tag is None or not zipfile.is_zipfile(model_tag):
            found = {} if model_tag is None else download_pretrained(model_tag)
            return cls(**{**kwargs, **found})
        # not through espnet_model_zoo: its cache serves a re-packed zip's old content
        directory = tempfile.TemporaryDirectory()
        recogniser = cls(**{**kwargs, **unpack(model_tag, directory.name)})
        recogniser.unpacked = directory  # the BPE model is read when it is first needed
        return recogniser

    def set_depth(
        self, depth: Optional[int] = None, layers: Optional[Sequence[int]] = None
    ) -> None:
        """Choose the encoder layers of the utterances that follow; all by default."""
        encoder = self._dynamic_encoder()
        encoder.set_depth(depth, layers=layers, selector=self.selector)
        logging.info(f"Encoder layers: {encoder.active_layers}")

    def running(
        self, depth: Optional[int] = None, layers: Optional[Sequence[int]] = None
    ) -> AbstractContextManager[None]:
        """Recognise at another depth, in this thread, while the context lasts.

        So requests of several threads, at different depths, can share one model.
        """
        encoder = self._dynamic_encoder()
        return encoder.running(encoder.choose_layers(depth, layers, self.selector))

    def _refuse_beam_search(self) -> None:
        if not self.greedy:
            raise UserError(
                "exit_threshold with a beam search: just greedy search stops early; "
                "set beam_size 1, or no exit_threshold"
            )

    def _dynamic_encoder(self):
        encoder = self.asr_model.encoder
        if not hasattr(encoder, "set_depth"):
            raise UserError(
                f"{type(encoder).__name__} has no run-time depth: train with encoder: "
                "ld_conformer, or another ld_* encoder"
            )
        return encoder

    def __call__(self, speech, exit_threshold: Optional[float] = None):
        """Recognise one utterance (Samples,), or a list of them.

        Args:
            exit_threshold: of this request, for greedy search; None = as it was built.
        """
        if exit_threshold is not None:
            self._refuse_beam_search()
        if not self.greedy:
            with self._turn:
                return super().__call__(speech)
        if isinstance(speech, (list, tuple)):
            return self.batch_decode(speech, exit_threshold=exit_threshold)
        return self.batch_decode([speech], exit_threshold=exit_threshold)[0]

    @torch.no_grad()
    def batch_decode(
        self,
        speech: Union[torch.Tensor, Sequence[Speech]],
        speech_lengths: Optional[torch.Tensor] = None,
        exit_threshold: Optional[float] = None,
    ) -> list[list[tuple]]:
        """Recognise a batch; see ESPnet's Speech2Text.batch_decode, and `__call__`."""
        if not self.greedy:
            with self._turn:
                return super().batch_decode(speech, speech_lengths)
        batch = self.padded(speech, speech_lengths)
        # these two lines of an utterance are what ESPnet's calculate_rtf.py reads
        for length in batch["speech_lengths"].tolist():
            logging.info(f"speech length: {length}")
        if exit_threshold is None:
            exit_threshold = self.exit_threshold
        with self._turn:
            paths = self._paths(batch, exit_threshold)
        return [[self._greedy_result(path)] for path in paths]

    def padded(
        self,
        speech: Union[torch.Tensor, Sequence[Speech]],
        speech_lengths: Optional[torch.Tensor] = None,
    ) -> dict[str, torch.Tensor]:
        """Return a batch of utterances (Samples,) as the model takes it."""
        if isinstance(speech, (list, tuple)):
            speech = [torch.as_tensor(np.asarray(s)) for s in speech]
            speech_lengths = torch.tensor([len(s) for s in speech])
            speech = torch.nn.utils.rnn.pad_sequence(speech, batch_first=True)
        batch = {
            "speech": speech.to(getattr(torch, self.dtype)),
            "speech_lengths": speech_lengths,
        }
        return to_device(batch, self.device)

    def _paths(
        self, batch: dict[str, torch.Tensor], exit_threshold: Optional[float]
    ) -> list[BestPath]:
        model = self.asr_model
        if exit_threshold is not None:
            refuse_impossible_threshold(exit_threshold)
            exits = usable_exits(model.encoder)
            with stopping(model, exits, exit_threshold) as found:
                model.encode(**batch)
            return [found[i] for i in range(len(found))]
        encoded, lengths = model.encode(**batch)
        if isinstance(encoded, tuple):  # with intermediate outputs
            encoded = encoded[0]
        depth = len(getattr(model.encoder, "active_layers", ()))
        return best_paths(model.ctc.log_softmax(encoded), lengths, depth)

    def _greedy_result(self, path: BestPath):
        blank, eos = self.asr_model.blank_id, self.asr_model.eos
        token_int = [t for t, _ in groupby(path.tokens) if t not in (blank, eos)]
        token = self.converter.ids2tokens(token_int)
        text = self.tokenizer.tokens2text(token) if self.tokenizer else None
        logging.info(f"best hypo: {''.join(token)}\n")
        yseq = torch.tensor([self.asr_model.sos, *token_int, eos])
        hypothesis = GreedyHypothesis(yseq, path.score)
        hypothesis.depth = path.depth
        return text, token, token_int, hypothesis


def inference(
    depth: Optional[int],
    layers: Optional[Sequence[int]],
    selector: Optional[str],
    depth_profile: Optional[str],
    exit_threshold: Optional[float],
    **espnet_options: Any,
) -> None:
    """Run ESPnet's `asr_inference` with the depth options of `Speech2Text`.

    ESPnet's own loop reads data, decodes and writes; it looks its Speech2Text up by
    name, which is where ours comes in. With an exit_threshold, `depth` is written
    beside `score`: the depth at which each utterance left. What the encoder can not
    take has an empty hypothesis: of score 0 where it is too short, as in ESPnet, and
    of -inf where it is too long.
    """
    unheard_result = espnet_inference._too_short_result

    def too_short_or_long(*args):
        results = unheard_result(*args)
        if isinstance(sys.exception(), TooLongUttError):
            results = [[*found, h._replace(score=-math.inf)] for *found, h in results]
        return results

    write_results = espnet_inference._write_results

    def write_with_depth(writer, key, results, **options):
        write_results(writer=writer, key=key, results=results, **options)
        hypothesis = results[0][-1]
        if hasattr(hypothesis, "depth"):  # else the encoder could not take it
            writer["1best_recog"]["depth"][key] = str(hypothesis.depth)

    class DepthSpeech2Text(Speech2Text):
        def __init__(self, **kwargs):
            super().__init__(
                depth=depth,
                layers=layers,
                selector=selector,
                depth_profile=depth_profile,
                exit_threshold=exit_threshold,
                **kwargs,
            )

    refuse_missing_gpu(espnet_options["ngpu"])
    writes = write_results if exit_threshold is None else write_with_depth
    for path, _, kind in espnet_options["data_path_and_name_and_type"]:
        refuse_missing_speech(path, kind)
    try:
        with (
            patched(espnet_inference, "Speech2Text", DepthSpeech2Text),
            patched(espnet_inference, "_write_results", writes),
            patched(espnet_inference, "_too_short_result", too_short_or_long),
        ):
            espnet_inference.inference(**espnet_options)
    except (soundfile.LibsndfileError, OSError) as error:
        # from a worker process, its message holds a stack trace; and torch gives
        # libsndfile's error this message as its number, so that str() fails
        message = error.args[0] if isinstance(error.args[0], str) else str(error)
        raise UserError(f"decoding stopped: {message.splitlines()[-1]}") from error


def read_options(cmd: Optional[Sequence[str]] = None) -> dict[str, Any]:
    """Read the options of `inference` from a command line.

    Raises:
        UserError: the file of --config is no YAML.
    """
    try:
        options = vars(get_parser().parse_args(cmd))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise UserError(f"--config is no YAML file: {where}") from None
    del options["config"]
    return options


def get_parser() -> ArgumentParser:
    """Return ESPnet's parser with the depth options; greedy search is the default."""
    parser = espnet_inference.get_parser()
    for action in parser._actions:  # ESPnet's help has a bare % that stops --help
        action.help = action.help and re.sub(r"%(?![(%])", "%%", action.help)
    group = parser.add_argument_group("Depth related")
    depth = group.add_mutually_exclusive_group()
    depth.add_argument("--depth", type=positive, help="Number of encoder layers to run")
    depth.add_argument("--layers", type=layer_list, help="Layers to run, as 0,3,7")
    group.add_argument(
        "--selector",
        choices=list(SELECTORS),
        help="Which layers a depth means; default: as the model was trained",
    )
    group.add_argument(
        "--depth_profile",
        type=str_or_none,
        default="auto",
        help="File of dldkit.bin.calibrate; auto = that of the checkpoint; none",
    )
    group.add_argument(
        "--exit_threshold",
        type=threshold,
        help="An utterance leaves the encoder at the first exit where CTC's entropy, "
        "from 0 to 1, is below this; the depths are written beside the scores",
    )
    parser.set_defaults(beam_size=1, batch_size=16)
    return parser
