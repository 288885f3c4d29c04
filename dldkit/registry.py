"""The only place that touches ESPnet's class choices."""

from espnet2.tasks.abs_task import scheduler_classes
from espnet2.tasks.asr import (
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
from dldkit.asr.hf_encoder import LDHuggingFaceEncoder
from dldkit.asr.model import DLDModel
from dldkit.asr.normalize import GlobalMVN, UtteranceMVN
from dldkit.data.frames import register_data_type
from dldkit.patches import let_espnet_resolve_files, let_espnet_save_encoders
from dldkit.train.schedule import TransformersSchedule


def register() -> None:
    """Add the public names of dldkit to ESPnet's choices."""
    encoder_choices.classes.update(
        ld_conformer=LDConformerEncoder,
        ld_transformer=LDTransformerEncoder,
        ld_branchformer=LDBranchformerEncoder,
        ld_e_branchformer=LDEBranchformerEncoder,
        ld_hf=LDHuggingFaceEncoder,
    )
    model_choices.classes.update(dld=DLDModel)
    normalize_choices.classes.update(global_mvn=GlobalMVN, utterance_mvn=UtteranceMVN)
    scheduler_classes.update(transformers=TransformersSchedule)
    register_data_type()
    let_espnet_resolve_files()
    let_espnet_save_encoders()
