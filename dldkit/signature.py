"""Constructor signatures that ESPnet's `--print_config` can read."""

import inspect


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
