"""ESPnet's ASR task with dldkit's classes and trainers."""

from espnet2.tasks.asr import ASRTask

import dldkit
from dldkit.train.choices import TrainerChoice, trainer_choices

# Children of multi-GPU training import just this module.
dldkit.register()


class DLDASRTask(TrainerChoice, ASRTask):
    """ASR with run-time depth, distillation and stacking."""

    class_choices_list = [*ASRTask.class_choices_list, trainer_choices]
