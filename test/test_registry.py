import sys

import pytest
from espnet2.asr.espnet_model import ESPnetASRModel
from espnet2.tasks.asr import encoder_choices, model_choices

import dldkit

NAMES = ["ld_conformer", "ld_transformer", "ld_branchformer", "ld_e_branchformer"]


@pytest.fixture
def choices(monkeypatch):
    """ESPnet's choices as they are before dldkit comes."""
    for registry in (encoder_choices, model_choices):
        classes = {
            name: cls
            for name, cls in registry.classes.items()
            if not name.startswith(("ld_", "dld"))
        }
        monkeypatch.setattr(registry, "classes", classes)
    return encoder_choices, model_choices


def test_adds_its_names_and_leaves_the_others(choices):
    encoders, models = (dict(choice.classes) for choice in choices)
    dldkit.register()
    assert {n: c for n, c in encoder_choices.classes.items() if n in encoders} == (
        encoders
    )
    assert set(encoder_choices.classes) - set(encoders) == {*NAMES, "ld_hf"}
    assert set(model_choices.classes) - set(models) == {"dld"}
    for name in NAMES:
        theirs = encoder_choices.get_class(name.removeprefix("ld_"))
        assert issubclass(encoder_choices.get_class(name), theirs)
    assert issubclass(model_choices.get_class("dld"), ESPnetASRModel)


def test_is_idempotent(choices):
    dldkit.register()
    before = [dict(choice.classes) for choice in choices]
    dldkit.register()
    assert [choice.classes for choice in choices] == before
    assert encoder_choices.choices().count("ld_conformer") == 1


def test_importing_dldkit_is_cheap(python):
    """Neither torch nor ESPnet is imported before register() is called."""
    heavy = {"torch", "espnet2", "numpy", "kaldiio", "lhotse"}
    code = f"import sys, dldkit; print(sorted({heavy} & set(sys.modules)))"
    assert python("-c", code).stdout.strip() == "[]"
    assert "espnet2" in sys.modules  # here it is
