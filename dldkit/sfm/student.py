"""The student: a HuBERT whose depth is chosen at run time."""

from typing import Any

from transformers import HubertConfig, HubertModel

from dldkit.depth.layers import GatedModuleList
from dldkit.depth.sampler import DepthSampler
from dldkit.errors import UserError

# What distillation does without: layers are dropped by the sampler, alike on all
# ranks, and a masked input would not be what the teacher hears.
OFF = dict(layerdrop=0.0, mask_time_prob=0.0, mask_feature_prob=0.0)


def build_student(conf: dict[str, Any], sampler: DepthSampler) -> HubertModel:
    """Build a HuBERT from the keys of its `transformers.HubertConfig`.

    The paper's student (arXiv 2606.11766) has 12 layers, hidden_size 384,
    intermediate_size 1536, 8 attention heads and HuBERT's CNN: 26.87 M parameters.

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
            "model_conf depth_sampler; the input is not masked in distillation"
        )
    try:
        student = HubertModel(HubertConfig(**{**conf, **OFF}))
    except Exception as error:  # transformers' checks raise errors of many kinds
        raise UserError(f"student_conf: {type(error).__name__}: {error}") from error
    student.encoder.layers = GatedModuleList(student.encoder.layers, sampler)
    return student
