"""Whether transformers is there, and what options that need it may be.

It stands here because recipes check both as well: `dldkit.asr` imports torch, which
takes longer than all their checks together.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from dldkit.errors import UserError

SCHEDULE = ("name", "warmup_ratio")
LAYER_WEIGHTS = ("last", "weighted_sum")
SWITCH = (lambda value: isinstance(value, bool), "true or false")
# `type` where numbers are meant: to `isinstance`, True is the integer 1
ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "freeze_cnn": SWITCH,
    "freeze_steps": (
        lambda value: type(value) is int and value >= 0,
        "a whole number from 0",
    ),
    "layer_weights": (
        lambda value: value in LAYER_WEIGHTS,
        " or ".join(LAYER_WEIGHTS),
    ),
    "gradient_checkpointing": SWITCH,
    "apply_spec_augment": SWITCH,
    "mask_time_prob": (
        lambda value: value is None or type(value) in (int, float) and 0 <= value <= 1,
        "a number from 0 to 1, or null for that of the checkpoint",
    ),
    "whisper_pad": SWITCH,
    "num_blocks": (
        lambda value: value is None or type(value) is int and value >= 1,
        "a whole number from 1, or null for all layers",
    ),
    "normalize": (
        lambda value: value is None or isinstance(value, bool),
        "true, false, or null for what the model expects",
    ),
}


def needs_transformers(what: str, reason: str = "") -> UserError:
    """Return the error of what needs transformers, with how to install it."""
    return UserError(
        f"{what} needs transformers: run tools/install.sh, or pip install "
        f"'dldkit[sfm]'{reason}"
    )


def refuse_without_transformers(what: str) -> None:
    """Refuse what needs transformers where that is not installed.

    Raises:
        UserError: saying how to install it.
    """
    if not find_spec("transformers"):
        raise needs_transformers(what)


def check_schedule(scheduler_conf: Mapping[str, Any]) -> None:
    """Refuse what `scheduler: transformers` can not be built with.

    Raises:
        UserError: naming the option, or saying how to install transformers.
    """
    refuse_without_transformers("scheduler: transformers")
    if unknown := sorted(set(scheduler_conf) - set(SCHEDULE)):
        raise UserError(
            f"scheduler_conf {', '.join(unknown)}: scheduler: transformers takes "
            f"{' and '.join(SCHEDULE)} alone; warmup_ratio is a share of all steps"
        )


def check_values(**options: Any) -> None:
    """Refuse values of a wrong type or out of range; options may be left out.

    Raises:
        UserError: naming the option, and what it may be.
    """
    for name, (is_allowed, what) in ALLOWED.items():
        if name in options and not is_allowed(options[name]):
            raise UserError(f"encoder_conf {name} {options[name]!r}: write {what}")
    mask_time_prob = options.get("mask_time_prob")
    if mask_time_prob is not None and not options.get("apply_spec_augment"):
        raise UserError(
            f"encoder_conf mask_time_prob {mask_time_prob} without "
            "apply_spec_augment: set apply_spec_augment: true, or leave it out"
        )
