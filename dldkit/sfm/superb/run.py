"""Run SUPERB's tasks with s3prl on a frozen upstream."""

import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Mapping, Optional, Sequence, Union

from dldkit.errors import UserError
from dldkit.sfm.superb.checks import check_tasks, fetch_lists
from dldkit.sfm.superb.results import (
    directory_of,
    finished_of,
    options_of,
    scores_of,
)
from dldkit.sfm.superb.tasks import TASKS
from dldkit.sfm.superb.upstream import cost_of, find_upstream
from dldkit.step import Step


def run(
    tasks: Sequence[str],
    upstream: str,
    output_dir: Union[str, Path],
    corpora: dict[str, Optional[str]],
    list_dir: Union[str, Path],
    task_args: Sequence[str] = (),
    rates: Optional[Mapping[str, Sequence[float]]] = None,
    er_folds: Sequence[int] = range(5),
    device: str = "cpu",
    num_workers: int = 6,
    dscore: Optional[str] = None,
) -> None:
    """Train and test SUPERB's downstream models, each in ``output_dir/TASK[/lrRATE]``.

    A finished task is kept, an interrupted one goes on from its last checkpoint. What
    the upstream costs is in ``output_dir/cost``.

    Args:
        upstream: see `find_upstream`.
        tasks, corpora, dscore: see `check_tasks`.
        list_dir: where splits and lexicons lie, or are downloaded to.
        task_args: options of s3prl for all tasks.
        rates: learning rates to train tasks with; s3prl's own for the others.
        er_folds: of the task ER.
        device: cpu or cuda.
        num_workers: processes that load speech.

    Raises:
        UserError: something is missing, s3prl failed, or a task's directory is from
            another upstream or other `task_args`.
    """
    output_dir, list_dir = Path(output_dir), Path(list_dir).resolve()
    rates = rates or {}
    tasks, roots = check_tasks(tasks, corpora, dscore, rates)
    model = find_upstream(upstream)
    settings = {"upstream": model.identity, "args": list(task_args)}
    for task in TASKS:  # of other rates, too, and those that are in the same row
        wanted = settings if task in tasks else {"upstream": model.identity}
        for directories in finished_of(task, output_dir).values():
            for directory in directories:
                _refuse_others(directory, wanted, options_of(directory))
    steps = []
    for task in tasks:
        if task == "asv":  # no dev set says which one the table is to have
            (rate,) = rates.get(task, [None])
            others = set(finished_of(task, output_dir))
            if others - {directory_of(task, output_dir, rate)}:
                raise UserError(
                    f"{output_dir} has ASV of another learning rate, and ASV has no "
                    "dev set to choose on: remove it, or choose another --output_dir"
                )
        folds = er_folds if TASKS[task].folds else [None]
        for rate, fold in product(rates.get(task, [None]), folds):
            directory = directory_of(task, output_dir, rate)
            if fold is not None:
                directory /= f"fold{fold}"
            own = settings if rate is None else {**settings, "lr": rate}
            step = Step(directory, {}, keep=True, **own)
            begun = step.read(".part") or step.read(".done") or step.description
            _refuse_others(directory, settings, begun["options"])
            steps.append((task, rate, fold, step))
    fetch_lists(tasks, list_dir)
    with Step(output_dir / "cost", {}, upstream=model.identity) as step:
        if not step.done:
            text = json.dumps(cost_of(model))
            (step.directory / "cost.json").write_text(text + "\n")

    for task, rate, fold, step in steps:
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
                "build_upstream.name": model.name,
            }
            if model.directory is not None:
                options["build_upstream.path_or_url"] = str(model.directory)
            for option, name in TASKS[task].corpora.items():
                options[f"prepare_data.{option}"] = str(roots[name])
            if fold is not None:
                options["prepare_data.test_fold"] = fold
            if task == "sd":
                _link_dscore(Path(dscore).resolve(), directory)
            # s3prl evaluates the values as Python expressions.
            words = [w for k, v in options.items() for w in (f"--{k}", repr(v))]
            command = [str(list_dir), TASKS[task].problem, *words, *task_args]
            if rate is not None:
                command += ["--build_optimizer.conf.lr", repr(rate)]
            _run_s3prl(command, directory / "superb.log")
            scores_of(task, directory)


def _refuse_others(directory: Path, settings: dict, begun: dict) -> None:
    if any(begun.get(name) != value for name, value in settings.items()):
        raise UserError(
            f"{directory} is from another upstream or other --task_args: remove it, or "
            "choose another --output_dir"
        )


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
