"""N layer slots, and the rule that says which of them run now."""

import random
from pathlib import Path
from typing import Callable, Iterable, Iterator, Optional, Sequence, Union

import torch
from espnet2.legacy.nets.pytorch_backend.transformer.repeat import MultiSequential

from dldkit.depth.profile import DepthProfile, fingerprint
from dldkit.depth.sampler import DepthSampler, FullSampler
from dldkit.depth.selector import select_layers
from dldkit.errors import UserError


class Gates(torch.nn.Module):
    """Mixin of a layer container whose slots can be switched off.

    Encoders run their layers by iterating over the container, so iteration yields a
    pass-through in place of a slot that is off: the layer is not called, and the state
    dict's keys are those of the plain container. `children()` gives all layers.
    """

    def open(self, sampler: Optional[DepthSampler] = None) -> None:
        """Select all slots, and let `sampler` draw those of each training step."""
        self.sampler = sampler or FullSampler()
        self.sampler.draw(range(len(self)), random.Random(0))  # refuses early
        self.selected = tuple(range(len(self)))
        self._drawn: Optional[tuple[int, ...]] = None
        self._rng: Optional[random.Random] = None
        self._seed: Optional[int] = None

    @property
    def active(self) -> tuple[int, ...]:
        """The slots that run: those drawn in training, those selected otherwise."""
        if self.training and self._drawn is not None:
            return self._drawn
        return self.selected

    def select(self, layers: Sequence[int]) -> None:
        """Choose the slots that run in evaluation and are drawn from in training."""
        self.selected = tuple(layers)
        self._drawn = None

    def draw(self) -> None:
        """Draw the slots of the next training step out of the selected ones."""
        if self._rng is None:
            self._follow_seed()
        self._drawn = self.sampler.draw(self.selected, self._rng)

    def _follow_seed(self) -> None:
        # ESPnet seeds torch with `seed + epoch` on every rank before each epoch, and
        # then calls train(). Gates that follow that seed through a generator of their
        # own are the same on all ranks and after a resume, whatever else draws
        # random numbers (dropout does, differently on each rank).
        seed = torch.initial_seed()
        if seed != self._seed:
            self._seed = seed
            self._rng = random.Random(seed)

    def train(self, mode: bool = True) -> "Gates":
        super().train(mode)
        if mode:
            self._follow_seed()
        return self

    def __iter__(self) -> Iterator[Callable]:
        active = set(self.active)
        for slot, layer in enumerate(self.children()):
            yield layer if slot in active else self.pass_through(layer)

    def pass_through(self, layer: torch.nn.Module) -> Callable:
        """Return what runs in place of a layer that is off."""
        raise NotImplementedError


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
        if self.keep_final_norm:
            return _FinalNorm(layer)
        return lambda *args: args


class GatedModuleList(Gates, torch.nn.ModuleList):
    """The layer container of transformers' encoders, with slots that can be off."""

    def __init__(
        self,
        layers: Iterable[torch.nn.Module],
        sampler: Optional[DepthSampler] = None,
    ):
        super().__init__(layers)
        self.open(sampler)

    def pass_through(self, layer: torch.nn.Module) -> Callable:
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
    """Mixin of an encoder whose `encoders` are `GatedLayers`: depth at run time."""

    encoders: GatedLayers
    _profile: Optional[DepthProfile] = None

    @property
    def active_layers(self) -> tuple[int, ...]:
        """The slots that run now, in order."""
        return self.encoders.active

    def set_depth(
        self,
        depth: Optional[int] = None,
        *,
        layers: Optional[Sequence[int]] = None,
        selector: str = "even",
    ) -> None:
        """Choose the layers that run at inference.

        With an attached depth profile, a depth that is in the profile means the
        profile's layers, and its calibrated statistics are applied. `set_depth()`
        runs all layers with the statistics of the checkpoint.

        Args:
            depth: number of layers; None = all.
            layers: the slots themselves, instead of a depth.
            selector: `even` or `prefix`, for a depth that no profile lists.

        Raises:
            UserError: for a depth or a layer that the encoder does not have.
        """
        profile = self._profile
        if depth is not None and layers is None and profile and depth in profile.depths:
            layers, depth = profile.depths[depth].layers, None
        chosen = select_layers(len(self.encoders), depth, layers, selector)
        self.encoders.select(chosen)
        if profile is not None:
            asked = depth is not None or layers is not None
            profile.apply(self, chosen if asked else None)

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
        self.detach_depth_profile()
        profile = DepthProfile.load(path)
        if profile.checkpoint != (checkpoint or fingerprint(self.state_dict())):
            raise UserError(
                f"the depth profile {path} was calibrated for another checkpoint: "
                "write it again with dldkit.bin.calibrate for this one"
            )
        profile.attach(self)
        self._profile = profile
        self.set_depth(layers=self.encoders.selected)

    def detach_depth_profile(self) -> None:
        """Forget the depth profile and restore the checkpoint's own statistics."""
        if self._profile is not None:
            self._profile.apply(self, None)
            self._profile = None
