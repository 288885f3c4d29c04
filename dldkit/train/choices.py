"""The trainers that a config may name, for every task of the package."""

import argparse
import multiprocessing
from pathlib import Path
from typing import Optional, Sequence

import yaml
from espnet2.train.class_choices import ClassChoices
from espnet2.train.trainer import Trainer
from torch.multiprocessing import ProcessExitedException

from dldkit.errors import UserError, report_user_errors
from dldkit.hf_options import check_schedule
from dldkit.train.experiment import experiment
from dldkit.train.stacking import StackingTrainer
from dldkit.train.trainer import ResumableTrainer

trainer_choices = ClassChoices(
    name="trainer",
    classes=dict(
        resumable=ResumableTrainer,
        default=Trainer,  # ESPnet's own
        stacking=StackingTrainer,
    ),
    type_check=Trainer,
    default="resumable",
)


class TrainerChoice:
    """Mixin of a task that has `trainer_choices` in its `class_choices_list`."""

    @classmethod
    def parse(cls, cmd: Optional[Sequence[str]] = None) -> argparse.Namespace:
        """Read a command line.

        Raises:
            UserError: for a config that can not be read.
        """
        try:
            return cls.get_parser().parse_args(cmd)
        except yaml.YAMLError as error:
            where = " ".join(str(error).split())
            raise UserError(f"--config is no YAML file: {where}") from None

    @classmethod
    def main(
        cls,
        args: Optional[argparse.Namespace] = None,
        cmd: Optional[Sequence[str]] = None,
    ) -> None:
        """Train, or collect statistics, unless that was done before.

        Raises:
            UserError: for a config that can not be read; see `experiment`.
        """
        if args is None:
            args = cls.parse(cmd)
        if args.print_config or args.output_dir is None:
            super().main(args)  # which says what is missing
            return
        cls.check_data(args)
        learns = not (args.collect_stats or args.dry_run)
        teachers = (cls.teacher_files(args), cls.hub_teachers(args)) if learns else ()
        with experiment(args, *teachers) as is_to_be_done:
            if is_to_be_done:
                try:
                    super().main(args)
                except ProcessExitedException as error:
                    raise UserError(
                        f"the training ended, as one of its processes did ({error}): "
                        "what that one said is above"
                    ) from None

    @classmethod
    def main_worker(cls, args: argparse.Namespace) -> None:
        """Train with the trainer that `args` name.

        The children of multi-GPU training start here too.
        """
        if multiprocessing.parent_process() is not None:
            report_user_errors(cls._main_worker)(args)
        else:
            cls._main_worker(args)

    @classmethod
    def _main_worker(cls, args: argparse.Namespace) -> None:
        cls.trainer = trainer_choices.get_class(args.trainer)
        if args.trainer_conf and not issubclass(cls.trainer, StackingTrainer):
            raise UserError(
                f"trainer: {args.trainer} takes no trainer_conf, but got "
                f"{args.trainer_conf}: set trainer: stacking, or remove it"
            )
        if args.scheduler == "transformers":
            check_schedule(args.scheduler_conf)
            if not issubclass(cls.trainer, ResumableTrainer):
                raise UserError(
                    f"scheduler: transformers with trainer: {args.trainer}, which does "
                    "not tell it how long the training is: choose resumable or stacking"
                )
        cls.check_data(args)
        super().main_worker(args)

    @classmethod
    def check_data(cls, args: argparse.Namespace) -> None:
        """Refuse data that do not fit, on all ranks; for tasks to define."""

    @classmethod
    def teacher_files(cls, args: argparse.Namespace) -> dict[str, Path]:
        """Return the files of models that a training learns from, by a name."""
        return {}

    @classmethod
    def hub_teachers(cls, args: argparse.Namespace) -> dict[str, str]:
        """Return those that have no files here, by the same names."""
        return {}
