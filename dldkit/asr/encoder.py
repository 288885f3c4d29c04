"""ESPnet's encoders with layer dropping in training and run-time depth."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Union

import torch
from espnet2.asr.encoder.branchformer_encoder import BranchformerEncoder
from espnet2.asr.encoder.conformer_encoder import ConformerEncoder
from espnet2.asr.encoder.e_branchformer_encoder import EBranchformerEncoder
from espnet2.asr.encoder.transformer_encoder import TransformerEncoder

from dldkit.depth.layers import DynamicDepth, GatedLayers
from dldkit.depth.sampler import DepthSampler
from dldkit.depth.selector import SELECTORS
from dldkit.errors import UserError
from dldkit.signature import checked_options, merged_signature


class _AllLeft(Exception):
    """No utterance is left in the batch: nothing that follows has anything to do."""


class ExitingEncoder(DynamicDepth):
    """Mixin of an encoder with gated layers that has exits, and a choice of layers.

    Subclasses say what of a layer's output is the encoder's, by the last four methods.

    Attributes:
        exits: depths below the full one whose output is trained as well.
    """

    exits: list[int]

    def follow_sampler(self) -> None:
        """Have the exits of the sampler, and its choice of layers, once it is there."""
        sampler = self.gates.sampler
        self.exits = sampler.exits_of(len(self.gates))
        self.selector = sampler.selector

    @contextmanager
    def collected(
        self, depths: Collection[int], gradient: float = 1.0
    ) -> Iterator[dict[int, torch.Tensor]]:
        """Collect what the first layers give by themselves, on the way to more.

        Args:
            depths: how many first layers. Those that a forward does not go beyond
                are left out: they are its own output, or not reached.
            gradient: share that each of these depths hands down of the gradient that
                comes from deeper layers.

        Yields:
            The outputs (Batch, Time, Dim) by depth, once the encoder ran.
        """
        outputs: dict[int, torch.Tensor] = {}
        deepest = max(self.active_layers) + 1

        def visit(slot: int, output):
            if slot + 1 not in depths or slot + 1 == deepest:
                return output
            outputs[slot + 1] = self.output_of(output)
            if gradient == 1.0:
                return output
            return self.changed(output, lambda hidden: _handing_down(hidden, gradient))

        with self.gates.visited(visit):
            yield outputs

    @contextmanager
    def leaving(
        self,
        depths: Collection[int],
        leave: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> Iterator[None]:
        """Let utterances leave the batch on the way, at the end those that are left.

        Layers run as long as there are utterances. The forward in this context gives
        nothing back: what is wanted of an output, `leave` takes. The frames stay as
        many as they are: padding that is cut would change what is beside it.

        Args:
            depths: how many first layers utterances may leave after.
            leave: takes such a depth, its output (Batch, Time, Dim) for the utterances
                that are still there, and their valid frames (Batch,); says which of
                them leave (Batch,).

        Raises:
            UserError: when other layers run than the first ones.
        """
        layers = self.active_layers
        deepest = len(layers)
        if layers != tuple(range(deepest)):
            raise UserError(
                f"utterances can not leave layers {list(layers)} early: what layer n "
                "gives is an exit's output just where the first layers run"
            )

        def visit(slot: int, output):
            depth = slot + 1
            if depth < deepest and depth not in depths:
                return output
            lengths = self.lengths_of(output)
            stays = ~leave(depth, self.output_of(output), lengths)
            if depth == deepest or not stays.any():
                raise _AllLeft
            return output if stays.all() else self.kept_of(output, stays)

        with self.gates.visited(visit), suppress(_AllLeft):
            yield

    def output_of(self, output: Any) -> torch.Tensor:
        """Return the encoder's output, if `output` is what its last layer gave."""
        raise NotImplementedError

    def lengths_of(self, output: Any) -> torch.Tensor:
        """Return the valid frames (Batch,) of what a layer gave."""
        raise NotImplementedError

    def kept_of(self, output: Any, stays: torch.Tensor) -> Any:
        """Return what a layer gave, for those utterances (Batch,) that stay."""
        raise NotImplementedError

    def changed(
        self, output: Any, change: Callable[[torch.Tensor], torch.Tensor]
    ) -> Any:
        """Return what a layer gave, with another hidden state (Batch, Time, Dim)."""
        raise NotImplementedError


def _handing_down(hidden: torch.Tensor, share: float) -> torch.Tensor:
    """Return the same, which hands down a share of its gradient."""
    hidden = hidden.view_as(hidden)  # exits use it too, and their gradient stays whole
    if hidden.requires_grad:
        hidden.register_hook(lambda gradient: gradient * share)
    return hidden


class LayerDropEncoder(ExitingEncoder):
    """Mixin that gates the `encoders` of an ESPnet encoder (arXiv 2601.16117).

    Every option of the ESPnet encoder, plus:

    Args:
        depth_sampler: how many layers a training step runs: `bernoulli` | `uniform` |
            `exits` | `full`, or a weight for each depth (see `dldkit.depth.sampler`).
        keep_prob: probability of keeping a layer, for `bernoulli`.
        min_depth: fewest layers of a training step.
        layer_choice: which layers a drawn depth means: `random` | `even` | `prefix`.
            The last two are also what a depth means at inference; for `random` that
            is `even`.
        exits: depths whose output is trained as well, where a step passes them on its
            way to a deeper one; a number n = after every n layers. They need
            `layer_choice: prefix`.
        keep_final_norm: skipped layers still apply their final LayerNorm.

    Raises:
        UserError: for options out of range, or that can not work together.
    """

    interctc_selector = "prefix"  # ESPnet's intermediate CTC is early exit as well

    @checked_options
    def __init__(
        self,
        *args,
        depth_sampler: Union[str, Mapping[int, float]] = "bernoulli",
        keep_prob: float = 0.5,
        min_depth: int = 1,
        layer_choice: str = "random",
        exits: Union[int, Sequence[int], None] = (),
        keep_final_norm: bool = False,
        **kwargs,
    ):
        if kwargs.get("layer_drop_rate"):
            raise UserError(
                "layer_drop_rate is ESPnet's own (without effect in most of its "
                "encoders); use depth_sampler: bernoulli with keep_prob = 1 - "
                "layer_drop_rate"
            )
        if keep_final_norm and layer_choice == "prefix":
            raise UserError(
                "keep_final_norm changes what layers give once more are skipped, and "
                "with layer_choice: prefix the first layers are an exit on the way to "
                "the others: set keep_final_norm: false, or another layer_choice"
            )
        super().__init__(*args, **kwargs)
        self.encoders = GatedLayers(
            *self.encoders,
            sampler=DepthSampler(
                depth_sampler, keep_prob, min_depth, layer_choice, exits
            ),
            keep_final_norm=keep_final_norm,
        )
        self.follow_sampler()
        if self.exits and kwargs.get("interctc_layer_idx"):
            raise UserError(
                "exits and interctc_layer_idx train the same outputs: keep one of them"
            )
        if layer_choice not in SELECTORS and (
            depth_sampler == "full" and kwargs.get("interctc_layer_idx")
        ):
            self.selector = self.interctc_selector

    def output_of(self, output: Any) -> torch.Tensor:
        """Return the encoder's output, if `output` is what its last layer gave."""
        hidden, _ = output
        if isinstance(hidden, tuple):  # with the positional embedding
            hidden = hidden[0]
        # ESPnet's encoders have no after_norm where their layers end in a norm
        return self.after_norm(hidden) if hasattr(self, "after_norm") else hidden

    def lengths_of(self, output: Any) -> torch.Tensor:
        """Return the valid frames (Batch,) of what a layer gave."""
        return output[1].squeeze(1).sum(1)

    def kept_of(self, output: Any, stays: torch.Tensor) -> Any:
        """Return what a layer gave, for those utterances (Batch,) that stay."""
        hidden, masks = self.changed(output, lambda hidden: hidden[stays])
        return hidden, masks[stays]

    def changed(
        self, output: Any, change: Callable[[torch.Tensor], torch.Tensor]
    ) -> Any:
        """Return what a layer gave, with another hidden state (Batch, Time, Dim)."""
        hidden, masks = output
        if isinstance(hidden, tuple):  # the positional embedding is of no utterance
            return (change(hidden[0]), *hidden[1:]), masks
        return change(hidden), masks

    def __init_subclass__(cls):
        super().__init_subclass__()
        cls.__signature__ = merged_signature(cls)


class LDConformerEncoder(LayerDropEncoder, ConformerEncoder):
    """Conformer whose depth is random in training and chosen at inference."""


class LDTransformerEncoder(LayerDropEncoder, TransformerEncoder):
    """Transformer whose depth is random in training and chosen at inference."""


class LDBranchformerEncoder(LayerDropEncoder, BranchformerEncoder):
    """Branchformer whose depth is random in training and chosen at inference."""


class LDEBranchformerEncoder(LayerDropEncoder, EBranchformerEncoder):
    """E-Branchformer whose depth is random in training and chosen at inference."""

    # ESPnet gives its intermediate CTC what the final norm has not seen
    interctc_selector = "even"
