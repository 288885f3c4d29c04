"""Constructors: options that ESPnet's `--print_config` can read, and their types."""

import functools
import inspect
import math
import typing
from collections.abc import Callable

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from dldkit.errors import UserError


def merged_signature(cls: type) -> inspect.Signature:
    """Return the options of `cls.__init__` and of every parent that it extends.

    ESPnet lists a class's options by inspecting its constructor, so options that a
    subclass forwards through `**kwargs` would be hidden from its users.
    """
    parameters: dict[str, inspect.Parameter] = {}
    for parent in cls.__mro__:
        if "__init__" not in vars(parent):
            continue
        own = list(inspect.signature(parent.__init__).parameters.values())[1:]
        for parameter in own:
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                parameters.setdefault(parameter.name, parameter)
        if not any(p.kind is p.VAR_KEYWORD for p in own):
            break
    required = [p for p in parameters.values() if p.default is p.empty]
    optional = [p for p in parameters.values() if p.default is not p.empty]
    return inspect.Signature(
        [p.replace(kind=p.KEYWORD_ONLY) for p in required + optional]
    )


def checked_options(init: Callable[..., None]) -> Callable[..., None]:
    """Let a constructor refuse options whose values are not of the annotated type.

    In a config file, 1e-3 is text to YAML, and so is "no", which counts as true.
    Options that are forwarded through `**kwargs` are not looked at.
    """
    hints = typing.get_type_hints(init)

    @functools.wraps(init)
    def checked(self, *args, **options) -> None:
        for name in options:
            if name in hints:
                _refuse_other_type(name, options[name], hints[name])
        init(self, *args, **options)

    return checked


def _refuse_other_type(name: str, value: object, hint: typing.Any) -> None:
    is_other = isinstance(value, float) and not math.isfinite(value)
    if isinstance(value, bool):  # which is a number to Python
        is_other = bool not in (hint, *typing.get_args(hint))
    with_all = CollectionCheckStrategy.ALL_ITEMS
    try:
        check_type(value, hint, collection_check_strategy=with_all)
    except TypeCheckError:
        is_other = True
    if is_other:
        kind = hint.__name__ if isinstance(hint, type) else str(hint)
        kind = kind.replace("typing.", "").replace("collections.abc.", "")
        raise UserError(
            f"{name}: {value!r} is no {kind}. (YAML takes 1e-3 for text: write 1.0e-3; "
            "and what is in quotes)"
        )
