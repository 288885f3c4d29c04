"""A recipe on a live Slurm: its jobs as workers, and a training that is requeued."""

import re
import subprocess
import time

import pytest
import torch
from running import copy_of_the_recipes, shell

EPOCHS = 12
TWO_TASKS = ["--launch_args", "srun --ntasks 2"]


def slurm_answers():
    """Say whether there is a Slurm with a node that works."""
    try:
        nodes = subprocess.run(
            ["sinfo", "-h", "-o", "%T"], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return bool(re.search("idle|mixed|allocated", nodes.stdout))


pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        not slurm_answers(),
        reason="no Slurm answers here: as root, tools/slurm.sh start sets one up",
    ),
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """mini_an4 after stage 6, its data formatted by jobs of Slurm."""
    recipes = copy_of_the_recipes(tmp_path_factory.mktemp("on slurm"))
    recipe = recipes / "mini_an4" / "asr1"
    on_slurm = ["--parallel_config", recipes.parent / "conf" / "slurm.yaml"]
    words = ["--system", "anytime", "--reference_args", "--max_epoch 1", *on_slurm]
    printed = shell("./run.sh", "--stop_stage", 6, *words, cwd=recipe)
    assert printed.count("workers are jobs of slurm") == 3  # one for each set
    return recipe, words


def test_workers_are_jobs_of_slurm(recipe):
    """Those of stage 3 (see above), decoding and posteriors; training in two tasks."""
    recipe, words = recipe
    words = ["--stage", 7, "--stop_stage", 9, "--kd_source", "cached", *words]
    printed = shell("./run.sh", *words, *TWO_TASKS, cwd=recipe)

    assert printed.count("workers are jobs of slurm") == 2
    for name, size in (("train_nodev", 4), ("train_dev", 2), ("test", 2)):
        text = recipe / "dump" / "raw" / name / "wav.scp"
        assert len(text.read_text().splitlines()) == size
    (exp,) = recipe.glob("exp/asr_early_exit_*")
    for name in ("train_dev", "test"):
        text = exp / "decode_valid.loss_ctc.ave" / "depth4" / name / "text"
        assert len(text.read_text().splitlines()) == 2
    scp = (exp / "posteriors" / "posteriors.scp").read_text()
    assert len(scp.splitlines()) == 6
    logs = [path.read_text() for path in recipe.glob("exp/slurm/*.err")]
    assert sum("Starting Worker" in log or "Start worker" in log for log in logs) >= 5


def test_a_training_of_two_tasks_that_is_requeued_ends_like_an_unbroken_one(recipe):
    recipe, _ = recipe
    words = ["--stage", 10, "--stop_stage", 11, "--system", "rd", *TWO_TASKS]
    words += ["--asr_args", f"--max_epoch {EPOCHS}"]

    command = " ".join(f"'{word}'" for word in ["./run.sh", *words, "--asr_tag", "a"])
    options = ["--requeue", "--ntasks", 2, "--open-mode", "append", "--output", "a.log"]
    job = shell("sbatch", "--parsable", *options, "--wrap", command, cwd=recipe).strip()
    broken = recipe / "exp" / "asr_a"
    wait_for(lambda: " 3epoch results" in read(broken / "train.log"))
    shell("scontrol", "requeue", job, cwd=recipe)
    wait_for(lambda: "JobState=COMPLETED" in show(job) or "FAILED" in show(job))
    assert "JobState=COMPLETED" in show(job), read(recipe / "a.log")
    assert " Restarts=1 " in show(job)

    log = read(broken / "train.log")
    assert ".lock is left over from process" in log
    assert "The training was resumed using " in log
    for epoch in range(1, EPOCHS + 1):
        times = log.count(f" {epoch}epoch results")
        assert times == 1 or (epoch >= 3 and times == 2)  # the one that was broken off

    shell("./run.sh", *words, "--asr_tag", "b", cwd=recipe)
    unbroken = recipe / "exp" / "asr_b"
    states = [torch.load(exp / f"{EPOCHS}epoch.pth") for exp in (broken, unbroken)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name

    # neither task waits for the other one if there is nothing to do
    assert "is finished already, kept" in shell(unbroken / "run.sh", cwd=recipe)


def test_a_task_that_fails_says_why(recipe):
    recipe, _ = recipe
    words = ["--stage", 11, "--stop_stage", 11, "--system", "rd", "--asr_tag", "bad"]
    words += [*TWO_TASKS, "--asr_args", "--optim sdg"]
    printed = shell("./run.sh", *words, cwd=recipe, status=1)
    assert "invalid choice: 'sdg'" in printed.splitlines()[-1]


def read(path):
    return path.read_text() if path.exists() else ""


def show(job):
    return subprocess.run(
        ["scontrol", "show", "job", job], capture_output=True, text=True
    ).stdout


def wait_for(condition):
    until = time.monotonic() + 1200
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.2)
