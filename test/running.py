"""Recipes, and other commands, run as a user runs them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GENERATED = {".venv", "data", "dump", "exp", "exp_fbank", "exp_bpe", "downloads"}


def environment(**changes):
    """This process's variables, with this Python first in PATH."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **changes}


def shell(*command, cwd, status=0, env=None, timeout=1700):
    """Run a command; return all that it printed."""
    process = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=env or environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert process.returncode == status, process.stdout
    return process.stdout


def copy_of_the_recipes(directory):
    for name in ("dldkit", "conf", "egs2"):
        shutil.copytree(
            ROOT / name,
            directory / name,
            symlinks=True,
            ignore=(
                shutil.ignore_patterns(*GENERATED, "__pycache__")
                if name == "egs2"
                else shutil.ignore_patterns("__pycache__")
            ),
        )
    return directory / "egs2"


def snippet_of(card):
    """The Python example of a model card."""
    return re.search("```python\n(.*?)```", card.read_text(), re.S)[1]
