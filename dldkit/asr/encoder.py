"""ESPnet's encoders with layer dropping in training and run-time depth."""

from espnet2.asr.encoder.branchformer_encoder import BranchformerEncoder
from espnet2.asr.encoder.conformer_encoder import ConformerEncoder
from espnet2.asr.encoder.e_branchformer_encoder import EBranchformerEncoder
from espnet2.asr.encoder.transformer_encoder import TransformerEncoder

from dldkit.depth.layers import DynamicDepth, GatedLayers
from dldkit.depth.sampler import build_sampler
from dldkit.errors import UserError
from dldkit.signature import merged_signature


class LayerDropEncoder(DynamicDepth):
    """Mixin that gates the `encoders` of an ESPnet encoder (arXiv 2601.16117).

    Every option of the ESPnet encoder, plus:

    Args:
        depth_sampler: which layers a training step runs: `bernoulli` | `uniform` |
            `full` (see `dldkit.depth.sampler`).
        keep_prob: probability of keeping a layer, for `bernoulli`.
        min_depth: fewest layers of a training step.
        keep_final_norm: skipped layers still apply their final LayerNorm.
    """

    def __init__(
        self,
        *args,
        depth_sampler: str = "bernoulli",
        keep_prob: float = 0.5,
        min_depth: int = 1,
        keep_final_norm: bool = False,
        **kwargs,
    ):
        if kwargs.get("layer_drop_rate"):
            raise UserError(
                "layer_drop_rate does nothing in ESPnet's encoders; use depth_sampler: "
                "bernoulli with keep_prob = 1 - layer_drop_rate"
            )
        super().__init__(*args, **kwargs)
        self.encoders = GatedLayers(
            *self.encoders,
            sampler=build_sampler(depth_sampler, keep_prob, min_depth),
            keep_final_norm=keep_final_norm,
        )
        # exits after some layers, of which all always train: a depth means an exit
        if depth_sampler == "full" and kwargs.get("interctc_layer_idx"):
            self.selector = "prefix"

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
