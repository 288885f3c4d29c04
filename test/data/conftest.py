"""Real recordings: those of AN4 that the espnet package carries."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile

from dldkit.data.datadir import read_table

RECIPES = Path(__file__).resolve().parents[2] / "egs2"


def load_recipe(corpus: str) -> ModuleType:
    """Import a recipe's local/data.py."""
    path = RECIPES / corpus / "asr1" / "local" / "data.py"
    spec = importlib.util.spec_from_file_location(f"{corpus}_data", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def recipe():
    """The function that imports a recipe's local/data.py."""
    return load_recipe


@pytest.fixture(scope="session")
def an4(tmp_path_factory) -> Path:
    """The folder that holds train_nodev, train_dev and test of mini_an4, 16 kHz."""
    root = tmp_path_factory.mktemp("an4")
    load_recipe("mini_an4").prepare(root / "downloads", root / "data")
    return root / "data"


@pytest.fixture(scope="session")
def speech(an4) -> list[np.ndarray]:
    """Three real recordings as 16 bit integers."""
    paths = sorted(read_table(an4 / "train_nodev" / "wav.scp").values())[:3]
    return [soundfile.read(path, dtype="int16")[0] for path in paths]
