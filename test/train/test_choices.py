import io
import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import torch
import yaml
from espnet2.train.trainer import Trainer

from dldkit.bin.asr_train import main
from dldkit.errors import UserError
from dldkit.tasks.asr import DLDASRTask
from dldkit.tasks.sfm import SFMDistillTask
from dldkit.train.stacking import StackingTrainer
from dldkit.train.trainer import ResumableTrainer

sys.path.insert(0, str(Path(__file__).parent))
import training_process  # noqa: E402

TRAINERS = dict(default=Trainer, resumable=ResumableTrainer, stacking=StackingTrainer)


def config_of(task, monkeypatch, *argv):
    """Return what `--print_config` prints."""
    monkeypatch.setattr(sys, "argv", ["train", "--print_config", *argv])
    output = io.StringIO()
    task.print_config(output)
    return yaml.safe_load(output.getvalue())


@pytest.mark.parametrize("name", [None, *TRAINERS])
def test_a_config_names_the_trainer(corpus, tmp_path, name):
    changes = {"trainer": name} if name else {}
    main(corpus.training(tmp_path / "exp", dry_run=True, **changes))
    assert DLDASRTask.trainer is TRAINERS[name or "resumable"]
    stored = yaml.safe_load((tmp_path / "exp" / "config.yaml").read_text())
    assert stored["trainer"] == (name or "resumable")


def test_the_default_is_espnets_own(corpus, tmp_path):
    """ESPnet's Trainer itself, which leaves nothing of ours in a checkpoint."""
    assert Trainer.__module__ == "espnet2.train.trainer"
    directory = tmp_path / "exp"
    main(corpus.training(directory, trainer="default", max_epoch=1))
    assert DLDASRTask.trainer is Trainer
    states = torch.load(directory / "checkpoint.pth", weights_only=True)
    assert "stacking" not in states["optimizers"][0]["param_groups"][0]
    assert "stage" not in states["reporter"]["stats"][1]["valid"]


@pytest.mark.parametrize("task", [DLDASRTask, SFMDistillTask])
def test_print_config_shows_all_options(task, monkeypatch):
    config = config_of(task, monkeypatch, "--trainer", "stacking")
    assert config["trainer"] == "stacking"
    assert config["trainer_conf"] == dict(
        method="interleave",
        depths=[3, 6, 9, 12],
        schedule="equal",
        alpha=1.0,
        fractions=None,
        optimizer_state="copy",
        random_depth="always",
        total_steps=None,
    )
    for name in ("default", "resumable"):
        config = config_of(task, monkeypatch, "--trainer", name)
        assert config["trainer_conf"] == {}
    assert config_of(task, monkeypatch)["trainer"] == "resumable"


def test_what_print_config_shows_can_be_given(corpus, tmp_path, monkeypatch):
    shown = config_of(DLDASRTask, monkeypatch, "--trainer", "stacking")["trainer_conf"]
    shown.update(depths=[2, 4], method="stack")
    directory = tmp_path / "exp"
    command = corpus.training(
        directory,
        encoder="ld_conformer",
        encoder_conf=dict(depth_sampler="full"),
        trainer="stacking",
        trainer_conf=shown,
        max_epoch=1,
    )
    main(command)
    stats = torch.load(directory / "checkpoint.pth", weights_only=True)["reporter"]
    assert stats["stats"][1]["valid"]["depth"] == 4


@pytest.mark.parametrize("name", ["default", "resumable"])
def test_refuses_trainer_conf_that_nobody_reads(corpus, tmp_path, capsys, name):
    command = corpus.training(
        tmp_path / "exp", trainer=name, trainer_conf=dict(depths=[1, 4])
    )
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: trainer: {name} takes no trainer_conf")
    assert "trainer: stacking" in last


def test_refuses_an_unknown_trainer(capsys):
    with pytest.raises(SystemExit):
        DLDASRTask.get_parser().parse_args(["--trainer", "growing"])
    assert "invalid choice: 'growing'" in capsys.readouterr().err


@pytest.mark.integration
def test_an_error_of_a_spawned_process_is_one_line(
    corpus, tmp_path, monkeypatch, capfd
):
    paths = [str(Path(training_process.__file__).parent), *sys.path]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    command = [*corpus.training(tmp_path / "exp"), "--ngpu", "2"]
    command += ["--multiprocessing_distributed", "true"]
    with pytest.raises(UserError, match="one of its processes"):
        training_process.RefusingTask.main(cmd=command)
    err = capfd.readouterr().err
    assert "error: the data do not fit: mend them\n" in err
    assert "Traceback" not in err


@pytest.mark.integration
@pytest.mark.parametrize("name", ["default", "stacking"])
def test_children_of_multi_gpu_training_use_it(corpus, tmp_path, monkeypatch, name):
    """Spawned as ESPnet's launcher does, two processes that know nothing but `args`."""
    changes = {}
    if name == "stacking":
        changes = dict(trainer_conf=dict(depths=[2, 4]), unused_parameters=True)
    command = corpus.training(
        tmp_path / "exp",
        encoder="ld_conformer",
        encoder_conf=dict(depth_sampler="full"),
        trainer=name,
        max_epoch=1,
        dist_backend="gloo",
        dist_world_size=2,
        dist_init_method=f"file://{tmp_path}/meeting",
        **changes,
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    paths = [str(Path(training_process.__file__).parent), *sys.path]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    context = multiprocessing.get_context("spawn")
    children = []
    for rank in (0, 1):
        args = DLDASRTask.get_parser().parse_args(command)
        args.version, args.distributed, args.dist_rank = "", True, rank
        record = str(tmp_path / f"{rank}.txt")
        child = context.Process(target=training_process.work, args=(args, record))
        child.start()
        children.append(child)
    for child in children:
        child.join(300)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    assert codes == [0, 0]
    trainer = TRAINERS[name]
    for rank in (0, 1):
        found = (tmp_path / f"{rank}.txt").read_text()
        assert found == f"{trainer.__module__}.{trainer.__name__}"
    stats = torch.load(tmp_path / "exp" / "checkpoint.pth", weights_only=True)
    assert stats["reporter"]["stats"][1]["valid"].get("stage") == (
        2.0 if name == "stacking" else None
    )
