"""The Python code is formatted and free of what flake8 finds."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("tool", ["flake8", "black --check", "isort --check"])
def test_finds_nothing(tool):
    command = [sys.executable, "-m", *tool.split(), "dldkit", "test", "bench", "egs2"]
    process = subprocess.run(
        [*command, "setup.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout + process.stderr
