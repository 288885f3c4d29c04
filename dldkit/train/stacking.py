"""Training that begins shallow and grows (interleaved stacking, arXiv 2606.11766)."""

import argparse
import inspect
import logging
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Iterator, Optional, Sequence

import espnet2.train.trainer
import torch
from espnet2.iterators.abs_iter_factory import AbsIterFactory
from espnet2.train.reporter import Reporter
from espnet2.train.trainer import TrainerOptions
from espnet2.utils.build_dataclass import build_dataclass

from dldkit.depth.growth import boundaries, copy_maps, grow
from dldkit.depth.layers import find_gates
from dldkit.errors import UserError
from dldkit.patches import patched
from dldkit.signature import checked_options
from dldkit.train.schedule import steps_per_epoch, total_steps
from dldkit.train.trainer import ResumableTrainer


class Stacking:
    """Grows a model's gated layers at the right optimiser steps.

    It acts after each step of the optimiser, and keeps its place (steps done, depth)
    in the optimiser's parameter group. So a checkpoint holds the place together with
    the moments it belongs to, and loading one goes on from there. A model that has a
    method `grown` is told the depths before and after.

    Args:
        method: `interleave`, `stack`, `gradstack` or `midas` (`dldkit.depth.growth`).
        depths: number of layers of each stage; the last one is the model's depth.
        schedule: `equal`, `prop` or `fractions`: how long stages are.
        alpha: exponent of `prop`.
        fractions: share of each stage of `fractions`.
        optimizer_state: clones `copy` the moments of their original, or have `zero`.
        random_depth: which stages draw the layers of each step, for a model with a
            depth_sampler: `always` | `last_stage`; the others run all layers they have.
        total_steps: optimiser steps of the whole training; None = max_epoch times the
            steps of an epoch.

    Raises:
        UserError: for options that are unknown, or do not fit each other.
    """

    @checked_options
    def __init__(
        self,
        method: str = "interleave",
        depths: Sequence[int] = (3, 6, 9, 12),
        schedule: str = "equal",
        alpha: float = 1.0,
        fractions: Optional[Sequence[float]] = None,
        optimizer_state: str = "copy",
        random_depth: str = "always",
        total_steps: Optional[int] = None,
    ):
        if optimizer_state not in ("copy", "zero"):
            raise UserError(
                f"unknown optimizer_state {optimizer_state!r}: choose copy or zero"
            )
        if random_depth not in ("always", "last_stage"):
            raise UserError(
                f"unknown random_depth {random_depth!r}: choose always or last_stage"
            )
        self.method = method
        self.depths = list(depths)
        self.copy_maps = copy_maps(method, self.depths)
        self.optimizer_state = optimizer_state
        self.random_depth = random_depth
        self.total_steps = total_steps
        self.boundaries_of = partial(
            boundaries,
            stages=len(self.depths),
            schedule=schedule,
            alpha=alpha,
            fractions=fractions,
        )
        self.boundaries_of(10**9)  # refuses early

    @contextmanager
    def attached(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        steps_per_epoch: Optional[int],
        max_epoch: int,
    ) -> Iterator[None]:
        """Act on a model and its optimiser while the context lasts.

        Raises:
            UserError: when the model has no gated layers, or another depth, or draws
                none where `random_depth` wants it to, or can draw none in a stage.
        """
        layers = find_gates(model)
        if layers is None:
            raise UserError(
                "trainer: stacking needs an encoder whose layers can be switched off: "
                "ld_conformer, or another ld_* encoder, or the student of "
                "sfm_distill_train"
            )
        if len(layers) != self.depths[-1]:
            raise UserError(
                f"trainer_conf depths {self.depths} end at {self.depths[-1]} layers, "
                f"but the model has {len(layers)}"
            )
        if self.random_depth == "last_stage" and layers.sampler.is_full:
            raise UserError(
                "trainer_conf random_depth: last_stage, and the model draws no depths: "
                "set depth_sampler to another one than full, or remove it"
            )
        for depth in self.depths:
            if self._draws_at(depth):
                layers.sampler.weight_of_each_depth(depth)  # refuses what can not be
        total = total_steps(steps_per_epoch, max_epoch, self.total_steps)
        self.layers, self.optimizer = layers, optimizer
        self.grown = getattr(model, "grown", None)
        self.boundaries = self.boundaries_of(total)
        self._begin(step=0, depth=self.depths[0])
        logging.info(
            f"Stacking ({self.method}): depths {self.depths}, which begin after "
            f"{[0, *self.boundaries]} of {total} optimiser steps"
        )
        handles = [
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_load_state_dict_post_hook(self._resume),
            model.register_forward_hook(self._report),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            layers.select(range(len(layers)))

    @property
    def place(self) -> dict[str, Any]:
        """Optimiser steps done, depth of this stage, and those of all stages."""
        return self.optimizer.param_groups[0]["stacking"]

    @property
    def stage(self) -> int:
        """Which of `depths` the model is at, from 0."""
        return self.depths.index(self.place["depth"])

    def _begin(self, step: int, depth: int) -> None:
        place = {"step": step, "depth": depth, "depths": self.depths}
        self.optimizer.param_groups[0]["stacking"] = place
        self._select(depth)

    def _select(self, depth: int) -> None:
        self.layers.select(range(depth), self._draws_at(depth))

    def _draws_at(self, depth: int) -> bool:
        return self.random_depth == "always" or depth == self.depths[-1]

    def _resume(self, optimizer: torch.optim.Optimizer) -> None:
        depths = optimizer.param_groups[0].get("stacking", {}).get("depths")
        if depths != self.depths:
            raise UserError(
                "the checkpoint to resume is not of a stacking run with depths "
                f"{self.depths} (it has {depths}): go on with the trainer_conf that "
                "it was begun with, or remove it"
            )
        self._select(self.place["depth"])

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.place["step"] += 1
        step, stage = self.place["step"], self.stage
        if stage < len(self.boundaries) and step >= self.boundaries[stage]:
            grow(self.layers, self.copy_maps[stage], optimizer, self.optimizer_state)
            if self.grown:
                self.grown(*self.depths[stage : stage + 2])
            self._begin(step, self.depths[stage + 1])
            logging.info(
                f"Stacking ({self.method}): after {step} optimiser steps, stage "
                f"{stage + 2} of {len(self.depths)} begins: depth "
                f"{self.depths[stage]} -> {self.depths[stage + 1]}"
            )

    def _report(self, model: torch.nn.Module, args: Any, output: Any) -> None:
        """Add stage (from 1), depth and optimiser step to the model's stats."""
        loss, stats = (
            (output["loss"], output["stats"])
            if isinstance(output, dict)
            else output[:2]
        )
        found = dict(
            stage=self.stage + 1,
            depth=len(self.layers.active),
            step=self.place["step"],
        )
        for name, value in found.items():  # without a wait for the GPU
            stats[name] = torch.full((1,), float(value), device=loss.device)


@dataclass
class StackingTrainerOptions(TrainerOptions):
    """ESPnet's options, and those of `Stacking`."""

    trainer_conf: dict


class StackingTrainer(ResumableTrainer):
    """Trains a model whose depth grows; see `Stacking` for the options."""

    __signature__ = inspect.signature(Stacking)

    @classmethod
    def build_options(cls, args: argparse.Namespace) -> StackingTrainerOptions:
        """Return the options of `run`."""
        return build_dataclass(StackingTrainerOptions, args)

    @classmethod
    def run(
        cls,
        model: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        schedulers: Sequence,
        train_iter_factory: AbsIterFactory,
        *args,
        trainer_options: StackingTrainerOptions,
        **kwargs,
    ) -> None:
        """Train; see ESPnet's Trainer.run.

        Raises:
            UserError: when the options do not fit each other, or the model.
        """
        try:
            stacking = Stacking(**trainer_options.trainer_conf)
        except TypeError as error:
            raise UserError(f"trainer_conf: {error}") from None
        reporter = partial(FullDepthReporter, stages=len(stacking.depths))
        with (
            stacking.attached(
                model,
                optimizers[0],
                steps_per_epoch(train_iter_factory, trainer_options.accum_grad),
                trainer_options.max_epoch,
            ),
            patched(espnet2.train.trainer, "Reporter", reporter),
        ):
            super().run(
                model,
                optimizers,
                schedulers,
                train_iter_factory,
                *args,
                trainer_options=trainer_options,
                **kwargs,
            )
            if stacking.place["depth"] < stacking.depths[-1]:
                logging.warning(
                    f"Stacking ended at depth {stacking.place['depth']}, before the "
                    "last stage: there is no best or averaged model. Train longer, or "
                    "lower trainer_conf total_steps"
                )


class FullDepthReporter(Reporter):
    """Ranks only the epochs that were validated at full depth.

    A shallower stage may reach a better loss on its way; its weights would be useless
    as the best model, and poison in an average.
    """

    def __init__(self, stages: int):
        super().__init__()
        self.stages = stages

    def _is_full(self, epoch: int) -> bool:
        stage = self.stats[epoch].get("valid", {}).get("stage", 0.0)
        return round(float(stage)) == self.stages

    def has(self, key: str, key2: str, epoch: Optional[int] = None) -> bool:
        """Say whether the epoch is at full depth and has that value."""
        epoch = self.get_epoch() if epoch is None else epoch
        return super().has(key, key2, epoch) and self._is_full(epoch)

    def get_value(self, key: str, key2: str, epoch: Optional[int] = None) -> float:
        """Return a value of an epoch of any depth: schedulers look at them all."""
        return self.stats[self.get_epoch() if epoch is None else epoch][key][key2]

    def sort_epochs_and_values(
        self, key: str, key2: str, mode: str
    ) -> list[tuple[int, float]]:
        """Return the epochs at full depth, best first."""
        ranked = super().sort_epochs_and_values(key, key2, mode)
        return [(epoch, value) for epoch, value in ranked if self._is_full(epoch)]

    def check_early_stopping(
        self, patience: int, key1: str, key2: str, *args, **kwargs
    ) -> bool:
        """Say whether to stop; never before full depth."""
        return self.has(key1, key2) and super().check_early_stopping(
            patience, key1, key2, *args, **kwargs
        )
