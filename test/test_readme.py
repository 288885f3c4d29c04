"""The configs of the main README: they name all options, with their defaults."""

import inspect
import re

import pytest
import yaml
from running import ROOT

from dldkit.asr.encoder import LayerDropEncoder
from dldkit.asr.hf_encoder import LDHuggingFaceEncoder
from dldkit.asr.model import DLDModel
from dldkit.bin.asr_train import get_parser
from dldkit.sfm.data import CropCollateFn
from dldkit.sfm.model import SFMDistillModel
from dldkit.tasks.sfm import SFMDistillTask
from dldkit.train.schedule import TransformersSchedule
from dldkit.train.stacking import Stacking

README = (ROOT / "README.md").read_text(encoding="utf-8")


def config_after(text: str) -> dict:
    """Return the first config of the README that follows a text."""
    found = re.search("\n```yaml\n(.*?)```", README[README.index(text) :], re.DOTALL)
    return yaml.safe_load(found[1])


def own_options(cls: type) -> dict[str, object]:
    """Return what a class's constructor adds to its parents', with the defaults."""
    parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
    return {
        p.name: p.default
        for p in parameters
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name != "self"
    }


ASR = config_after("## From an ESPnet recipe of your own")
PRETRAINED = config_after("### A pretrained speech encoder")
DISTILLED = config_after("A config of your own for `python -m dldkit.bin.sfm_distill")
DEFAULTS = config_after("What else may be set, with the defaults:")
OF_SAMPLER = {"keep_prob", "min_depth", "layer_choice", "exits"}
FILLED_IN = {"teacher_size", "second_size", "sampling_rate"}  # by training itself
GIVEN = {"teacher", "student_conf"}  # in the config before that of the defaults


@pytest.mark.parametrize(
    "shown, cls, elsewhere",
    [
        (ASR["encoder_conf"], LayerDropEncoder, {"keep_prob"}),
        (ASR["model_conf"], DLDModel, set()),
        (
            PRETRAINED["encoder_conf"],
            LDHuggingFaceEncoder,
            {*OF_SAMPLER, "depth_sampler", "input_size"},
        ),
        (DEFAULTS["model_conf"], SFMDistillModel, {*OF_SAMPLER, *FILLED_IN, *GIVEN}),
        (DEFAULTS["trainer_conf"], Stacking, {"fractions"}),
        (DEFAULTS["scheduler_conf"], TransformersSchedule, {"optimizer"}),
    ],
)
def test_names_every_option(shown, cls, elsewhere):
    assert set(shown) | elsewhere == set(own_options(cls))


@pytest.mark.parametrize(
    "shown, cls",
    [
        (DEFAULTS["model_conf"], SFMDistillModel),
        (DEFAULTS["trainer_conf"], Stacking),
        (DEFAULTS["scheduler_conf"], TransformersSchedule),
        (DEFAULTS["collate_fn_conf"], CropCollateFn),
    ],
)
def test_defaults_are_those_of_the_code(shown, cls):
    defaults = own_options(cls)
    for name, value in shown.items():
        expected = defaults[name]
        assert value == (list(expected) if isinstance(expected, tuple) else expected)


def test_defaults_of_the_distillation_command():
    defaults = vars(SFMDistillTask.get_parser().parse_args([]))
    for name, value in DEFAULTS.items():
        if not name.endswith("_conf"):
            assert defaults[name] == value, name


@pytest.mark.parametrize(
    "config, parser",
    [
        (ASR, get_parser),
        (PRETRAINED, get_parser),
        (DISTILLED, SFMDistillTask.get_parser),
        (DEFAULTS, SFMDistillTask.get_parser),
    ],
)
def test_commands_take_the_config(config, parser, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    args = vars(parser().parse_args(["--config", str(file)]))
    assert {name: args[name] for name in config} == config
