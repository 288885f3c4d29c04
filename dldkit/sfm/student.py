"""The student: a HuBERT whose depth is chosen at run time."""

from typing import Any, Sequence

import torch
from transformers import HubertConfig, HubertModel

from dldkit.depth.layers import GatedModuleList
from dldkit.depth.sampler import DepthSampler
from dldkit.errors import UserError

# What distillation does without: layers are dropped by the sampler, alike on all ranks,
# and what is masked of the input are spans of time, if anything.
OFF = dict(layerdrop=0.0, mask_feature_prob=0.0)

# Families whose layers are HuBERT's, and the options that decide what the layers, and
# what lies in front of them, compute.
ALIKE = ("hubert", "wav2vec2", "unispeech-sat")
SAME = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
    "do_stable_layer_norm",
    "feat_proj_layer_norm",
    "num_conv_pos_embeddings",
    "num_conv_pos_embedding_groups",
    "conv_pos_batch_norm",
)


def build_student(conf: dict[str, Any], sampler: DepthSampler) -> HubertModel:
    """Build a HuBERT from the keys of its `transformers.HubertConfig`.

    The paper's student (arXiv 2606.11766) has 12 layers, hidden_size 384,
    intermediate_size 1536, 8 attention heads and HuBERT's CNN: 26.87 M parameters. Its
    input is not masked, unless `mask_time_prob` is set.

    Args:
        sampler: draws the layers of each training step.

    Raises:
        UserError: for a key that HubertConfig does not have, or values that do not fit.
    """
    known = HubertConfig().to_dict()
    if unknown := sorted(set(conf) - set(known)):
        raise UserError(
            f"student_conf: transformers.HubertConfig has no {', '.join(unknown)}"
        )
    if set_ := [key for key in OFF if conf.get(key)]:
        raise UserError(
            f"student_conf: {', '.join(set_)} can not be set: to drop layers, use "
            "model_conf depth_sampler; to mask the input, use mask_time_prob"
        )
    try:
        student = HubertModel(HubertConfig(**{"mask_time_prob": 0.0, **conf, **OFF}))
    except Exception as error:  # transformers' checks raise errors of many kinds
        raise UserError(f"student_conf: {type(error).__name__}: {error}") from error
    student.encoder.layers = GatedModuleList(student.encoder.layers, sampler)
    return student


def copy_layers(
    student: HubertModel, teacher: torch.nn.Module, layers: Sequence[int]
) -> None:
    """Let the student's first slots begin as the teacher's `layers`, from 1.

    What lies in front of the teacher's first layer comes with them: the positions, the
    LayerNorm, if it is there, and the projection of the CNN's features, if they are as
    wide as the student's.

    Raises:
        UserError: when the teacher's layers are of another kind or size.
    """
    theirs = getattr(teacher, "config", None)
    kind = getattr(theirs, "model_type", type(teacher).__name__)
    if kind not in ALIKE:
        raise UserError(
            f"the layers of a {kind} model are not those of a HuBERT: choose a teacher "
            f"of {', '.join(ALIKE)}"
        )
    usual = HubertConfig()
    for key in SAME:
        wanted = getattr(theirs, key, getattr(usual, key))
        found = getattr(student.config, key)
        if found != wanted:
            raise UserError(
                f"student_conf {key} is {found}, but {wanted} in the teacher: a layer "
                f"that is copied needs the same; set it to {wanted}"
            )
    pairs = [(student.encoder.pos_conv_embed, teacher.encoder.pos_conv_embed)]
    if not student.config.do_stable_layer_norm:  # else it follows the last layer
        pairs.append((student.encoder.layer_norm, teacher.encoder.layer_norm))
    if student.config.conv_dim[-1] == theirs.conv_dim[-1]:
        pairs.append((student.feature_projection, teacher.feature_projection))
    slots = student.encoder.layers.children()
    pairs += [(slot, teacher.encoder.layers[n - 1]) for slot, n in zip(slots, layers)]
    for ours, their in pairs:
        ours.load_state_dict(their.state_dict())
