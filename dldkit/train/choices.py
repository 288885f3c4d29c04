"""The trainers that a config may name, for every task of the package."""

import argparse

from espnet2.train.class_choices import ClassChoices
from espnet2.train.trainer import Trainer

from dldkit.errors import UserError
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
    def main_worker(cls, args: argparse.Namespace) -> None:
        """Train with the trainer that `args` name.

        The children of multi-GPU training start here too.
        """
        cls.trainer = trainer_choices.get_class(args.trainer)
        if args.trainer_conf and not issubclass(cls.trainer, StackingTrainer):
            raise UserError(
                f"trainer: {args.trainer} takes no trainer_conf, but got "
                f"{args.trainer_conf}: set trainer: stacking, or remove it"
            )
        super().main_worker(args)
