"""ESPnet's ASR task with dldkit's classes and trainers."""

import argparse
from typing import Callable, Optional

from espnet2.asr.espnet_model import ESPnetASRModel
from espnet2.tasks.asr import ASRTask

import dldkit
from dldkit.asr.reference import check_cached_ids
from dldkit.config_files import resolved_arguments
from dldkit.train.choices import TrainerChoice, trainer_choices

# Children of multi-GPU training import just this module.
dldkit.register()


class DLDASRTask(TrainerChoice, ASRTask):
    """ASR with run-time depth, distillation and stacking."""

    class_choices_list = [*ASRTask.class_choices_list, trainer_choices]

    @classmethod
    def build_model(cls, args: argparse.Namespace) -> ESPnetASRModel:
        """Build the model; files beside the experiment's config have bare names."""
        with resolved_arguments(args):
            return super().build_model(args)

    @classmethod
    def build_preprocess_fn(
        cls, args: argparse.Namespace, train: bool
    ) -> Optional[Callable]:
        """Build what turns text into tokens."""
        with resolved_arguments(args):
            return super().build_preprocess_fn(args, train)

    @classmethod
    def check_data(cls, args: argparse.Namespace) -> None:
        """Refuse utterances that have no cached posteriors, where these are used."""
        if not args.collect_stats:
            check_cached_ids(args)
