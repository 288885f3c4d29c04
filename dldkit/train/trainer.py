"""ESPnet's trainer, made safe against a kill at any moment."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import espnet2.train.trainer
import torch
from espnet2.iterators.abs_iter_factory import AbsIterFactory
from espnet2.schedulers.abs_scheduler import AbsScheduler
from espnet2.train.distributed_utils import DistributedOption
from espnet2.train.reporter import Reporter, SubReporter
from espnet2.train.trainer import Trainer, TrainerOptions

from dldkit.depth.layers import Gates, find_gates
from dldkit.errors import UserError
from dldkit.patches import patched
from dldkit.step import atomic
from dldkit.train.schedule import begin_schedules

CHECKPOINT = "checkpoint.pth"


class ResumableTrainer(Trainer):
    """Replaces `checkpoint.pth` as a whole, and only when its epoch is complete.

    ESPnet writes it in place, and before the epoch's model and links: a kill in
    between loses the run, or resumes after an epoch whose model was never saved.
    """

    @classmethod
    def run(
        cls,
        model: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        schedulers: Sequence[Optional[AbsScheduler]],
        train_iter_factory: AbsIterFactory,
        *args: Any,
        trainer_options: TrainerOptions,
        **kwargs: Any,
    ) -> None:
        """Train; see ESPnet's Trainer.run.

        Raises:
            UserError: for distributed layer dropping without `unused_parameters`.
        """
        if (
            kwargs["distributed_option"].distributed
            and not trainer_options.unused_parameters
            and _some_layers_rest(find_gates(model))
        ):
            raise UserError(
                "layers that do not run get no gradient, which torch's distributed "
                "training refuses: set unused_parameters: true"
            )
        checkpoint = _Checkpoint(trainer_options, kwargs["distributed_option"])
        checkpoint.settle(trainer_options.best_model_criterion)
        for module in model.modules():
            # of the training that init_param's weights are from; a resumed one's own
            # count comes with its checkpoint
            if hasattr(module, "steps_done"):
                module.steps_done.zero_()
        begin_schedules(schedulers, train_iter_factory, trainer_options)
        with _atomic_saves():
            super().run(
                model,
                optimizers,
                schedulers,
                train_iter_factory,
                *args,
                trainer_options=trainer_options,
                **kwargs,
            )
        checkpoint.commit()

    @classmethod
    def resume(
        cls, *args: Any, optimizers: Sequence[torch.optim.Optimizer], **kwargs: Any
    ) -> None:
        """Go on from a checkpoint; see ESPnet's Trainer.resume.

        Raises:
            UserError: when it is of a growing run, whose unused slots are untrained.
        """
        grows = "stacking" in optimizers[0].param_groups[0]
        super().resume(*args, optimizers=optimizers, **kwargs)
        if not grows and "stacking" in optimizers[0].param_groups[0]:
            raise UserError(
                f"{CHECKPOINT} is of a growing run: set trainer: stacking and the "
                "trainer_conf that it was begun with, or remove it"
            )

    @classmethod
    def train_one_epoch(
        cls,
        model: torch.nn.Module,
        *args: Any,
        options: TrainerOptions,
        reporter: SubReporter,
        distributed_option: DistributedOption,
        **kwargs: Any,
    ) -> bool:
        """Train one epoch, once all files of the epoch before are in their place."""
        _Checkpoint(options, distributed_option).commit()
        # What accum_grad has left over from the epoch before is in no checkpoint.
        model.zero_grad()
        return super().train_one_epoch(
            model,
            *args,
            options=options,
            reporter=reporter,
            distributed_option=distributed_option,
            **kwargs,
        )


def _some_layers_rest(layers: Optional[Gates]) -> bool:
    return layers is not None and (
        not layers.sampler.is_full or len(layers.selected) < len(layers)
    )


class _Checkpoint:
    """checkpoint.pth of a run, of which the first rank alone takes care."""

    def __init__(self, options: TrainerOptions, distributed_option: DistributedOption):
        self.path = Path(options.output_dir) / CHECKPOINT
        self.pending = pending(self.path)
        self.is_ours = (
            not distributed_option.distributed or distributed_option.dist_rank == 0
        )

    def commit(self) -> None:
        """Let the checkpoint of a complete epoch replace the one before."""
        if self.is_ours and self.pending.exists():
            self.pending.replace(self.path)

    def settle(self, best_model_criterion: Sequence[Sequence[str]]) -> None:
        """Bring a run that was killed between two epochs to one side of the boundary.

        Once the epoch's model is there, ESPnet may have removed the one that it
        displaced: the epoch counts. Before that, nothing was removed: it is forgotten.
        """
        if self.is_ours and self.pending.exists():
            states = torch.load(self.pending, map_location="cpu", weights_only=False)
            reporter = espnet2.train.trainer.Reporter()
            reporter.load_state_dict(states["reporter"])
            if self._model(reporter.get_epoch()).is_file():
                self._link_models(reporter, best_model_criterion)
                self.commit()
            else:
                self.pending.unlink()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # the others read what is decided here

    def _model(self, epoch: int) -> Path:
        return self.path.with_name(f"{epoch}epoch.pth")

    def _link_models(
        self, reporter: Reporter, best_model_criterion: Sequence[Sequence[str]]
    ) -> None:
        """Rebuild the links of an epoch, as ESPnet makes them after its model."""
        models = {"latest.pth": self._model(reporter.get_epoch())}
        for phase, key, mode in best_model_criterion:
            if reporter.has(phase, key):
                best = self._model(reporter.get_best_epoch(phase, key, mode))
                models[f"{phase}.{key}.best.pth"] = best
        for name, model in models.items():
            with atomic(self.path.with_name(name)) as link:
                link.unlink(missing_ok=True)
                link.symlink_to(model.name)


def pending(checkpoint: Path) -> Path:
    """Return where a checkpoint waits until its epoch is complete."""
    return checkpoint.with_name(checkpoint.name + ".pending")


@contextmanager
def _atomic_saves() -> Iterator[None]:
    """Let torch.save write files as a whole, and hold checkpoint.pth back."""
    save = torch.save

    def save_atomically(states, path, *args, **kwargs):
        if not isinstance(path, (str, Path)):  # a buffer
            return save(states, path, *args, **kwargs)
        path = Path(path)
        with atomic(pending(path) if path.name == CHECKPOINT else path) as part:
            save(states, part, *args, **kwargs)

    with patched(torch, "save", save_atomically):
        yield
