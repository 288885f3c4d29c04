"""Distillation of a speech foundation model into a student of variable depth."""

import functools
import logging
from typing import Any, Mapping, Optional, Sequence, Union

import torch
from espnet2.torch_utils.device_funcs import force_gatherable
from espnet2.train.abs_espnet_model import AbsESPnetModel

from dldkit.depth.sampler import DepthSampler
from dldkit.errors import UserError
from dldkit.sfm.loss import HiddenStateLoss, trim
from dldkit.sfm.student import build_student, copy_layers
from dldkit.sfm.teacher.cached import CachedTeacher
from dldkit.sfm.teacher.opening import open_teacher
from dldkit.sfm.teacher.protocol import Teacher
from dldkit.sfm.wave import (
    cnn_features,
    frame_lengths,
    hidden_states,
    normalize_speech,
    states_of_depth,
)
from dldkit.signature import checked_options

CARRIED_BY = ("position", "copies", "last")


class SFMDistillModel(AbsESPnetModel):
    """A student that learns a frozen teacher's hidden states (arXiv 2606.11766).

    With `exits`, the loss is the mean over the depth that a step runs and the exits
    below it (as early exit does in ASR: arXiv 2309.09546). Each learns all teacher
    layers. With `second_teacher`, it is the mean over both teachers.

    Args:
        student_conf: keys of `transformers.HubertConfig`.
        teacher: Hugging Face name or directory, ESPnet SSL model, or a directory of
            cached targets.
        teacher_layers: which of its layers are learnt, from 1, or the means of groups
            of them, as in [[1, 2, 3], 4]; null = at a third, two thirds and the end of
            its depth.
        layer_weight: weight of the layer-to-layer term.
        loss: `mse` | `l1_cosine`.
        target_norm: `none` | `layer`, see `HiddenStateLoss`.
        carried_by: which of the student's running layers carries which teacher layer:
            the one at the same share of the depth (`position`), the last copy of the
            layer that carried it in the first stage of growth (`copies`), or always the
            deepest one, which then has a prediction head for each (`last`).
        student_layers: the same for the depths that it names, as {3: [1, 2, 3],
            6: [2, 4, 6]}; with `copies`, training fills it in.
        cnn_init: `teacher` copies the weights of its CNN front end; null = random.
        layer_init: teacher layers, from 1, whose weights the student's first layers
            begin with, one each; null = random.
        freeze_cnn: keep the CNN front end as it is.
        depth_sampler: how many layers a training step runs: `full` | `bernoulli` |
            `uniform` | `exits` | the weight of each depth, as {12: 2, 6: 1, 3: 1}.
        keep_prob: probability of keeping a layer, for `bernoulli`.
        min_depth: fewest layers of a training step.
        layer_choice: which layers a drawn depth means: `random` | `even` | `prefix`.
            The latter two are what it means at export, too.
        exits: depths that have projections of their own, and whose output is trained
            as well where a step passes them on its way to a deeper one. A number
            stands for every so many layers. Needs `layer_choice: prefix`. A drawn depth
            that is none has the projections of the next exit.
        teacher_size: dimension of its hidden states; null = ask the teacher.
        normalize: bring speech to zero mean and unit variance; null = as the teacher.
        sampling_rate: of the speech in Hz; left out of a training's config = that of
            the teacher.
        second_teacher: another one that is learnt as well, as `teacher`, but no cached
            targets: it runs beside the student. The same layers of the student carry
            the layers of both.
        second_layers: which of its layers are learnt, as many as `teacher_layers`.
        second_size: dimension of its hidden states; null = ask it.

    Raises:
        UserError: for options that are out of range or do not fit each other.
    """

    # collect_stats needs the lengths of the speech, nothing else
    extract_feats_in_collect_stats = False

    @checked_options
    def __init__(
        self,
        student_conf: dict[str, Any],
        teacher: Optional[str] = None,
        teacher_layers: Optional[Sequence[Union[int, Sequence[int]]]] = None,
        layer_weight: float = 0.5,
        loss: str = "mse",
        student_layers: Optional[dict[Union[int, str], Sequence[int]]] = None,
        cnn_init: Optional[str] = None,
        freeze_cnn: bool = False,
        depth_sampler: Union[str, Mapping[int, float]] = "full",
        keep_prob: float = 0.5,
        min_depth: int = 1,
        layer_choice: str = "random",
        exits: Union[int, Sequence[int], None] = (),
        teacher_size: Optional[int] = None,
        normalize: Optional[bool] = None,
        target_norm: str = "none",
        carried_by: str = "position",
        layer_init: Optional[Sequence[int]] = None,
        sampling_rate: int = 16000,
        second_teacher: Optional[str] = None,
        second_layers: Optional[Sequence[Union[int, Sequence[int]]]] = None,
        second_size: Optional[int] = None,
    ):
        super().__init__()
        if cnn_init not in (None, "teacher"):
            raise UserError(f"unknown cnn_init {cnn_init!r}: choose teacher or null")
        if carried_by not in CARRIED_BY:
            raise UserError(
                f"unknown carried_by {carried_by!r}: choose {', '.join(CARRIED_BY)}"
            )
        sampler = DepthSampler(depth_sampler, keep_prob, min_depth, layer_choice, exits)
        self.student = build_student(student_conf, sampler)
        self.layer_init = list(layer_init or ())
        self.num_layers = num_layers = self.student.config.num_hidden_layers
        if len(self.layer_init) > num_layers or any(n < 1 for n in self.layer_init):
            raise UserError(
                f"layer_init {self.layer_init}: list teacher layers from 1, for "
                f"{num_layers} layers of the student at most"
            )
        self.selector = sampler.selector
        self.exits = sampler.exits_of(num_layers)

        def new_loss(size: int, layers: Sequence) -> HiddenStateLoss:
            student_size = self.student.config.hidden_size
            return HiddenStateLoss(
                student_size, size, layers, layer_weight, loss, target_norm
            )

        self.loss = new_loss(teacher_size, teacher_layers)
        self.exit_losses = torch.nn.ModuleDict(
            {str(depth): new_loss(teacher_size, teacher_layers) for depth in self.exits}
        )
        if second_teacher and len(second_layers) != len(teacher_layers):
            raise UserError(
                f"second_layers {list(second_layers)}: list as many as teacher_layers "
                f"{list(teacher_layers)}, as the same layers of the student carry them"
            )
        self.second_losses = torch.nn.ModuleDict(
            {
                str(depth): new_loss(second_size, second_layers)
                for depth in ([*self.exits, num_layers] if second_teacher else ())
            }
        )
        self.student_layers = _checked(
            student_layers or {}, num_layers, len(teacher_layers)
        )
        self.carried_by = carried_by
        self.normalize = bool(normalize)
        self.sampling_rate = sampling_rate
        self.cnn_init = cnn_init
        self.freeze_cnn = freeze_cnn
        if freeze_cnn:
            self.student.feature_extractor._freeze_parameters()
        self.teacher_path = teacher
        self.second_path = second_teacher
        # No submodule on purpose: the teacher stays out of the state dict, the
        # optimiser and averaging. It is opened at the first step, so export does
        # without it.
        self._teacher: Optional[Teacher] = None
        self._second: Optional[Teacher] = None
        self._shares_cnn = False
        self._loaded: set[torch.nn.Module] = set()
        for part in (self.student.feature_extractor, self.student.encoder.layers):
            remember = functools.partial(self._remember_loading, part)
            for module in part.modules():  # init_param may name one of them
                module.register_load_state_dict_pre_hook(remember)

    def forward(
        self,
        speech: torch.Tensor,
        speech_lengths: torch.Tensor,
        targets: Optional[torch.Tensor] = None,
        targets_lengths: Optional[torch.Tensor] = None,
        lengths_on_host: Optional[dict[str, list[int]]] = None,
        clean: Optional[torch.Tensor] = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """Return the loss, its parts, and the batch size.

        Args:
            speech: (Batch, Samples), or cached features of the teacher's CNN (Batch,
                Time, Channels).
            speech_lengths: (Batch,).
            targets: of a cached teacher, as ESPnet read them and `CropCollateFn` cut
                them (Batch, Time, Layers, Dim).
            targets_lengths: (Batch,).
            lengths_on_host: the same lengths, for which no step has to wait; of
                `CropCollateFn`.
            clean: what a live teacher hears, where it is not `speech` (Batch, Samples).
            kwargs: `utt_id`, a list, for messages.
        """
        if lengths_on_host is not None:
            speech_lengths = torch.tensor(lengths_on_host["speech"])
            if targets is not None:
                targets_lengths = torch.tensor(lengths_on_host["targets"])
        speech_lengths = speech_lengths.cpu()
        speech = speech[:, : int(speech_lengths.max())]
        teacher = self.open_teacher(speech.device)
        features, lengths = self.cnn_features(speech, speech_lengths)
        known = {}
        if isinstance(teacher, CachedTeacher):
            known = dict(targets=targets, targets_lengths=targets_lengths)
        utts = kwargs.get("utt_id")
        sound = speech if clean is None else clean[:, : speech.size(1)]
        heard = sound, speech_lengths
        if self._shares_cnn and clean is None:
            heard = features, lengths
        expected, expected_lengths = teacher(*heard, utts, **known)
        if self._second is not None:
            second, second_lengths = self._second(sound, speech_lengths, utts)
            expected = [*expected, *second]
            expected_lengths = torch.minimum(expected_lengths, second_lengths)
        states = hidden_states(self.student, features, lengths)
        states, expected, lengths = trim(states, lengths, expected, expected_lengths)
        depth = len(states) - 1
        depths = [*(exit_ for exit_ in self.exits if exit_ < depth), depth]
        found = [self._loss_at(d, states, expected, lengths) for d in depths]
        losses, parts = zip(*found)
        loss = sum(losses) / len(losses)
        stats = {name: sum(p[name] for p in parts) / len(parts) for name in parts[0]}
        stats.update(loss=loss.detach(), depth=loss.new_full((), depth))
        if self.exits and not self.training:
            for d, value in zip(depths, losses):
                stats[f"loss_depth{d}"] = value.detach()
        weight = torch.full((), speech.size(0), device=loss.device)
        return force_gatherable((loss, stats, weight), loss.device)

    def _loss_at(
        self,
        depth: int,
        states: Sequence[torch.Tensor],
        expected: Sequence[torch.Tensor],
        lengths: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss of the first `depth` layers that run, and its parts."""
        losses = self._losses_of(depth)
        layers = self.student_layers.get(depth)
        if layers is None and self.carried_by == "last":
            layers = [depth] * len(self.loss.groups)
        states = states_of_depth(self.student, states, depth)
        rest, values, stats = iter(expected), [], {}
        for prefix, loss in losses.items():
            targets = [next(rest) for _ in loss.teacher_layers]
            value, parts = loss(states, targets, lengths, layers)
            values.append(value)
            stats.update({prefix + name: part for name, part in parts.items()})
        return sum(values) / len(values), stats

    def _losses_of(self, depth: int) -> dict[str, HiddenStateLoss]:
        """Return the loss of each teacher at a depth, by the prefix of its stats."""
        exit_ = next((exit_ for exit_ in self.exits if exit_ >= depth), None)
        losses = {"": self.loss if exit_ is None else self.exit_losses[str(exit_)]}
        if self.second_losses:
            losses["second_"] = self.second_losses[str(exit_ or self.num_layers)]
        return losses

    def grown(self, before: int, after: int) -> None:
        """Let the projections of a new depth begin as those of the depth before."""
        known, new = self._losses_of(before), self._losses_of(after)
        for name, loss in new.items():
            loss.load_state_dict(known[name].state_dict())

    def cnn_features(
        self, speech: torch.Tensor, speech_lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the student's CNN features (Batch, Time, Channels), and valid frames.

        Raises:
            UserError: cached ones are given, but its CNN is not the teacher's.
        """
        if speech.dim() == 3:
            if not self._shares_cnn:
                raise UserError(
                    "the features that were cached are those of the teacher's CNN, and "
                    "the student has another one: set cnn_init: teacher and "
                    "freeze_cnn: true, leave normalize and init_param out, or set "
                    "cached_features: false"
                )
            return speech, speech_lengths
        if self.normalize:
            speech = normalize_speech(speech, speech_lengths)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_cnn):
            features = cnn_features(self.student, speech, speech_lengths)
        return features, frame_lengths(self.student, speech_lengths)

    def hidden_states(
        self, speech: torch.Tensor, speech_lengths: torch.Tensor
    ) -> list[torch.Tensor]:
        """Return the student's hidden states (Batch, Time, Dim), as `wave` does."""
        return hidden_states(self.student, *self.cnn_features(speech, speech_lengths))

    def collect_feats(
        self, speech: torch.Tensor, speech_lengths: torch.Tensor, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """Return the speech: the student has no features to collect."""
        return {"feats": speech, "feats_lengths": speech_lengths}

    def open_teacher(self, device: torch.device) -> Teacher:
        """Open the teachers at the first use, and take over the weights that are asked.

        Raises:
            UserError: when it can not be loaded, or its weights do not fit.
        """
        if self._teacher is None:
            self._teacher = open_teacher(
                self.teacher_path, self.loss.teacher_layers, device
            )
            if self.layer_init and not self._is_loaded(
                self.student.encoder.layers, f"layer_init: {self.layer_init}"
            ):
                self._copy_layers()
            if self.cnn_init == "teacher" and not self._is_loaded(
                self.student.feature_extractor, "cnn_init: teacher"
            ):
                self._copy_cnn()
            self._shares_cnn = self.freeze_cnn and self._has_the_teachers_cnn()
            if self.second_path:
                layers = self.second_losses[str(self.num_layers)].teacher_layers
                self._second = open_teacher(self.second_path, layers, device)
        return self._teacher

    def _remember_loading(
        self,
        part: torch.nn.Module,
        module: torch.nn.Module,
        states: Mapping[str, Any],
        prefix: str,
        *_: Any,
    ) -> None:
        """Know what was resumed or initialised: it is not the teacher's turn.

        ESPnet loads all parts of a model, those that init_param leaves out as they are.
        """
        for name, weight in module.named_parameters(recurse=False):
            loaded = states.get(prefix + name)
            if loaded is not None and not torch.equal(loaded.to(weight), weight):
                self._loaded.add(part)

    def _is_loaded(self, part: torch.nn.Module, option: str) -> bool:
        is_loaded = part in self._loaded
        if is_loaded:
            logging.info(
                f"{option} is not done, because weights were loaded (init_param, or a "
                "training that is resumed)"
            )
        return is_loaded

    def _copy_layers(self) -> None:
        path = self.teacher_path
        if isinstance(self._teacher, CachedTeacher):  # targets have no weights
            path = self._teacher.made_by
        try:
            # once more, as deep as is needed here
            opened = open_teacher(path, [max(self.layer_init)])
            copy_layers(self.student, opened.model, self.layer_init)
        except UserError as error:
            raise UserError(
                f"layer_init {self.layer_init}: the weights of {path}: {error}. Or "
                "leave layer_init out"
            ) from error

    def _copy_cnn(self) -> None:
        cnn = _cnn(self._teacher)
        try:
            if cnn is None:
                raise RuntimeError("it has no CNN on waveforms that could be read")
            self.student.feature_extractor.load_state_dict(cnn.state_dict())
        except RuntimeError as error:
            raise UserError(
                f"cnn_init: teacher: the CNN of {self.teacher_path} does not fit the "
                f"student's: {error}. Give student_conf the conv_* and feat_extract_* "
                "values of the teacher, or set cnn_init: null"
            ) from error

    def _has_the_teachers_cnn(self) -> bool:
        cnn = _cnn(self._teacher)
        if cnn is None or self._teacher.info.normalize != self.normalize:
            return False
        # not by their weights alone: strides and activations have none
        device = next(self.student.parameters()).device
        sound = torch.arange(4000.0, device=device).sin()[None]
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return torch.equal(self.student.feature_extractor(sound), cnn(sound))


def _cnn(teacher: Teacher) -> Optional[torch.nn.Module]:
    return getattr(getattr(teacher, "model", None), "feature_extractor", None)


def _checked(
    student_layers: dict[Union[int, str], Sequence[int]],
    num_layers: int,
    num_teacher_layers: int,
) -> dict[int, Sequence[int]]:
    for depth, layers in student_layers.items():
        if str(depth) not in map(str, range(1, num_layers + 1)):
            raise UserError(
                f"student_layers {depth}: write depths from 1 to {num_layers}, which "
                "the student has"
            )
        fits = len(layers) == num_teacher_layers
        if not fits or not all(1 <= layer <= int(depth) for layer in layers):
            raise UserError(
                f"student_layers {depth}: {list(layers)}: list {num_teacher_layers} "
                f"layers from 1 to {depth}, one for each of teacher_layers"
            )
    return {int(depth): list(layers) for depth, layers in student_layers.items()}
