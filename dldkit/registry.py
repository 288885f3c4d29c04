"""The only place that touches ESPnet's class choices."""

import functools
from pathlib import Path

from espnet2.tasks.asr import (
    ASRTask,
    encoder_choices,
    model_choices,
    normalize_choices,
)

from dldkit.asr.encoder import (
    LDBranchformerEncoder,
    LDConformerEncoder,
    LDEBranchformerEncoder,
    LDTransformerEncoder,
)
from dldkit.asr.model import DLDModel
from dldkit.asr.normalize import GlobalMVN, UtteranceMVN
from dldkit.config_files import resolved_config


def register() -> None:
    """Add the public names of dldkit to ESPnet's choices."""
    encoder_choices.classes.update(
        ld_conformer=LDConformerEncoder,
        ld_transformer=LDTransformerEncoder,
        ld_branchformer=LDBranchformerEncoder,
        ld_e_branchformer=LDEBranchformerEncoder,
    )
    model_choices.classes.update(dld=DLDModel)
    normalize_choices.classes.update(global_mvn=GlobalMVN, utterance_mvn=UtteranceMVN)
    if not hasattr(ASRTask.build_model_from_file, "resolves_files"):
        _let_espnet_resolve_files()


def _let_espnet_resolve_files() -> None:
    """Let ESPnet's own commands find a config's files beside it."""
    build = ASRTask.build_model_from_file.__func__

    @functools.wraps(build)
    def build_model_from_file(cls, config_file=None, model_file=None, device="cpu"):
        if config_file is None:
            config_file = Path(model_file).parent / "config.yaml"
        with resolved_config(config_file) as config:
            return build(cls, config, model_file, device)

    build_model_from_file.resolves_files = True
    ASRTask.build_model_from_file = classmethod(build_model_from_file)
