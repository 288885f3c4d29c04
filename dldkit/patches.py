"""Where dldkit changes what ESPnet, torch and lhotse do, because there is no seam.

What it changes for s3prl is in `dldkit.sfm.superb` (`s3prl_main` and `upstream`).

- `patched`: ESPnet looks some classes and functions up by name in its own modules. For
  the span of one call, another one stands there: `Speech2Text`, `_write_results` and
  `_too_short_result` (decoding at a depth, in `dldkit.asr.inference`), the trainer's
  `Reporter` (only epochs at full depth can be the best, in `dldkit.train.stacking`),
  and `torch.save` (files appear as a whole, in `dldkit.train.trainer`).
  In lhotse's recipes (`dldkit.data.corpus.reading`), a recording is described without
  sph2pipe, and one bad file does not end the preparation.
- `let_espnet_resolve_files`: ESPnet's commands open the files that a config names
  relative to the working directory; here they look beside the config first. It replaces
  `ASRTask.build_model_from_file`.
- `let_espnet_save_encoders`: what an encoder learnt of itself when it was built, as the
  config of a pretrained model, is written into `args`, and so into config.yaml. It
  replaces `ASRTask.build_model`.
- `be_importable_as_main`: processes that multi-GPU training spawns import their
  parent's main module, except for one that is called `__main__`, as that of
  `python -m dldkit` is. It replaces `sys.modules["__main__"]`.
- `prepare_espnet`, before ESPnet is imported: it prints in each process that a package
  is missing which it does not need. Its module is imported early, and that one line is
  dropped. And each of its functions that checks types is compiled anew at import, which
  is a third of the ten seconds that a command takes to start; here, it is compiled when
  it is first called. It replaces `typeguard.typechecked`.
"""

import contextlib
import functools
import importlib
import inspect
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import typeguard

from dldkit.config_files import resolved_config

ATTENTION = "espnet2.legacy.nets.pytorch_backend.transformer.attention"


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let `owner.name` be `value` while the context lasts."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def let_espnet_resolve_files() -> None:
    """Let ESPnet's own commands find a config's files beside it."""
    from espnet2.tasks.asr import ASRTask

    build = ASRTask.build_model_from_file.__func__
    if hasattr(build, "resolves_files"):
        return

    @functools.wraps(build)
    def build_model_from_file(cls, config_file=None, model_file=None, device="cpu"):
        if config_file is None:
            config_file = Path(model_file).parent / "config.yaml"
        with resolved_config(config_file) as config:
            return build(cls, config, model_file, device)

    build_model_from_file.resolves_files = True
    ASRTask.build_model_from_file = classmethod(build_model_from_file)


def let_espnet_save_encoders() -> None:
    """Let config.yaml say all that it takes to build an encoder again."""
    from espnet2.tasks.asr import ASRTask, encoder_choices

    build = ASRTask.build_model.__func__
    if hasattr(build, "saves_encoders"):
        return

    @functools.wraps(build)
    def build_model(cls, args):
        encoder = encoder_choices.get_class(args.encoder)
        if hasattr(encoder, "check_arguments"):
            encoder.check_arguments(args)
        model = build(cls, args)
        if saved := getattr(model.encoder, "saved_options", None):
            args.encoder_conf = {**args.encoder_conf, **saved}
        return model

    build_model.saves_encoders = True
    ASRTask.build_model = classmethod(build_model)


def be_importable_as_main(module: ModuleType) -> None:
    """Let spawned children import `module` as their parent's main module."""
    sys.modules["__main__"] = module


def prepare_espnet() -> None:
    """Let ESPnet be imported sooner, and without its message of a missing package."""
    if not hasattr(typeguard.typechecked, "waits"):
        typeguard.typechecked = _checked_when_called(typeguard.typechecked)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        importlib.import_module(ATTENTION)
    for line in said.getvalue().splitlines():
        if not line.startswith("Failed to import Flash Attention"):
            print(line, file=sys.stderr)


def _checked_when_called(typechecked: Callable) -> Callable:
    """Return a `typechecked` that adds a function's checks at its first call."""

    def decorate(target: Any = None, **options: Any) -> Any:
        if not inspect.isfunction(target):  # a class, or options come first
            return typechecked(target, **options)
        checked = None

        @functools.wraps(target)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal checked
            checked = checked or typechecked(target)
            return checked(*args, **kwargs)

        return call

    decorate.waits = True
    return decorate
