import io
import multiprocessing
import multiprocessing.forkserver
import os
import random
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from espnet2.train.distributed_utils import DistributedOption
from torch.optim.optimizer import register_optimizer_step_post_hook

from dldkit.asr.collection import collect_posteriors
from dldkit.bin.asr_train import main
from dldkit.errors import UserError
from dldkit.train.trainer import ResumableTrainer

sys.path.insert(0, str(Path(__file__).parent))
import training_process  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def processes():
    """Starts processes that have ESPnet imported already, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        patch.setenv("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["dldkit.bin.asr_train"])
        multiprocessing.forkserver.ensure_running()

    def start(*args) -> multiprocessing.Process:
        process = context.Process(target=training_process.train, args=args)
        process.start()
        return process

    return start


def load(file):
    return torch.load(file, weights_only=True)


def same(a, b) -> bool:
    """Compare nested states, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def measured(checkpoint) -> dict[str, float]:
    """What the epochs measured, apart from the clock."""
    return {
        f"{epoch} {phase} {name}": value
        for epoch, phases in checkpoint["reporter"]["stats"].items()
        for phase, values in phases.items()
        for name, value in values.items()
        if isinstance(value, float) and "time" not in name and value == value
    }


@pytest.mark.integration
def test_killed_at_any_moment_a_run_ends_like_an_unbroken_one(
    student, dld_training, processes, python, tmp_path
):
    """One run, killed again and again, always resumed by the same command."""
    command = dld_training(tmp_path / "exp")
    rng = random.Random(7)
    moments = [
        f"step {rng.randint(1, 3)}",  # of three steps in each epoch
        "write checkpoint.pth",
        "before 1epoch.pth",
        "link latest.pth",
        f"step {rng.randint(1, 3)}",  # of the second epoch: the first one counts
        "write 2epoch.pth",
        "before 3epoch.pth",
        "write valid.loss_ctc.ave_2best.pth",
    ]
    for moment in moments:
        process = processes(command, moment)
        process.join(300)
        assert process.exitcode == -signal.SIGKILL, moment
    resumed = python("-m", "dldkit.bin.asr_train", *command)
    assert "The training was resumed" in resumed.stderr

    for name in ("2epoch.pth", "3epoch.pth", "valid.loss_ctc.ave.pth"):
        assert same(load(tmp_path / "exp" / name), load(student / name)), (
            name,
            moments,
        )
    broken, unbroken = (load(d / "checkpoint.pth") for d in (tmp_path / "exp", student))
    for part in ("model", "optimizers", "schedulers"):
        assert same(broken[part], unbroken[part]), part
    assert measured(broken) == measured(unbroken)
    assert "3 valid loss_kd" in measured(broken)
    assert {f.name for f in (tmp_path / "exp").iterdir() if "part" not in f.name} == {
        f.name for f in student.iterdir()
    }


@contextmanager
def spoiled_steps():
    """Let each optimiser step end far from where it should."""

    def spoil(optimizer, *_):
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.data.add_(1.0)

    handle = register_optimizer_step_post_hook(spoil)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.integration
def test_a_kill_between_two_epochs_never_loses_the_best_model(
    corpus, processes, tmp_path
):
    """Killed before each single file operation; what follows is made much worse.

    On a GPU a repeated epoch may come out worse, and ESPnet has removed the models that
    it had displaced.
    """
    changes = dict(encoder="ld_conformer", keep_nbest_models=1, max_epoch=3)
    for operation in range(1, 100):
        exp = tmp_path / str(operation) / "exp"
        command = corpus.training(exp, **changes)
        process = processes(command, f"operation {operation}")
        process.join(300)
        if process.exitcode == 0:  # the third epoch is over
            break
        assert process.exitcode == -signal.SIGKILL
        with spoiled_steps():
            main(command)

        losses = {
            epoch: stats["valid"]["loss_ctc"]
            for epoch, stats in load(exp / "checkpoint.pth")["reporter"][
                "stats"
            ].items()
        }
        assert list(losses) == [1, 2, 3]
        assert min(losses, key=losses.get) != 3  # it is worse, or nothing was tested
        for link in exp.glob("*.pth"):
            assert link.exists(), f"{link} dangles after a kill at {operation}"
        best = exp / f"{min(losses, key=losses.get)}epoch.pth"
        states = load(best)
        for name in ("valid.loss_ctc.best.pth", "valid.loss_ctc.ave.pth"):
            assert same(dict(load(exp / name)), dict(states)), (name, operation)
        assert (exp / "latest.pth").resolve().name == "3epoch.pth"
        assert not list(exp.glob("*.pending"))
        shutil.rmtree(exp.parent)
    assert 8 < operation < 99


@pytest.fixture(params=["bernoulli", "anytime", "self"])
def recipe_of(request, dld_training, corpus, bpe, build, tmp_path):
    """Return a function that gives the arguments of a training of several depths.

    `anytime` has exits, BPE units, an attention decoder, cached posteriors and a
    learning rate that ends at zero, `self` has forwards of random layers beside that of
    the full depth.
    """
    changes = dict(max_epoch=2)
    if request.param == "anytime":
        model = dict(
            **bpe,
            decoder="transformer",
            decoder_conf=dict(attention_heads=2, linear_units=16, num_blocks=1),
            model_conf=dict(ctc_weight=0.3),
        )
        build(directory=tmp_path / "reference", **model)
        cache = tmp_path / "cache"
        collect_posteriors(tmp_path / "reference", [corpus.train, corpus.dev], cache)
        model["model_conf"] = dict(ctc_weight=0.3, reference=str(cache))
        nested = dict(depth_sampler="uniform", layer_choice="prefix", exits=1)
        changes |= dict(**model, encoder_conf=nested)
        changes |= dict(
            scheduler="transformers", scheduler_conf=dict(warmup_steps=None)
        )
    if request.param == "self":
        random_layers = dict(depth_sampler="uniform", layer_choice="random")
        sandwich = dict(reference="self", sandwich=2)
        changes |= dict(encoder_conf=random_layers, model_conf=sandwich)
    return lambda directory, **others: dld_training(directory, **changes, **others)


@pytest.mark.integration
def test_layers_are_drawn_alike_on_all_ranks(recipe_of, processes, tmp_path):
    """Two gloo processes train on batches of two and of one utterance."""
    command = recipe_of(
        tmp_path / "exp",
        dist_backend="gloo",
        dist_world_size=2,
        dist_init_method=f"file://{tmp_path}/meeting",
        unused_parameters=True,
    )
    ranks = [
        processes([*command, "--dist_rank", str(rank)], "", f"{tmp_path}/{rank}.pth")
        for rank in (0, 1)
    ]
    for process in ranks:
        process.join(300)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes == [0, 0]
    first, second = (load(tmp_path / f"{rank}.pth") for rank in (0, 1))
    assert len(first) == 6
    assert len({layers for layers, _ in first}) > 2
    for (layers, gradient), (others, other_gradient) in zip(first, second, strict=True):
        assert layers == others
        assert torch.equal(gradient, other_gradient)
        assert gradient.abs().max() > 0
    weights = [load(tmp_path / f"{rank}.pth.weights") for rank in (0, 1)]
    assert weights[0] and same(*weights)
    assert (tmp_path / "exp" / "valid.loss_ctc.ave.pth").is_file()


@pytest.mark.integration
@pytest.mark.parametrize("recipe_of", ["anytime", "self"], indirect=True)
def test_a_killed_run_of_several_depths_ends_like_an_unbroken_one(
    recipe_of, processes, tmp_path, request
):
    """Killed in the first epoch, and in the second one."""
    for name, moments in (("broken", ["step 2", "step 5"]), ("unbroken", [])):
        for moment in [*moments, ""]:
            process = processes(recipe_of(tmp_path / name), moment)
            process.join(120)
            assert process.exitcode == (-signal.SIGKILL if moment else 0)
    broken, unbroken = (
        load(tmp_path / name / "checkpoint.pth") for name in ("broken", "unbroken")
    )
    for part in ("model", "optimizers", "schedulers"):
        assert same(broken[part], unbroken[part]), part
    assert measured(broken) == measured(unbroken)
    assert {"1 train loss_kd", "2 train depth"} <= set(measured(broken))
    if "anytime" in request.node.name:
        assert broken["optimizers"][0]["param_groups"][0]["lr"] == 0
        assert measured(broken)["1 train optim0_lr0"] > 0


def options(directory, **changes):
    return SimpleNamespace(output_dir=directory, unused_parameters=False, **changes)


@pytest.mark.parametrize("sampler", ["bernoulli", "uniform"])
def test_distributed_dropping_needs_unused_parameters(build, tmp_path, sampler):
    model = build(encoder="ld_conformer", encoder_conf=dict(depth_sampler=sampler))
    with pytest.raises(UserError, match="unused_parameters: true"):
        ResumableTrainer.run(
            model,
            [],
            [],
            None,
            trainer_options=options(tmp_path),
            distributed_option=DistributedOption(distributed=True, dist_rank=0),
        )


def test_a_finished_run_can_be_started_again(student, dld_training, tmp_path):
    shutil.copytree(student, tmp_path / "exp", symlinks=True)
    before = {f.name: f.read_bytes() for f in (tmp_path / "exp").glob("*.pth")}
    save = torch.save
    main(dld_training(tmp_path / "exp"))
    assert torch.save is save
    after = {f.name: f.read_bytes() for f in (tmp_path / "exp").glob("*.pth")}
    assert after.keys() == before.keys()
    assert after["checkpoint.pth"] == before["checkpoint.pth"]
    states = load(tmp_path / "exp" / "valid.loss_ctc.ave.pth")
    assert same(states, load(student / "valid.loss_ctc.ave.pth"))


def test_a_full_disk_leaves_the_files_of_the_epoch_before(
    student, dld_training, tmp_path, monkeypatch
):
    """Resume for a fourth epoch whose checkpoint can not be written."""
    directory = tmp_path / "exp"
    shutil.copytree(student, directory, symlinks=True)
    before = {f.name: f.read_bytes() for f in directory.glob("*.pth")}

    def full(states, path, *args, **kwargs):
        Path(path).write_bytes(b"all that would fit")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        main(dld_training(directory, max_epoch=4))
    assert torch.save is full
    assert {f.name: f.read_bytes() for f in directory.glob("*.pth")} == before
    monkeypatch.undo()
    main(dld_training(directory, max_epoch=4))
    assert (directory / "4epoch.pth").is_file()
    epochs = load(directory / "checkpoint.pth")["reporter"]["epoch"]
    assert epochs == 4


def test_saving_to_a_buffer_works_while_training(corpus, tmp_path, monkeypatch):
    saved = []

    def train_one_epoch(*args, **kwargs):
        buffer = io.BytesIO()
        torch.save({"a": torch.ones(2)}, buffer)
        buffer.seek(0)
        saved.append(load(buffer)["a"])
        return original(*args, **kwargs)

    original = ResumableTrainer.train_one_epoch
    monkeypatch.setattr(ResumableTrainer, "train_one_epoch", train_one_epoch)
    main(corpus.training(tmp_path / "exp", max_epoch=1))
    assert torch.equal(saved[0], torch.ones(2))
