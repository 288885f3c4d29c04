import copy
import logging
import math
import multiprocessing
import multiprocessing.forkserver
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Optional

import espnet2.train.trainer
import pytest
import torch
from espnet2.train.distributed_utils import DistributedOption
from espnet2.train.reporter import Reporter

from dldkit.bin.asr_train import main
from dldkit.depth.layers import GatedModuleList
from dldkit.depth.sampler import DepthSampler
from dldkit.errors import UserError
from dldkit.train.stacking import FullDepthReporter, Stacking, StackingTrainer

sys.path.insert(0, str(Path(__file__).parent))
import training_process  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]

# Five epochs of three steps: depth 1 for five steps, which end within the second epoch,
# depth 2 until the end of the third epoch, which is so validated at depth 4.
GROWTH = dict(
    method="stack",
    depths=[1, 2, 4],
    schedule="fractions",
    fractions=[5 / 15, 4 / 15, 6 / 15],
)
BOUNDARIES = [5, 9]
# The first epoch is the best one of `step`, which the trainer must not fall for.
CRITERIA = [["valid", "step", "min"], ["valid", "loss_ctc", "min"]]


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


@pytest.fixture(scope="module")
def growing(dld_training):
    """Return a function that gives the arguments of a growing student's training."""

    def arguments(directory, trainer_conf=None, **changes):
        return dld_training(
            directory,
            trainer="stacking",
            trainer_conf={**GROWTH, **(trainer_conf or {})},
            **{
                "encoder_conf": dict(depth_sampler="uniform"),
                "best_model_criterion": CRITERIA,
                "nbest_averaging_interval": 1,
                "max_epoch": 5,
                **changes,
            },
        )

    return arguments


@pytest.fixture(scope="module")
def growing_ctc(corpus):
    """Return a function that gives the arguments for a growing plain CTC model."""

    def arguments(directory, trainer_conf=None, **changes):
        return corpus.training(
            directory,
            trainer="stacking",
            trainer_conf={**GROWTH, **(trainer_conf or {})},
            **{
                "encoder": "ld_conformer",
                "encoder_conf": dict(depth_sampler="full"),
                "best_model_criterion": CRITERIA,
                "max_epoch": 5,
                **changes,
            },
        )

    return arguments


@pytest.fixture(scope="module")
def grown(growing, processes, tmp_path_factory):
    """The experiment directory of a student that grew without a break."""
    directory = tmp_path_factory.mktemp("grown") / "exp"
    process = processes(growing(directory), "", str(directory.with_name("steps.pth")))
    process.join(300)
    assert process.exitcode == 0
    return directory


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


def epochs_of(directory, phase="valid"):
    """Return what was measured in each epoch, apart from the clock."""
    stats = load(directory / "checkpoint.pth")["reporter"]["stats"]
    return {
        epoch: {
            name: value
            for name, value in phases[phase].items()
            if isinstance(value, float) and "time" not in name and value == value
        }
        for epoch, phases in stats.items()
    }


def refusal(command, capsys) -> str:
    """Return the one line with which training ends."""
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    return last


class Tower(torch.nn.Module):
    """As many layers as slots, and a weight whose gradient is always 1."""

    def __init__(self, slots: int, sampler: Optional[DepthSampler] = None):
        super().__init__()
        layers = (torch.nn.Linear(2, 2) for _ in range(slots))
        self.layers = GatedModuleList(layers, sampler)
        self.meter = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        loss = x.square().mean() + self.meter
        return loss, {"loss": loss.detach()}, torch.tensor(len(x))


class TestBoundaries:
    @pytest.mark.parametrize(
        "depths, options, expected",
        [
            (
                [1, 2, 3, 4],
                dict(method="gradstack"),
                [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3,
            ),
            ([3, 6, 12], dict(), [3] * 4 + [6] * 4 + [12] * 4),
            ([2, 4], dict(schedule="prop"), [2] * 4 + [4] * 8),
            ([1, 2, 3], dict(schedule="prop", alpha=2.0), [1] + [2] * 3 + [3] * 8),
            (
                [1, 2, 4],
                dict(schedule="fractions", fractions=[0.5, 0.25, 0.25]),
                [1] * 6 + [2] * 3 + [4] * 3,
            ),
            ([3], dict(), [3] * 12),
        ],
    )
    def test_of_a_schedule(self, depths, options, expected):
        """The stats of each forward pass, and the layers that really run."""
        model = Tower(depths[-1])
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        calls = []
        for layer in model.layers.children():
            layer.register_forward_hook(lambda *_: calls.append(1))
        found, stages = [], []
        stacking = Stacking(depths=depths, **options)
        with stacking.attached(model, optimizer, 4, 3):
            for step in range(12):
                calls.clear()
                loss, stats, _ = model(torch.ones(1, 2))
                assert stats["step"] == step
                assert stats["depth"] == len(calls)
                found.append(len(calls))
                stages.append(int(stats["stage"]))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        assert found == expected
        assert stages == [1 + depths.index(depth) for depth in expected]

    @pytest.mark.parametrize("random_depth", ["always", "last_stage"])
    def test_random_depth_may_wait_for_the_last_stage(self, random_depth):
        """A stage that draws none runs all of its layers, a sandwich included."""
        model = Tower(4, DepthSampler("uniform", layer_choice="prefix"))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        drawn: dict[int, set[int]] = {2: set(), 4: set()}
        stacking = Stacking(depths=[2, 4], method="stack", random_depth=random_depth)
        with stacking.attached(model, optimizer, 80, 1):
            begun = copy.deepcopy(optimizer.state_dict())
            for _ in range(80):
                depth = stacking.place["depth"]
                drawn[depth].add(len(model.layers.active))
                sandwich = model.layers.sandwich_of_step(1)
                waits = random_depth == "last_stage" and depth == 2
                assert (sandwich == [(0, 1)]) == waits
                model.eval()
                assert len(model.layers.active) == depth
                model.train()
                optimizer.step()
            optimizer.load_state_dict(begun)
            assert model.layers.draws == (random_depth == "always")
        first = {2} if random_depth == "last_stage" else {1, 2}
        assert drawn == {2: first, 4: {1, 2, 3, 4}}

    @pytest.mark.parametrize("fused", [False, True])
    def test_a_gradient_that_amp_refuses_changes_nothing(self, fused):
        """The step is left out, and counts where the optimiser itself leaves it out."""
        model = Tower(2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu")
        depths, changed = [], []
        with Stacking(depths=[1, 2], method="stack").attached(model, optimizer, 6, 1):
            for step in range(6):
                before = copy.deepcopy(model.state_dict())
                with torch.autocast("cpu", torch.bfloat16):
                    loss, stats, _ = model(torch.ones(1, 2))
                depths.append(int(stats["depth"]))
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                if step == 1:
                    model.meter.grad.fill_(math.inf)
                scaler.step(optimizer)
                scaler.update()
                states = model.state_dict()
                changed.append(any(not states[k].equal(v) for k, v in before.items()))
        assert depths == ([1] * 3 + [2] * 3 if fused else [1] * 4 + [2] * 2)
        assert changed == [True, False] + [True] * 4
        assert all(value.isfinite().all() for value in model.state_dict().values())

    def test_total_steps_takes_the_place_of_the_epochs(self):
        model = Tower(2)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        stacking = Stacking(depths=[1, 2], total_steps=6)
        for steps_per_epoch in (None, 100):
            found = []
            with stacking.attached(model, optimizer, steps_per_epoch, 2):
                for _ in range(6):
                    found.append(model.layers.active)
                    optimizer.step()
            assert found == [(0,)] * 3 + [(0, 1)] * 3

    def test_nothing_is_left_behind(self):
        """Hooks are removed, and all layers run, whatever happens."""
        model = Tower(4)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        with pytest.raises(ZeroDivisionError):
            with Stacking(depths=[1, 4]).attached(model, optimizer, 10, 1):
                assert model.layers.active == (0,)
                1 / 0
        assert model.layers.active == (0, 1, 2, 3)
        assert model(torch.ones(1, 2))[1].keys() == {"loss"}
        for _ in range(12):
            optimizer.step()
        assert model.layers.active == (0, 1, 2, 3)

    @pytest.mark.integration
    def test_with_accumulated_gradients(self, growing_ctc, processes, tmp_path):
        """Four batches make two optimiser steps an epoch; eight in all."""
        command = growing_ctc(
            tmp_path / "exp",
            dict(schedule="equal", fractions=None),  # after 8/3 and 16/3 steps
            batch_size=2,
            accum_grad=2,
            max_epoch=4,
        )
        process = processes(command, "", f"{tmp_path}/steps.pth")
        process.join(300)
        assert process.exitcode == 0
        depths = [len(layers) for layers, _ in load(tmp_path / "steps.pth")]
        assert depths == [1, 1, 1, 2, 2, 4, 4, 4]
        valid = epochs_of(tmp_path / "exp")
        assert [v["step"] for v in valid.values()] == [2, 4, 6, 8]
        assert [v["depth"] for v in valid.values()] == [1, 2, 4, 4]

    @pytest.mark.integration
    def test_within_epochs_of_a_given_number_of_batches(self, growing_ctc, tmp_path):
        command = growing_ctc(
            tmp_path / "exp",
            dict(schedule="prop", fractions=None),  # 12 steps: after 2 and 6
            num_iters_per_epoch=4,
            max_epoch=3,
        )
        main(command)
        valid = epochs_of(tmp_path / "exp")
        assert [v["step"] for v in valid.values()] == [4, 8, 12]
        assert [v["depth"] for v in valid.values()] == [2, 4, 4]
        train = epochs_of(tmp_path / "exp", "train")
        assert [v["depth"] for v in train.values()] == [1.5, 3, 4]


class TestRefusals:
    @pytest.mark.parametrize(
        "options, message",
        [
            (dict(optimizer_state="keep"), "'keep': choose copy or zero"),
            (dict(method="zip"), "unknown method 'zip'"),
            (dict(random_depth="never"), "'never': choose always or last_stage"),
            (dict(depths=[3, 5]), "6 or 9 would fit"),
            (dict(schedule="late"), "unknown schedule 'late'"),
            (dict(schedule="fractions", fractions=[1.0]), "4 numbers above 0"),
            (dict(schedule="fractions", fractions=["a", 0.5]), "fractions: .* is no"),
            (dict(total_steps="1e5"), "total_steps: '1e5' is no .*int"),
        ],
    )
    def test_of_options(self, options, message):
        with pytest.raises(UserError, match=message):
            Stacking(**options)

    def test_of_a_model_without_gates(self):
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters())
        with pytest.raises(UserError, match="ld_conformer, .* sfm_distill_train"):
            Stacking().attached(model, optimizer, 100, 1).__enter__()

    def test_of_another_depth(self):
        model = Tower(4)
        optimizer = torch.optim.SGD(model.parameters())
        stacking = Stacking(depths=[1, 3])
        with pytest.raises(UserError, match=r"\[1, 3\] end at 3 .* the model has 4"):
            stacking.attached(model, optimizer, 100, 1).__enter__()

    def test_of_random_depth_where_none_is_drawn(self):
        model = Tower(4)
        optimizer = torch.optim.SGD(model.parameters())
        stacking = Stacking(depths=[1, 4], random_depth="last_stage")
        with pytest.raises(UserError, match="last_stage.*set depth_sampler to another"):
            stacking.attached(model, optimizer, 100, 1).__enter__()

    def test_of_too_few_steps(self):
        model = Tower(12)
        optimizer = torch.optim.SGD(model.parameters())
        with pytest.raises(UserError, match="3 optimiser steps are too few"):
            Stacking().attached(model, optimizer, 3, 1).__enter__()

    @pytest.mark.parametrize(
        "changes, message",
        [
            (dict(trainer_conf=dict(speed=2)), "trainer_conf: .*'speed'"),
            (dict(encoder="conformer", encoder_conf={}), "needs an encoder whose"),
            (dict(trainer_conf=dict(depths=[1, 2, 3])), "end at 3 .* has 4"),
            (
                dict(iterator_type="chunk", chunk_length=50),
                "set its trainer_conf total_st",
            ),
        ],
    )
    def test_in_training(self, growing_ctc, tmp_path, capsys, changes, message):
        command = growing_ctc(tmp_path / "exp", **changes)
        assert re.search(message, refusal(command, capsys))
        assert espnet2.train.trainer.Reporter is Reporter

    def test_of_distributed_training_without_unused_parameters(self, build, tmp_path):
        model = build(encoder="ld_conformer", encoder_conf=dict(depth_sampler="full"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(UserError, match="unused_parameters: true"):
            StackingTrainer.run(
                model,
                [optimizer],
                [None],
                SimpleNamespace(build_iter=lambda epoch, shuffle: range(100)),
                trainer_options=SimpleNamespace(
                    output_dir=tmp_path,
                    unused_parameters=False,
                    trainer_conf=GROWTH,
                    accum_grad=1,
                    max_epoch=1,
                ),
                distributed_option=DistributedOption(distributed=True, dist_rank=0),
            )


class TestGrownStudent:
    """A DLD student, whose steps run some of the layers of their stage."""

    def test_grew_at_the_boundaries(self, grown):
        steps = [layers for layers, _ in load(grown.with_name("steps.pth"))]
        assert len(steps) == 15
        ends = [0, *BOUNDARIES, 15]
        for begin, end, depth in zip(ends, ends[1:], (1, 2, 4)):
            deepest = max(max(layers) for layers in steps[begin:end])
            assert deepest == depth - 1, (begin, end)
        assert len({len(layers) for layers in steps[9:]}) > 1

    def test_reports_depth_stage_and_step(self, grown):
        valid = epochs_of(grown).values()
        assert [v["depth"] for v in valid] == [1, 2, 4, 4, 4]
        assert [v["stage"] for v in valid] == [1, 2, 3, 3, 3]
        assert [v["step"] for v in valid] == [3, 6, 9, 12, 15]
        train = epochs_of(grown, "train").values()
        assert [v["step"] for v in train] == [1, 4, 7, 10, 13]
        assert [v["stage"] for v in train] == pytest.approx([1, 4 / 3, 2, 3, 3])

    def test_shallow_epochs_are_never_the_best(self, grown):
        """The third epoch has the least `step` of those validated at depth 4."""
        names = {f.name for f in grown.glob("*.pth")}
        best = (grown / "valid.step.best.pth").resolve()
        assert best.name == "3epoch.pth"
        losses = {e: v["loss_ctc"] for e, v in epochs_of(grown).items()}
        ranked = sorted((3, 4, 5), key=losses.get)
        best = (grown / "valid.loss_ctc.best.pth").resolve()
        assert best.name == f"{ranked[0]}epoch.pth"
        assert {n for n in names if n[0].isdigit()} == {
            f"{e}epoch.pth" for e in (3, 4, 5, ranked[0], ranked[1])
        }
        tills = {int(n.split("till")[1][0]) for n in names if "till" in n}
        assert tills == {3, 4, 5}  # of nbest_averaging_interval

    def test_shallow_epochs_are_not_averaged(self, grown):
        losses = {e: v["loss_ctc"] for e, v in epochs_of(grown).items()}
        ranked = sorted((3, 4, 5), key=losses.get)
        for name, epochs in (("step", (3, 4)), ("loss_ctc", ranked[:2])):
            first, second = (load(grown / f"{epoch}epoch.pth") for epoch in epochs)
            average = load(grown / f"valid.{name}.ave.pth")
            assert list(average) == list(first)
            for key, value in average.items():
                total = first[key].double() + second[key].double()
                if value.dtype != torch.int64:  # ESPnet adds counters
                    total = total / 2
                assert torch.allclose(value.double(), total, atol=1e-6), key

    @pytest.mark.integration
    def test_killed_at_any_moment_it_ends_alike(
        self, grown, growing, processes, python, tmp_path
    ):
        """One run, killed again and again, always resumed by the same command."""
        command = growing(tmp_path / "exp")
        moments = [
            "grow 1",  # in the second epoch, whose first boundary is after step 5
            "grown 1",
            "step 3",  # after it, in the same epoch
            "before 2epoch.pth",
            "grow 2",  # at the end of the third epoch
            "grown 1",
            "write checkpoint.pth",  # of an epoch that grew with its last step
            "step 4",  # the first step at full depth
            "link valid.step.ave.pth",
        ]
        for moment in moments:
            process = processes(command, moment)
            process.join(300)
            assert process.exitcode == -signal.SIGKILL, moment
        resumed = python("-m", "dldkit.bin.asr_train", *command)
        assert "The training was resumed" in resumed.stderr

        broken, unbroken = (
            load(d / "checkpoint.pth") for d in (tmp_path / "exp", grown)
        )
        for part in ("model", "optimizers", "schedulers"):
            assert same(broken[part], unbroken[part]), part
        for phase in ("train", "valid"):
            assert epochs_of(tmp_path / "exp", phase) == epochs_of(grown, phase)
        for name in ("3epoch.pth", "5epoch.pth", "valid.step.ave.pth"):
            assert same(load(tmp_path / "exp" / name), load(grown / name)), name
        files = [
            {f.name for f in d.iterdir() if "part" not in f.name}
            for d in (tmp_path / "exp", grown)
        ]
        assert files[0] == files[1]

    def test_is_not_grown_again(self, grown, growing, tmp_path, caplog):
        directory = tmp_path / "exp"
        shutil.copytree(grown, directory, symlinks=True)
        before = (directory / "checkpoint.pth").read_bytes()
        (directory / ".done").unlink()  # as if it were killed at the very end
        with caplog.at_level(logging.INFO):
            main(growing(directory))
        assert "Stacking (stack): depths [1, 2, 4]" in caplog.text
        assert "stage 2 of 3 begins" not in caplog.text
        assert (directory / "checkpoint.pth").read_bytes() == before
        assert same(
            load(directory / "valid.step.ave.pth"), load(grown / "valid.step.ave.pth")
        )
        with caplog.at_level(logging.INFO):
            main(growing(directory, dict(total_steps=15), max_epoch=6))
        assert " begins: depth" not in caplog.text
        assert epochs_of(directory)[6]["step"] == 18
        assert epochs_of(directory)[6]["depth"] == 4

    @pytest.mark.parametrize(
        "changes",
        [
            dict(depths=[2, 4], fractions=[0.5, 0.5]),
            dict(depths=[1, 4], fractions=[0.5, 0.5]),
            dict(depths=[4], fractions=[1.0]),
        ],
    )
    def test_goes_not_on_with_other_depths(
        self, grown, growing, tmp_path, capsys, changes
    ):
        directory = tmp_path / "exp"
        shutil.copytree(grown, directory, symlinks=True)
        message = refusal(growing(directory, changes, max_epoch=6), capsys)
        assert f"not of a stacking run with depths {changes['depths']}" in message

    def test_goes_not_on_with_another_trainer(
        self, grown, growing, student, dld_training, tmp_path, capsys
    ):
        shutil.copytree(student, tmp_path / "full", symlinks=True)
        message = refusal(growing(tmp_path / "full"), capsys)
        assert "not of a stacking run with depths [1, 2, 4]" in message
        shutil.copytree(grown, tmp_path / "grown", symlinks=True)
        message = refusal(dld_training(tmp_path / "grown", max_epoch=6), capsys)
        assert "trainer: stacking" in message


class TestPlainCTC:
    @pytest.mark.integration
    def test_two_ranks_stay_alike(self, growing_ctc, processes, tmp_path):
        """Two gloo processes train on batches of two and of one utterance."""
        command = growing_ctc(
            tmp_path / "exp",
            dict(optimizer_state="zero", method="interleave"),
            dist_backend="gloo",
            dist_world_size=2,
            dist_init_method=f"file://{tmp_path}/meeting",
            unused_parameters=True,
        )
        ranks = [
            processes(
                [*command, "--dist_rank", str(rank)], "", f"{tmp_path}/{rank}.pth"
            )
            for rank in (0, 1)
        ]
        for process in ranks:
            process.join(300)
        codes = [process.exitcode for process in ranks]
        for process in ranks:
            process.kill()
        assert codes == [0, 0]
        first, second = (load(tmp_path / f"{rank}.pth") for rank in (0, 1))
        depths = [len(layers) for layers, _ in first]
        assert depths == [1] * 5 + [2] * 4 + [4] * 6
        for (layers, gradient), (others, theirs) in zip(first, second, strict=True):
            assert layers == others
            assert torch.equal(gradient, theirs)
        weights = [load(tmp_path / f"{rank}.pth.weights") for rank in (0, 1)]
        assert len(weights[0]) > 50 and same(*weights)
        saved = load(tmp_path / "exp" / "5epoch.pth")
        assert any(torch.equal(weights[1][-1], value) for value in saved.values())

    @pytest.mark.integration
    def test_patience_waits_for_full_depth(self, growing_ctc, tmp_path):
        """`step` only ever gets worse: at full depth, one epoch is waited for."""
        command = growing_ctc(
            tmp_path / "exp",
            dict(total_steps=15),
            patience=1,
            early_stopping_criterion=["valid", "step", "min"],
            max_epoch=9,
        )
        main(command)
        assert list(epochs_of(tmp_path / "exp")) == [1, 2, 3, 4, 5]
        main(command)
        assert list(epochs_of(tmp_path / "exp")) == [1, 2, 3, 4, 5]

    @pytest.mark.integration
    def test_plateaus_are_seen_at_any_depth(self, growing_ctc, tmp_path):
        command = growing_ctc(
            tmp_path / "exp",
            optim="sgd",
            optim_conf=dict(lr=0.01, momentum=0.9),
            scheduler="reducelronplateau",
            scheduler_conf=dict(warmup_steps=None, mode="min", patience=0, factor=0.5),
            val_scheduler_criterion=["valid", "step"],
            max_epoch=4,
            trainer_conf=dict(total_steps=12),
        )
        main(command)
        rates = [e["optim0_lr0"] for e in epochs_of(tmp_path / "exp", "train").values()]
        assert rates == pytest.approx([0.01, 0.01, 0.005, 0.0025])

    @pytest.mark.integration
    def test_a_run_that_ends_shallow_has_no_best_model(self, growing_ctc, tmp_path):
        main(growing_ctc(tmp_path / "exp", dict(total_steps=1000), max_epoch=2))
        names = {f.name for f in (tmp_path / "exp").glob("*.pth")}
        assert names == {"checkpoint.pth", "2epoch.pth", "latest.pth"}


class TestFullDepthReporter:
    @staticmethod
    def reporter(epochs):
        reporter = FullDepthReporter(stages=2)
        for epoch, (stage, loss) in enumerate(epochs, 1):
            reporter.set_epoch(epoch)
            for phase in ("train", "valid"):
                with reporter.observe(phase) as sub:
                    sub.register(dict(loss=loss, stage=stage), weight=1.0)
                    sub.next()
        return reporter

    def test_ranks_epochs_at_full_depth(self):
        reporter = self.reporter([(1, 0.1), (1, 0.2), (2, 3.0), (2, 1.0), (2, 2.0)])
        for phase in ("train", "valid"):
            assert reporter.sort_epochs(phase, "loss", "min") == [4, 5, 3]
            assert reporter.sort_epochs(phase, "loss", "max") == [3, 5, 4]
        assert reporter.get_best_epoch("valid", "loss", "min") == 4
        assert not reporter.has("valid", "loss", 2)
        assert reporter.has("valid", "loss", 3)
        assert not reporter.has("valid", "acc", 3)
        assert reporter.get_value("valid", "loss", 2) == 0.2

    def test_waits_for_full_depth(self):
        stop = ("valid", "loss", "min")
        shallow = self.reporter([(1, 1.0), (1, 2.0), (1, 3.0), (1, 4.0)])
        assert not shallow.check_early_stopping(1, *stop)
        just = self.reporter([(1, 1.0), (1, 2.0), (1, 3.0), (2, 4.0)])
        assert not just.check_early_stopping(0, *stop)
        worse = self.reporter([(1, 1.0), (2, 2.0), (2, 3.0), (2, 4.0)])
        assert not worse.check_early_stopping(2, *stop)
        assert worse.check_early_stopping(1, *stop)

    def test_comes_back_from_a_checkpoint(self):
        reporter = self.reporter([(1, 0.1), (2, 3.0), (2, 1.0)])
        again = FullDepthReporter(stages=2)
        again.load_state_dict(copy.deepcopy(reporter.state_dict()))
        assert again.sort_epochs("valid", "loss", "min") == [3, 2]
