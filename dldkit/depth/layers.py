"""N layer slots, and the rule that says which of them run now."""

import logging
import random
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Optional, Sequence, Union

import torch
from espnet2.legacy.nets.pytorch_backend.transformer.repeat import MultiSequential
from torch.optim.optimizer import register_optimizer_step_post_hook

from dldkit.depth.profile import DepthProfile, fingerprint
from dldkit.depth.sampler import DepthSampler
from dldkit.depth.selector import select_layers
from dldkit.depth.statistics import use_statistics
from dldkit.errors import UserError

_optimizer_steps = 0  # of this process, of any optimiser


def _count_step(*_) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


def optimizer_steps() -> int:
    """Return how many steps the optimisers of this process have done."""
    return _optimizer_steps


# By the identity of the gates. A context variable, because requests at different depths
# may run one model in several threads.
_running: ContextVar[dict[int, tuple[int, ...]]] = ContextVar("running", default={})
_visitors: ContextVar[dict[int, Callable]] = ContextVar("visitors", default={})


class Gates(torch.nn.Module):
    """Mixin of a layer container whose slots can be switched off.

    Encoders run their layers by iterating over the container, so iteration yields a
    pass-through in place of a slot that is off: the layer is not called, and the state
    dict's keys are those of the plain container. `children()` gives all layers.
    """

    def open(self, sampler: Optional[DepthSampler] = None) -> None:
        """Select all slots, and let `sampler` draw those of each training step."""
        self.sampler = sampler or DepthSampler("full")
        self.sampler.check(len(self))
        self._rng: Optional[random.Random] = None
        self._seed: Optional[int] = None
        self._step: Optional[int] = None  # of the optimiser, that the draws are for
        self.select(range(len(self)))

    @property
    def active(self) -> tuple[int, ...]:
        """The slots that run: those of `running`, else of the step, else selected."""
        running = _running.get().get(id(self))
        if running is not None:
            return running
        return self.layers_of_step() if self.training else self.selected

    @contextmanager
    def running(self, layers: Sequence[int]) -> Iterator[None]:
        """Run just these slots, in this thread, while the context lasts."""
        token = _running.set({**_running.get(), id(self): tuple(layers)})
        try:
            yield
        finally:
            _running.reset(token)

    @contextmanager
    def visited(self, visit: Callable[[int, Any], Any]) -> Iterator[None]:
        """Let `visit` see what each slot that runs returns, and may change.

        Args:
            visit: takes the slot and its layer's output; returns that output, or what
                is to go on in its place.
        """
        token = _visitors.set({**_visitors.get(), id(self): visit})
        try:
            yield
        finally:
            _visitors.reset(token)

    def select(self, layers: Sequence[int], draws: bool = True) -> None:
        """Choose the slots that run in evaluation and are drawn from in training.

        Args:
            draws: False = training steps run all of them, whatever the sampler says.
        """
        self.selected = tuple(layers)
        self.draws = draws
        self._drawn: list[tuple[int, ...]] = []
        self._smallest: Optional[tuple[int, ...]] = None

    def layers_of_step(self) -> tuple[int, ...]:
        """Return the slots of this optimiser step, drawn out of the selected ones.

        All forwards of a step train the same layers: with accumulated gradients, the
        step would otherwise be one of several depths, which no option asked for.
        """
        return self.draws_of_step(1)[0]

    def draws_of_step(self, number: int) -> list[tuple[int, ...]]:
        """Return several draws of this optimiser step; the first one is its own."""
        if not self.draws:
            return [self.selected] * number
        if self._rng is None:
            self._follow_seed()
        if self._step != _optimizer_steps:
            self._step = _optimizer_steps
            self._drawn, self._smallest = [], None
        while len(self._drawn) < number:
            self._drawn.append(self.sampler.draw(self.selected, self._rng))
        return self._drawn[:number]

    def sandwich_of_step(self, number: int) -> list[tuple[int, ...]]:
        """Return all selected slots, the fewest, and `number` draws of this step.

        What is there twice is left out (sandwich rule, arXiv 1903.05134).
        """
        if not self.draws:
            return [self.selected]
        draws = self.draws_of_step(number)
        if self._smallest is None:
            smallest = self.sampler.smallest(len(self.selected))
            self._smallest = self.sampler.choose(self.selected, smallest, self._rng)
        return list(dict.fromkeys([self.selected, self._smallest, *draws]))

    def why_untrained(self, depth: int) -> str:
        """Say why a depth of a model with exits was not trained; empty where it was."""
        number = len(self)
        if self.sampler.trains(depth, number):
            return ""
        trained = [n for n in range(1, number + 1) if self.sampler.trains(n, number)]
        return (
            f"depth {depth} was not trained: it has no exit, and depth_sampler never "
            f"draws it; choose one of {trained}"
        )

    def _follow_seed(self) -> None:
        # ESPnet seeds torch with `seed + epoch` on every rank before each epoch, and
        # then calls train(). Gates that follow that seed through a generator of their
        # own are the same on all ranks and after a resume, whatever else draws
        # random numbers (dropout does, differently on each rank).
        seed = torch.initial_seed()
        if seed != self._seed:
            self._seed = seed
            self._rng = random.Random(seed)
            self._drawn, self._smallest = [], None

    def train(self, mode: bool = True) -> "Gates":
        super().train(mode)
        if mode:
            self._follow_seed()
        return self

    def __iter__(self) -> Iterator[Callable]:
        active = set(self.active)
        visit = _visitors.get().get(id(self))
        for slot, layer in enumerate(self.children()):
            if slot not in active:
                yield self.pass_through(layer)
            elif visit is None:
                yield self.called(slot, layer)
            else:
                yield partial(_visited_layer, visit, slot, self.called(slot, layer))

    def called(self, slot: int, layer: torch.nn.Module) -> Callable:
        """Return what an encoder calls to run a layer that is on."""
        return layer

    def pass_through(self, layer: torch.nn.Module) -> Callable:
        """Return what runs in place of a layer that is off."""
        raise NotImplementedError

    def kept_parameters(self, layer: torch.nn.Module) -> list[torch.nn.Parameter]:
        """Return what a layer that is off still contributes."""
        return []


def _visited_layer(visit: Callable, slot: int, layer: Callable, *args, **kwargs) -> Any:
    return visit(slot, layer(*args, **kwargs))


class GatedLayers(Gates, MultiSequential):
    """The layer container of ESPnet's encoders, with slots that can be switched off.

    Args:
        layers: the encoder layers, called as `layer(x, mask)`.
        sampler: draws the layers of each training step.
        keep_final_norm: a skipped slot still applies its layer's final LayerNorm
            (LDASR, EUSIPCO 2024); DLD's formula skips the whole layer.
    """

    def __init__(
        self,
        *layers: torch.nn.Module,
        sampler: Optional[DepthSampler] = None,
        keep_final_norm: bool = False,
    ):
        super().__init__(*layers)
        if keep_final_norm and not all(hasattr(m, "norm_final") for m in layers):
            raise UserError(
                "keep_final_norm needs layers that end in a LayerNorm; those of this "
                "encoder do not (ESPnet's Transformer): set keep_final_norm: false"
            )
        self.keep_final_norm = keep_final_norm
        self.open(sampler)

    def pass_through(self, layer: torch.nn.Module) -> Callable:
        """Return what runs in place of a layer: its final norm, or nothing."""
        if self.keep_final_norm:
            return _FinalNorm(layer)
        return lambda *args: args

    def kept_parameters(self, layer: torch.nn.Module) -> list[torch.nn.Parameter]:
        """Return the parameters of the final norm, if it stays."""
        return list(layer.norm_final.parameters()) if self.keep_final_norm else []


class GatedModuleList(Gates, torch.nn.ModuleList):
    """The layer container of transformers' encoders, with slots that can be off."""

    def __init__(
        self,
        layers: Iterable[torch.nn.Module],
        sampler: Optional[DepthSampler] = None,
    ):
        super().__init__(layers)
        self.open(sampler)

    def __repr__(self) -> str:
        # ModuleList's own goes over what iteration yields, which are not the layers
        name = type(self).__name__
        layers = torch.nn.ModuleList(self.children())
        return repr(layers).replace("ModuleList", name, 1)

    def pass_through(self, layer: torch.nn.Module) -> Callable:
        """Return what runs in place of a layer: nothing."""
        return lambda hidden_states, **kwargs: hidden_states


def find_gates(model: torch.nn.Module) -> Optional[Gates]:
    """Return the gated layers of a model, None if it has none."""
    return next((m for m in model.modules() if isinstance(m, Gates)), None)


class _FinalNorm:
    """A skipped layer of which only the final LayerNorm runs."""

    def __init__(self, layer: torch.nn.Module):
        self.norm = layer.norm_final

    def __call__(self, x, mask):
        if isinstance(x, tuple):  # with positional embedding
            return (self.norm(x[0]), *x[1:]), mask
        return self.norm(x), mask


class DynamicDepth:
    """Mixin of an encoder with gated layers: depth at run time.

    Attributes:
        selector: which layers a depth means if nothing else says so.
    """

    selector: str = "even"
    _profile: Optional[DepthProfile] = None
    _warned: frozenset[tuple[int, ...]] = frozenset()  # layers that were warned of

    @property
    def gates(self) -> Gates:
        """The gated layers."""
        return find_gates(self)

    @property
    def active_layers(self) -> tuple[int, ...]:
        """The slots that run now, in order."""
        return self.gates.active

    def choose_layers(
        self,
        depth: Optional[int] = None,
        layers: Optional[Sequence[int]] = None,
        selector: Optional[str] = None,
    ) -> tuple[int, ...]:
        """Return the layers that a request means.

        Without a selector, a depth means what the encoder's own `selector` says, unless
        the depth profile lists other layers only.

        Args:
            depth: number of layers; None = all.
            layers: the slots themselves, instead of a depth.
            selector: `even` or `prefix`.

        Raises:
            UserError: for a depth or a layer that the encoder does not have.
        """
        gates, profile = self.gates, self._profile
        name = selector or self.selector
        chosen = select_layers(len(gates), depth, layers, name)
        self._warn_of_untrained(chosen)
        if profile is None or chosen in profile.depths:
            return chosen
        if depth is not None and selector is None:
            chosen = profile.layers_of(depth) or chosen
        static = gates.sampler.is_full and len(chosen) == len(gates)
        if chosen not in profile.depths and chosen not in self._warned and not static:
            self._warned |= {chosen}
            logging.warning(
                f"layers {chosen} are not in the depth profile: they run with the "
                "checkpoint's own BatchNorm statistics. Add their depth with "
                "dldkit.bin.calibrate"
            )
        return chosen

    def _warn_of_untrained(self, layers: tuple[int, ...]) -> None:
        """Say once that first layers end where a model with exits has none."""
        why = self.gates.why_untrained(len(layers))
        if why and layers not in self._warned:
            self._warned |= {layers}
            logging.warning(why)

    def set_depth(
        self,
        depth: Optional[int] = None,
        *,
        layers: Optional[Sequence[int]] = None,
        selector: Optional[str] = None,
    ) -> None:
        """Choose the layers that run at inference; see `choose_layers`.

        With an attached depth profile, they run with its statistics for them.
        """
        self.gates.select(self.choose_layers(depth, layers, selector))

    def is_passed_by(self, layers: tuple[int, ...], more: tuple[int, ...]) -> bool:
        """Whether `layers` give the same alone and as the beginning of `more`.

        They do not where the depth profile has other BatchNorm statistics for them, or
        layers that are skipped still apply their norm.
        """
        if layers != more[: len(layers)] or (
            layers != more and getattr(self.gates, "keep_final_norm", False)
        ):
            return False
        if self._profile is None:
            return True
        if (layers, more) not in self._passed:
            found = self._profile.statistics
            alone, beginning = found.get(layers, {}), found.get(more, {})
            self._passed[layers, more] = bool(alone) == bool(beginning) and all(
                torch.allclose(value, other, rtol=1e-4, atol=1e-6)
                for name in alone
                for value, other in zip(alone[name], beginning[name])
            )
            if not self._passed[layers, more]:
                logging.warning(
                    f"depth {len(layers)} is no exit on the way to {len(more)}: they "
                    "have other BatchNorm statistics in the depth profile. Calibrate "
                    "both with dldkit.bin.calibrate"
                )
        return self._passed[layers, more]

    def running(self, layers: Sequence[int]) -> AbstractContextManager[None]:
        """Run just these layers, in this thread, while the context lasts.

        Raises:
            UserError: for a layer that the encoder does not have.
        """
        gates = self.gates
        return gates.running(select_layers(len(gates), layers=layers))

    def load_depth_profile(
        self, path: Union[str, Path], checkpoint: Optional[str] = None
    ) -> None:
        """Attach the depth profile in `path` and keep running at the same layers.

        Args:
            checkpoint: `fingerprint` of the weights as they were trained, where the
                encoder's own were rounded since (half precision, quantisation).

        Raises:
            UserError: when the profile was made for another checkpoint.
        """
        profile = DepthProfile.load(path)
        if profile.checkpoint != (checkpoint or fingerprint(self.state_dict())):
            raise UserError(
                f"the depth profile {path} was calibrated for another checkpoint: "
                "write it again with dldkit.bin.calibrate for this one"
            )
        self.attach_depth_profile(profile)

    def attach_depth_profile(self, profile: Optional[DepthProfile]) -> None:
        """Use the statistics of a depth profile; None = the checkpoint's own."""
        self._profile, self._warned, self._passed = profile, frozenset(), {}
        use_statistics(self, self.gates, profile.statistics if profile else {})
