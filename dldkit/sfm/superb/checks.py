"""What SUPERB needs is looked for, or downloaded, before anything runs."""

import importlib.util
import logging
import shutil
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Mapping, Optional, Sequence

from dldkit.data.corpus import DOWNLOADS
from dldkit.errors import UserError
from dldkit.sfm.superb.tasks import CORPORA, TASKS
from dldkit.step import atomic

INSTALL = (
    "DLDKIT_EXTRAS=espeak,sfm,test,superb tools/install.sh, or pip install "
    "'dldkit[superb]'"
)
MODULES = ("s3prl", "editdistance", "sed_eval", "more_itertools", "pkg_resources")


def check_environment(tasks: Sequence[str]) -> None:
    """Look for everything that the tasks need besides their corpora.

    Raises:
        UserError: a task that is none, or a package or a program is missing.
    """
    runnable = [name for name, task in TASKS.items() if task.problem]
    for name in tasks:
        if name not in runnable:
            raise UserError(f"--tasks {name}: choose from {' '.join(runnable)}")
    missing = [name for name in MODULES if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(f"SUPERB needs {', '.join(missing)}: {INSTALL}")
    if "asv" in tasks and not shutil.which("sox"):
        raise UserError(
            "ASV trims silence with the program sox, which is not in PATH: install it "
            "(apt-get install sox, or conda install -c conda-forge sox)"
        )


def find_corpora(
    tasks: Sequence[str], paths: dict[str, Optional[str]], downloads: bool = False
) -> dict[str, Path]:
    """Return the directories of the corpora that the tasks need.

    Args:
        paths: directories by their names in CORPORA.
        downloads: what is to be found in `DOWNLOADS` need not be there yet.

    Raises:
        UserError: one was not named, or holds something else.
    """
    found = {}
    for task in tasks:
        for name in TASKS[task].corpora.values():
            corpus, path = CORPORA[name], paths.get(name)
            if not path:
                raise UserError(
                    f"{task.upper()} needs a corpus: name its directory with --{name} "
                    f"or {name.upper()} in the environment ({corpus.source})"
                )
            root = Path(path).resolve()
            if corpus.parent_of and (root / corpus.parent_of).is_dir():
                root /= corpus.parent_of
            missing = [part for part in corpus.holds if not (root / part).exists()]
            if missing and not (downloads and path == DOWNLOADS):
                raise UserError(
                    f"--{name} {path} (or {name.upper()}) has no {', '.join(missing)}: "
                    f"name the directory that holds it ({corpus.source})"
                )
            found[name] = root
    return found


def check_tasks(
    tasks: Sequence[str],
    corpora: dict[str, Optional[str]],
    dscore: Optional[str],
    rates: Mapping[str, Sequence[float]],
    downloads: bool = False,
) -> tuple[list[str], dict[str, Path]]:
    """Return the tasks to run, and the directories of their corpora.

    Args:
        tasks: empty = those whose corpora are named.
        corpora, downloads: see `find_corpora`.
        rates: learning rates of tasks.

    Raises:
        UserError: a package, a program or a corpus is missing, no corpus is named, or
            there are rates for a task that does not run, or can not choose.
    """
    tasks = list(tasks) or [
        name
        for name, task in TASKS.items()
        if task.corpora and all(corpora.get(corpus) for corpus in task.corpora.values())
    ]
    if not tasks:
        names = ", ".join(f"--{name} ({name.upper()})" for name in CORPORA)
        raise UserError(
            f"SUPERB has nothing to run: name the directory of a corpus with {names}"
        )
    check_environment(tasks)
    found = find_corpora(tasks, corpora, downloads)
    for task in set(rates) - set(tasks):
        raise UserError(
            f"--lr names {task}, which does not run: choose from {' '.join(tasks)}"
        )
    if len(rates.get("asv", ())) > 1:
        raise UserError("ASV has no dev set to choose on: give --lr one rate for asv")
    if "sd" in tasks and not (dscore and (Path(dscore) / "score.py").is_file()):
        raise UserError(
            f"SD is scored with dscore, and --dscore {dscore or ''} (or DSCORE) has no "
            "score.py: git clone https://github.com/nryant/dscore (BSD 2-Clause), and "
            "name that directory"
        )
    return tasks, found


def fetch_lists(tasks: Sequence[str], list_dir: Path) -> None:
    """Download the splits and lexicons that the tasks need; files there are kept.

    Raises:
        UserError: one can not be downloaded.
    """
    list_dir.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        for name, url in (TASKS[task].lists or {}).items():
            path = list_dir / name
            if path.is_file():
                continue
            logging.info(f"{task}: downloading {url} to {path}")
            try:
                with (
                    urllib.request.urlopen(url, timeout=60) as response,
                    atomic(path) as part,
                ):
                    part.write_bytes(response.read())
            except (OSError, HTTPException) as error:
                raise UserError(
                    f"{task.upper()} needs {url}, which can not be downloaded "
                    f"({error}): fetch it elsewhere, and put it at {path}"
                ) from error
