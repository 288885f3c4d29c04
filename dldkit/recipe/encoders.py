"""Which options an encoder has, read from its source: importing it takes seconds."""

import ast
from importlib.util import find_spec
from pathlib import Path

from omegaconf import DictConfig

from dldkit.errors import UserError

REGISTRY = "dldkit.registry"


def refuse_unknown_options(config: DictConfig) -> None:
    """Refuse an encoder_conf that one of our encoders can not be built with.

    Raises:
        UserError: naming the options that it does not have.
    """
    encoder = str(config.get("encoder"))
    calls = [node for node in ast.walk(_source(REGISTRY)) if isinstance(node, ast.Call)]
    classes = {k.arg: ast.unparse(k.value) for call in calls for k in call.keywords}
    if not encoder.startswith("ld_") or encoder not in classes:
        return
    known = options_of(classes[encoder])
    unknown = [key for key in config.get("encoder_conf") or {} if key not in known]
    if unknown:
        raise UserError(
            f"encoder_conf {', '.join(map(str, unknown))}: {encoder} has no such "
            "option; remove it from the config or its arguments, or choose a "
            "system that does not set it. "
            f"It has {', '.join(sorted(known))}"
        )


def options_of(name: str, module: str = REGISTRY) -> set[str]:
    """Return the options of a class that a module defines or imports.

    Args:
        name: as the module calls it.
    """
    body = _source(module).body
    classes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
    if name not in classes:
        imports = (node for node in body if isinstance(node, ast.ImportFrom))
        sources = {alias.name: node.module for node in imports for alias in node.names}
        source = sources.get(name, "")
        is_known = source.startswith(("dldkit.", "espnet2."))
        return options_of(name, source) if is_known else set()
    found: set[str] = set()
    for item in classes[name].body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            taken = [*item.args.args, *item.args.kwonlyargs]
            found = {argument.arg for argument in taken} - {"self", "input_size"}
            if not item.args.kwarg:
                return found
    # what it does not take itself goes to those it inherits from
    bases = (options_of(ast.unparse(base), module) for base in classes[name].bases)
    return found.union(*bases)


def _source(module: str) -> ast.Module:
    """Return a module's source; to look it up by `find_spec` would import packages."""
    package, *names = module.split(".")
    root = Path(find_spec(package).origin).parent
    return ast.parse(root.joinpath(*names).with_suffix(".py").read_text("utf-8"))
