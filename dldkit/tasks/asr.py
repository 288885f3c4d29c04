"""ESPnet's ASR task with dldkit's classes and trainer."""

from espnet2.tasks.asr import ASRTask

import dldkit
from dldkit.train.trainer import ResumableTrainer

# Children of multi-GPU training import just this module.
dldkit.register()


class DLDASRTask(ASRTask):
    """ASR with run-time depth and distillation; a resumed run is the unbroken run."""

    trainer = ResumableTrainer
