"""Distillation of speech foundation models as an ESPnet task."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Callable, Optional

import torch
from espnet2.fileio.read_text import load_num_sequence_text
from espnet2.iterators.abs_iter_factory import AbsIterFactory
from espnet2.tasks.abs_task import AbsTask, IteratorOptions
from espnet2.train.abs_espnet_model import AbsESPnetModel
from espnet2.train.class_choices import ClassChoices
from espnet2.train.collate_fn import CommonCollateFn
from espnet2.train.distributed_utils import DistributedOption
from espnet2.utils.nested_dict_action import NestedDictAction
from espnet2.utils.types import str2bool, str_or_none

import dldkit
from dldkit.data.frames import read_in_training
from dldkit.errors import UserError
from dldkit.sfm.batches import LengthBuckets, report_used
from dldkit.sfm.data import (
    FEATURES,
    TARGETS,
    CropCollateFn,
    NoisySpeech,
    refuse_other_rates,
)
from dldkit.sfm.model import SFMDistillModel
from dldkit.sfm.options import (
    complete,
    follow_copies,
    named_teacher,
    refuse_lost_layers,
    refuse_own_cnn,
    refuse_unfit_second,
    refuse_wasteful_crops,
    refuse_with_shar,
)
from dldkit.sfm.shar import SharIterFactory, find_shards, refuse_other_rate
from dldkit.sfm.teacher.cached import is_cached
from dldkit.sfm.teacher.opening import teacher_info, weight_files
from dldkit.train.choices import TrainerChoice, trainer_choices

# Children of multi-GPU training import just this module.
dldkit.register()

model_choices = ClassChoices(
    name="model",
    classes=dict(sfm_distill=SFMDistillModel),
    type_check=AbsESPnetModel,
    default="sfm_distill",
)

# ESPnet's options of noise and reverberation, which only the student hears in training:
# type, ESPnet's default, help
NOISE = dict(
    rir_scp=(str_or_none, None, "Table of room impulse responses for the student"),
    rir_apply_prob=(float, 1.0, "Share of the utterances that get one"),
    noise_scp=(str_or_none, None, "Table of noises for the student"),
    noise_apply_prob=(float, 1.0, "Share of the utterances that get noise"),
    noise_db_range=(str, "13_15", "Range of the signal-to-noise ratio in dB"),
    short_noise_thres=(float, 0.5, "Warn of noise below this share of the speech"),
)


class SFMDistillTask(TrainerChoice, AbsTask):
    """Distils a frozen teacher into a student of variable depth."""

    class_choices_list = [model_choices, trainer_choices]

    @classmethod
    def add_task_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the options of this task."""
        group = parser.add_argument_group("Task related")
        group.add_argument(
            "--student_conf",
            action=NestedDictAction,
            default=dict(),
            help="The student: keys of transformers.HubertConfig",
        )
        group.add_argument(
            "--collate_fn_conf",
            action=NestedDictAction,
            default=dict(),
            help="Batches: crop (true: cut all to the shortest utterance, false: pad) "
            "and max_seconds (longer ones are cut)",
        )
        group.add_argument(
            "--cached_features",
            type=str2bool,
            default=False,
            help="Read no audio, but what `sfm_collect_targets --features` cached; for "
            "a student that has the teacher's CNN, frozen",
        )
        group.add_argument(
            "--train_shar",
            type=str_or_none,
            default=None,
            help="Directory in lhotse's Shar format, of which the training data are "
            "streamed, in place of train_data_path_and_name_and_type; needs "
            "num_iters_per_epoch",
        )
        for name, (kind, default, text) in NOISE.items():
            group.add_argument(f"--{name}", type=kind, default=default, help=text)
        for choices in cls.class_choices_list:
            choices.add_arguments(group)
        parser.set_defaults(batch_type="sorted")

    @classmethod
    def build_iter_factory(
        cls,
        args: argparse.Namespace,
        distributed_option: DistributedOption,
        mode: str,
        kwargs: Optional[dict] = None,
    ) -> AbsIterFactory:
        """Return ESPnet's factory, or one that streams the training data."""
        if mode != "train" or not args.train_shar:
            return super().build_iter_factory(args, distributed_option, mode, kwargs)
        ranks = {}
        if distributed_option.distributed:
            ranks["rank"] = torch.distributed.get_rank()
            ranks["world_size"] = torch.distributed.get_world_size()
        return SharIterFactory(
            args.train_shar,
            args.batch_size,
            args.num_iters_per_epoch,
            args.seed,
            cls.build_collate_fn(args, train=True),
            cls.build_preprocess_fn(args, train=True),
            args.num_workers,
            pin_memory=args.ngpu > 0,
            **ranks,
        )

    @classmethod
    def build_sequence_iter_factory(
        cls, args: argparse.Namespace, iter_options: IteratorOptions, mode: str
    ) -> AbsIterFactory:
        """Return ESPnet's factory; sorted batches for training are drawn anew."""
        factory = super().build_sequence_iter_factory(args, iter_options, mode)
        if mode == "train":
            samples = _samples(iter_options)
            if iter_options.batch_type == "sorted":
                factory.sampler = LengthBuckets(list(factory.sampler), samples)
            _report_used(factory, iter_options, samples)
        return factory

    @classmethod
    def build_category_iter_factory(
        cls, args: argparse.Namespace, iter_options: IteratorOptions, mode: str
    ) -> AbsIterFactory:
        """Return ESPnet's factory, which mixes corpora."""
        factory = super().build_category_iter_factory(args, iter_options, mode)
        if mode == "train":
            _report_used(factory, iter_options, _samples(iter_options))
        return factory

    @classmethod
    def build_collate_fn(cls, args: argparse.Namespace, train: bool) -> Callable:
        """Return what makes batches."""
        try:
            rate = teacher_info(named_teacher(args.model_conf)).sampling_rate
            crop = CropCollateFn(train, **{"fs": rate, **args.collate_fn_conf})
        except TypeError as error:
            raise UserError(f"collate_fn_conf: {error}") from None
        # statistics are the lengths of whole utterances
        return CommonCollateFn() if args.collect_stats else crop

    @classmethod
    def build_preprocess_fn(
        cls, args: argparse.Namespace, train: bool
    ) -> Optional[Callable]:
        """Return what adds noise and reverberation for the student, in training."""
        if not train or not (args.noise_scp or args.rir_scp):
            return None
        conf = args.model_conf
        keep_clean = not is_cached(named_teacher(conf)) or conf.get("second_teacher")
        return NoisySpeech(
            bool(keep_clean), **{name: getattr(args, name) for name in NOISE}
        )

    @classmethod
    def required_data_names(
        cls, train: bool = True, inference: bool = False
    ) -> tuple[str, ...]:
        """Return the data that training needs."""
        return ("speech",)

    @classmethod
    def optional_data_names(
        cls, train: bool = True, inference: bool = False
    ) -> tuple[str, ...]:
        """Return the data that training may have."""
        return (TARGETS,)

    @classmethod
    def build_model(cls, args: argparse.Namespace) -> AbsESPnetModel:
        """Build the model; what depends on the teacher is written into `args`.

        So the config that training saves is enough to build the student again.

        Raises:
            UserError: for options that do not fit.
        """
        args.model_conf = follow_copies(
            complete(args.model_conf), args.trainer, args.trainer_conf
        )
        refuse_lost_layers(args.model_conf, args.trainer, args.trainer_conf)
        try:
            return model_choices.get_class(args.model)(
                student_conf=args.student_conf, **args.model_conf
            )
        except TypeError as error:
            raise UserError(f"model_conf: {error}") from error

    @classmethod
    def check_data(cls, args: argparse.Namespace) -> None:
        """Let training read what is cached; refuse another rate than the teacher's."""
        teacher = named_teacher(args.model_conf)
        if args.train_shar:
            refuse_with_shar(args)
            refuse_other_rate(args.train_shar, teacher_info(teacher).sampling_rate)
        elif not args.collect_stats and not is_cached(teacher):
            refuse_wasteful_crops(args)
        entries = (
            args.train_data_path_and_name_and_type,
            args.valid_data_path_and_name_and_type,
        )
        refuse_unfit_second(args.model_conf, args.cached_features)
        command = "sfm_collect_targets"
        if not args.collect_stats and is_cached(teacher):
            read_in_training(args, Path(teacher), TARGETS, command)
        if not args.collect_stats and args.cached_features:
            refuse_own_cnn(args.model_conf)
            directory = Path(teacher) / FEATURES
            read_in_training(args, directory, FEATURES, f"{command} --features")
            for data in entries:  # in place of the waveforms, which may be gone
                data[:] = [
                    (path, "speech" if name == FEATURES else name, kind)
                    for path, name, kind in data
                    if name != "speech"
                ]
        noises = [path for path in (args.noise_scp, args.rir_scp) if path]
        if noises and args.cached_features:
            raise UserError(
                f"{noises[0]}: with cached_features: true no audio is read to which it "
                "could be added: leave noise_scp and rir_scp out, or set "
                "cached_features: false"
            )
        heard = [*sum(entries, []), *((path, "speech", "noise") for path in noises)]
        refuse_other_rates(heard, teacher_info(teacher).sampling_rate)

    @classmethod
    def teacher_files(cls, args: argparse.Namespace) -> dict[str, Path]:
        """Return the weights of local teachers, and what lists a streamed corpus."""
        files = {
            f"{name} {path.name}": path
            for name, teacher in _teachers(args).items()
            for path in weight_files(teacher)
        }
        if args.train_shar:
            cuts = map(Path, find_shards(args.train_shar)["cuts"])
            files.update((f"train_shar {path.name}", path) for path in cuts)
        return files

    @classmethod
    def hub_teachers(cls, args: argparse.Namespace) -> dict[str, str]:
        """Return the names of teachers that are not on this machine."""
        return {
            name: teacher
            for name, teacher in _teachers(args).items()
            if not weight_files(teacher)
        }


def _teachers(args: argparse.Namespace) -> dict[str, str]:
    conf = args.model_conf
    named = {"teacher": named_teacher(conf), "second": conf.get("second_teacher")}
    return {name: str(teacher) for name, teacher in named.items() if teacher}


def _samples(options: IteratorOptions) -> dict[str, int]:
    """Return the length of each utterance."""
    shapes = load_num_sequence_text(options.shape_files[0], "csv_int")
    return {utt: shape[0] for utt, shape in shapes.items()}


def _report_used(
    factory: AbsIterFactory, options: IteratorOptions, samples: Mapping[str, int]
) -> None:
    """Log how much of the audio in the first epoch is heard."""
    collate = options.collate_fn
    names = [name for _, name, _ in options.data_path_and_name_and_type]
    crop = collate.crop and TARGETS not in names
    batches = factory.build_iter(1).batch_sampler
    report_used(batches, samples, crop, collate.max_samples, collate.fs)
