"""Run SUPERB's tasks with s3prl on a frozen upstream."""

import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Optional, Sequence, Union

from dldkit.errors import UserError
from dldkit.sfm.superb.checks import check_tasks, check_upstream
from dldkit.sfm.superb.results import scores_of
from dldkit.sfm.superb.tasks import TASKS
from dldkit.step import Step, atomic


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


def run(
    tasks: Sequence[str],
    upstream_dir: Union[str, Path],
    output_dir: Union[str, Path],
    corpora: dict[str, Optional[str]],
    list_dir: Union[str, Path],
    task_args: Sequence[str] = (),
    er_folds: Sequence[int] = range(5),
    device: str = "cpu",
    num_workers: int = 6,
    dscore: Optional[str] = None,
) -> None:
    """Train and test SUPERB's downstream models, each in ``output_dir/TASK``.

    A finished task is kept, an interrupted one goes on from its last checkpoint.

    Raises:
        UserError: something is missing, s3prl failed, or a task's directory is from
            another upstream or other `task_args`.
    """
    upstream_dir, output_dir = Path(upstream_dir).resolve(), Path(output_dir)
    list_dir = Path(list_dir).resolve()
    tasks, roots = check_tasks(tasks, corpora, dscore)
    settings = {"upstream": check_upstream(upstream_dir), "args": list(task_args)}
    steps = []
    for task in tasks:
        for fold in er_folds if TASKS[task].folds else [None]:
            directory = output_dir / task
            if fold is not None:
                directory /= f"fold{fold}"
            step = Step(directory, {}, keep=True, **settings)
            if step.changes("options"):
                raise UserError(
                    f"{directory} is from another upstream or other --task_args: "
                    "remove it, or choose another --upstream_name"
                )
            steps.append((task, fold, step))
    fetch_lists(tasks, list_dir)

    for task, fold, step in steps:
        with step:
            if step.done:
                continue
            directory = step.directory
            _keep_whole_checkpoints(directory / "train")
            options = {
                "target_dir": str(directory.resolve()),
                "cache_dir": str(list_dir),
                "device": device,
                "num_workers": num_workers,
                "build_upstream.name": "hf_hubert_custom",
                "build_upstream.path_or_url": str(upstream_dir),
            }
            for option, name in TASKS[task].corpora.items():
                options[f"prepare_data.{option}"] = str(roots[name])
            if fold is not None:
                options["prepare_data.test_fold"] = fold
            if task == "sd":
                _link_dscore(Path(dscore).resolve(), directory)
            # s3prl evaluates the values as Python expressions.
            words = [w for k, v in options.items() for w in (f"--{k}", repr(v))]
            command = [str(list_dir), TASKS[task].problem, *words, *task_args]
            _run_s3prl(command, directory / "superb.log")
            scores_of(task, directory)


def _keep_whole_checkpoints(train_dir: Path) -> None:
    """Remove a checkpoint that s3prl was killed in; it writes config.yaml last."""
    for checkpoint in train_dir.glob("step_*"):
        if not (checkpoint / "config.yaml").exists():
            logging.warning(f"{checkpoint} is incomplete, removed")
            shutil.rmtree(checkpoint)


def _link_dscore(dscore: Path, directory: Path) -> None:
    """Put dscore where s3prl would clone it."""
    link = directory / "evaluate" / "valid_best" / "test" / "score" / "dscore"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(dscore)


def _run_s3prl(arguments: Sequence[str], log: Path) -> None:
    problem = arguments[1]
    logging.info(f"{problem}: running, log in {log}")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "dldkit.sfm.superb.s3prl_main", *arguments]
    with open(log, "a", encoding="utf-8") as file:
        print(f"# {shlex.join(command)}", file=file, flush=True)
        status = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment
        ).returncode
    if status != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
        raise UserError(
            f"{problem} failed (exit status {status}): {(named or lines)[-1].strip()}; "
            f"see {log}; run again to go on"
        )
