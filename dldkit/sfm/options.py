"""Options of a distillation that are left to the teacher."""

from typing import Any

from dldkit.errors import UserError
from dldkit.sfm.teacher import teacher_info


def named_teacher(model_conf: dict[str, Any]) -> str:
    """Return the teacher that the options name.

    Raises:
        UserError: they name none.
    """
    teacher = model_conf.get("teacher")
    if not teacher:
        raise UserError(
            "model_conf names no teacher: set it to a Hugging Face name or directory, "
            "an ESPnet SSL model, or a directory of cached targets"
        )
    return teacher


def complete(model_conf: dict[str, Any]) -> dict[str, Any]:
    """Return the options with those filled in that the teacher decides."""
    needed = ("teacher_layers", "teacher_size", "normalize")
    if all(model_conf.get(key) is not None for key in needed):
        return model_conf
    info = teacher_info(named_teacher(model_conf))
    thirds = sorted({-(-info.num_layers * i // 3) for i in (1, 2, 3)})
    cached = [layer for layer in info.layers or () if layer > 0]  # 0 is the input
    found = dict(
        teacher_layers=cached or thirds,
        teacher_size=info.hidden_size,
        normalize=info.normalize,
    )
    given = {k: v for k, v in model_conf.items() if v is not None}
    return {**model_conf, **found, **given}
