"""Learning rates that know how many steps a training has."""

from collections.abc import Sequence
from typing import Any, Optional

import torch
from espnet2.iterators.abs_iter_factory import AbsIterFactory
from espnet2.schedulers.abs_scheduler import AbsBatchStepScheduler

from dldkit.errors import UserError
from dldkit.signature import checked_options

NEED_LOSSES = ("reduce_lr_on_plateau", "greedy")


def total_steps(
    steps_per_epoch: Optional[int], max_epoch: int, given: Optional[int] = None
) -> int:
    """Return the optimiser steps of a whole training.

    Args:
        steps_per_epoch: None where it is not known in advance.
        given: trainer_conf total_steps.

    Raises:
        UserError: nobody knows.
    """
    if given:
        return given
    if steps_per_epoch is None:
        raise UserError(
            "the length of an epoch is not known in advance: choose trainer: stacking, "
            "and set its trainer_conf total_steps to the optimiser steps of the whole "
            "training"
        )
    if not steps_per_epoch:
        raise UserError(
            "an epoch has fewer batches than accum_grad gathers, so that there is no "
            "optimiser step: lower accum_grad"
        )
    return steps_per_epoch * max_epoch


def steps_per_epoch(factory: AbsIterFactory, accum_grad: int) -> Optional[int]:
    """Return the optimiser steps of an epoch, None where batches can not be counted."""
    try:
        return len(factory.build_iter(1, shuffle=False)) // accum_grad
    except TypeError:  # an iterator without a length, as that of chunks
        return None


class TransformersSchedule(AbsBatchStepScheduler):
    """A learning rate of `transformers.get_scheduler`, which changes with each step.

    Args:
        name: `linear`, `cosine` or another one of transformers.
        warmup_ratio: share of all steps in which the rate rises from zero.

    Raises:
        UserError: for a ratio outside of 0 to 1.
    """

    @checked_options
    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        name: str = "linear",
        warmup_ratio: float = 0.07,
    ):
        if not 0 <= warmup_ratio < 1:
            raise UserError(
                f"scheduler_conf warmup_ratio {warmup_ratio}: it is a share of the "
                "steps, from 0 to below 1"
            )
        self.optimizer, self.name, self.warmup_ratio = optimizer, name, warmup_ratio

    def __repr__(self) -> str:
        """Say what the log of a training needs."""
        return f"{type(self).__name__}({self.name}, warmup_ratio={self.warmup_ratio})"

    def begin(self, total: int) -> None:
        """Plan for so many optimiser steps.

        Raises:
            UserError: transformers has no schedule of that name.
        """
        from transformers import get_scheduler

        if self.name in NEED_LOSSES:
            raise UserError(
                f"scheduler_conf name {self.name}: it goes by losses, not by steps; "
                "choose another one, such as linear or cosine"
            )
        try:
            self.schedule = get_scheduler(
                self.name, self.optimizer, round(self.warmup_ratio * total), total
            )
        except (TypeError, ValueError) as error:
            raise UserError(f"scheduler_conf name {self.name}: {error}") from None

    def step(self, epoch: Optional[int] = None) -> None:
        """Set the rate of the next optimiser step.

        Raises:
            UserError: nobody said how long the training is.
        """
        if not hasattr(self, "schedule"):
            raise UserError(
                "scheduler: transformers is not told how long the training is: train "
                "with dldkit's commands, and trainer: resumable or stacking"
            )
        self.schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the schedule."""
        return self.schedule.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a place in the schedule."""
        self.schedule.load_state_dict(state)


def begin_schedules(schedulers: Sequence, factory: AbsIterFactory, options) -> None:
    """Tell schedules the length of the training, as the stages of stacking have it.

    Args:
        schedulers: of the training; those of ESPnet are left alone.
        options: ESPnet's TrainerOptions, perhaps with `trainer_conf`.
    """
    for schedule in schedulers:
        if isinstance(schedule, TransformersSchedule):
            given = getattr(options, "trainer_conf", {}).get("total_steps")
            steps = steps_per_epoch(factory, options.accum_grad)
            schedule.begin(total_steps(steps, options.max_epoch, given))
