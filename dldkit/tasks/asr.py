"""ESPnet's ASR task with dldkit's classes and trainers."""

import argparse
from pathlib import Path
from typing import Callable, Optional

from espnet2.asr.espnet_model import ESPnetASRModel
from espnet2.tasks.asr import ASRTask

import dldkit
from dldkit.asr.hf_encoder import weight_files
from dldkit.asr.model import SELF
from dldkit.asr.reference import POSTERIORS, is_cached, reference_file
from dldkit.config_files import resolved_arguments
from dldkit.data.frames import read_in_training
from dldkit.errors import UserError
from dldkit.train.choices import TrainerChoice, trainer_choices
from dldkit.train.trainer import CHECKPOINT

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
        """Let training read cached posteriors, and refuse utterances without them."""
        reference = (args.model_conf or {}).get("reference")
        if not args.collect_stats and is_cached(reference):
            read_in_training(args, Path(reference), POSTERIORS, "collect_posteriors")

    @classmethod
    def teacher_files(cls, args: argparse.Namespace) -> dict[str, Path]:
        """Return the files of the reference and of a pretrained encoder, if any.

        Raises:
            UserError: when a pretrained encoder would begin with random weights.
        """
        files = {}
        if args.encoder == "ld_hf":
            _refuse_lost_weights(args)
            found = weight_files(args.encoder_conf.get("model", ""))
            files = {f"model {path.name}": path for path in found}
        reference = (args.model_conf or {}).get("reference")
        if reference not in (None, SELF):
            files["reference"] = reference_file(reference)
        return files

    @classmethod
    def hub_teachers(cls, args: argparse.Namespace) -> dict[str, str]:
        """Return the name of a pretrained encoder that is not on this machine."""
        model = (args.encoder_conf or {}).get("model")
        on_hub = args.encoder == "ld_hf" and model and not weight_files(model)
        return {"model": str(model)} if on_hub else {}

    @classmethod
    def optional_data_names(
        cls, train: bool = True, inference: bool = False
    ) -> tuple[str, ...]:
        """Return the data that training may have."""
        return (*super().optional_data_names(train, inference), POSTERIORS)


def _refuse_lost_weights(args: argparse.Namespace) -> None:
    """Refuse a config.yaml of an experiment, without its weights, as a new training."""
    is_resumed = args.resume and Path(args.output_dir, CHECKPOINT).is_file()
    if "hf_config" in args.encoder_conf and not (args.init_param or is_resumed):
        raise UserError(
            "encoder_conf has hf_config, as the config.yaml of an experiment, whose "
            "checkpoint has the weights: name it by --init_param, or remove hf_config "
            "to begin with those of the pretrained model"
        )
