import io
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from espnet2.train.distributed_utils import DistributedOption
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from dldkit.bin import sfm_teacher_loss
from dldkit.bin.sfm_distill_train import main
from dldkit.data.segments import cut_data
from dldkit.depth.layers import GatedModuleList, optimizer_steps
from dldkit.errors import UserError
from dldkit.sfm.batches import LengthBuckets
from dldkit.sfm.export import export
from dldkit.sfm.model import SFMDistillModel
from dldkit.sfm.targets import collect_targets
from dldkit.sfm.teacher_loss import teacher_loss
from dldkit.tasks.sfm import SFMDistillTask

RATE = 8000  # of the recordings
DROPOUT = (
    "hidden_dropout activation_dropout attention_dropout feat_proj_dropout".split()
)
SIZES = dict(
    hidden_size=12,
    intermediate_size=16,
    num_attention_heads=2,
    num_hidden_layers=4,
    conv_dim=[8] * 7,
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2,
)
CONFIG = dict(
    student_conf=SIZES,
    model_conf=dict(cnn_init="teacher"),
    collate_fn_conf=dict(max_seconds=0.3, fs=RATE),
    trainer="stacking",  # 9 steps; it grows after 4, amid the second epoch
    trainer_conf=dict(depths=[2, 4], total_steps=9),
    optim="adamw",
    optim_conf=dict(lr=0.005),
    scheduler="warmuplr",
    scheduler_conf=dict(warmup_steps=3),
    batch_type="unsorted",
    batch_size=3,
    num_workers=0,
    max_epoch=3,
    resume=True,
    keep_nbest_models=1,
    best_model_criterion=[["valid", "loss", "min"]],
    use_matplotlib=False,
    use_tensorboard=False,
    num_att_plot=0,
    seed=3,
)


def save_teacher(directory: Path, rate: int = RATE, **sizes: int) -> Path:
    torch.manual_seed(0)
    config = {**SIZES, "hidden_size": 16, "num_hidden_layers": 6, **sizes}
    HubertModel(HubertConfig(**config)).save_pretrained(directory)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, sampling_rate=rate)
    extractor.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A random HuBERT of 6 layers that takes normalised speech of 8 kHz."""
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def training(corpus, teacher):
    """Return a function that gives the arguments of a training."""

    def arguments(directory: Path, **changes) -> list[str]:
        config = {**CONFIG, **changes}
        model_conf = {"teacher": str(teacher), **config["model_conf"]}
        config["model_conf"] = {k: v for k, v in model_conf.items() if v is not None}
        for part, data in (("train", corpus.train), ("valid", corpus.dev)):
            config[f"{part}_data_path_and_name_and_type"] = [
                [str(data / "wav.scp"), "speech", "sound"]
            ]
            config[f"{part}_shape_file"] = [str(data / "utt2num_samples")]
        file = directory.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(config))
        return ["--config", str(file), "--output_dir", str(directory)]

    return arguments


@pytest.fixture(scope="module")
def trained(training, tmp_path_factory) -> Path:
    """The experiment directory of a student that grew from 2 to 4 layers."""
    directory = tmp_path_factory.mktemp("exp") / "sfm"
    main(training(directory))
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


def assert_same_runs(one: Path, other: Path):
    """Weights, moments, and what the epochs measured, apart from the clock."""
    a, b = (load(directory / "checkpoint.pth") for directory in (one, other))
    for part in ("model", "optimizers", "schedulers"):
        assert same(a[part], b[part]), part
    stats = [checkpoint["reporter"]["stats"] for checkpoint in (a, b)]
    assert list(stats[0]) == list(stats[1]) == [1, 2, 3]
    for epoch in stats[0]:
        for phase in ("train", "valid"):
            for name, value in stats[0][epoch][phase].items():
                if isinstance(value, float) and "time" not in name and value == value:
                    assert stats[1][epoch][phase][name] == value, (epoch, phase, name)
    assert same(*(load(directory / "3epoch.pth") for directory in (one, other)))


def error_of(arguments, capsys) -> str:
    """Return the one line with which a command refuses."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    return last


def test_the_student_grows_and_learns(trained):
    epochs = load(trained / "checkpoint.pth")["reporter"]["stats"]
    assert [epochs[n]["valid"]["depth"] for n in (1, 2, 3)] == [2, 4, 4]
    assert epochs[2]["train"]["depth"] == pytest.approx((2 + 4 + 4) / 3)
    assert epochs[3]["valid"]["loss"] < epochs[1]["valid"]["loss"]
    for name in ("loss_output", "loss_layer2", "loss_layer4", "loss_layer6"):
        assert name in epochs[3]["train"]


def test_no_checkpoint_holds_the_teacher(trained, teacher):
    theirs = HubertModel.from_pretrained(teacher).state_dict()
    ours = HubertModel(HubertConfig(**SIZES, mask_time_prob=0.0)).state_dict()
    names = [f"student.{name}" for name in ours]
    files = sorted(p.name for p in trained.glob("*.pth") if not p.is_symlink())
    assert {"checkpoint.pth", "3epoch.pth"} <= set(files)

    def tensors(states):
        for value in states.values() if isinstance(states, dict) else states:
            if isinstance(value, torch.Tensor):
                yield value
            elif isinstance(value, (dict, list, tuple)):
                yield from tensors(value)

    secret = [v for k, v in theirs.items() if "encoder.layers" in k and v.dim() == 2]
    for file in files:
        states = load(trained / file)
        found = states["model"] if file == "checkpoint.pth" else states
        assert [n for n in found if not n.startswith("loss.")] == names, file
        for value in tensors(states):
            assert not any(v.shape == value.shape and same(v, value) for v in secret)


def test_the_config_is_enough_without_the_teacher(training, tmp_path, caplog):
    teacher = save_teacher(tmp_path / "teacher")
    directory = tmp_path / "exp"
    main(
        training(
            directory,
            model_conf=dict(teacher=str(teacher)),
            max_epoch=1,
            trainer="resumable",
            trainer_conf={},
        )
    )
    assert "are not learnt" not in caplog.text
    shutil.rmtree(teacher)
    config = yaml.safe_load((directory / "config.yaml").read_text())
    found = config["model_conf"]
    assert found["teacher_layers"] == [2, 4, 6]
    assert (found["teacher_size"], found["normalize"]) == (16, True)
    checkpoint = directory / "1epoch.pth"
    model, _ = SFMDistillTask.build_model_from_file(
        directory / "config.yaml", checkpoint
    )
    assert same(dict(model.state_dict()), dict(load(checkpoint)))
    assert model.normalize and model.loss.teacher_layers == [2, 4, 6]
    export(checkpoint, tmp_path / "hf")
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(tmp_path / "hf")
    assert extractor.sampling_rate == RATE and extractor.do_normalize


def test_what_the_config_says_goes_before_the_teacher(training, tmp_path, caplog):
    given = dict(teacher_layers=[1, 5], normalize=False)
    directory = tmp_path / "exp"
    with caplog.at_level("INFO"):
        main(training(directory, model_conf=given, dry_run=True))
    assert "layers [1, 5] of 6 of the teacher" in caplog.text
    assert "those above 5 are not learnt" in caplog.text
    found = yaml.safe_load((directory / "config.yaml").read_text())["model_conf"]
    assert {**given, "teacher_size": 16}.items() <= found.items()


def test_batches_of_similar_length_are_the_default(training, tmp_path, caplog):
    """And are drawn in each epoch; what is heard of them is said."""
    arguments = training(tmp_path / "exp", batch_size=2)
    config = yaml.safe_load(Path(arguments[1]).read_text())
    del config["batch_type"]
    args = SFMDistillTask.get_parser().parse_args(["--output_dir", "exp"])
    args.__dict__.update(config)
    with caplog.at_level("INFO"):
        factory = SFMDistillTask.build_iter_factory(args, DistributedOption(), "train")
    assert "s of audio on average: " in caplog.text
    epochs = [list(factory.build_iter(epoch).batch_sampler) for epoch in range(5)]
    assert len({tuple(map(frozenset, batches)) for batches in epochs}) > 1
    assert isinstance(factory.sampler, LengthBuckets)


def test_corpora_are_mixed_with_espnets_categories(
    training, corpus, tmp_path, capsys, caplog
):
    """One utterance as often as all others together, and a training on that."""
    data = tmp_path / "train"
    data.mkdir()
    lines = (corpus.train / "wav.scp").read_text()
    (data / "wav.scp").write_text(lines)
    first, *others = [line.split()[0] for line in lines.splitlines()]
    assert len(others) > 1
    (data / "category2utt").write_text(f"a {first}\nb {' '.join(others)}\n")
    mixed = dict(iterator_type="category", batch_type="catpow", upsampling_factor=0.0)
    sequence = dict(valid_iterator_type="sequence", valid_batch_type="sorted")
    crop = dict(max_seconds=0.3, fs=RATE, crop=False)
    words = training(
        tmp_path / "exp",
        **mixed,
        **sequence,
        batch_bins=9000,
        dataset_scaling_factor=100.0,
        num_iters_per_epoch=3,
        max_epoch=2,
        collate_fn_conf=crop,
        trainer="resumable",
        trainer_conf={},
    )
    file = Path(words[1])
    config = yaml.safe_load(file.read_text())
    config["train_data_path_and_name_and_type"][0][0] = str(data / "wav.scp")
    file.write_text(yaml.safe_dump(config))
    args = SFMDistillTask.get_parser().parse_args(words)
    with caplog.at_level("INFO"):
        factory = SFMDistillTask.build_iter_factory(args, DistributedOption(), "train")
    batches = list(factory.build_iter(1).batch_sampler)
    lengths = {utt: len(corpus.speech(utt)) for utt in (first, *others)}
    whole = [lengths[utt] for batch in batches for utt in batch]
    heard = sum(min(length, 0.3 * RATE) for length in whole)
    assert f"{heard / RATE / 3:.1f} s of audio on average: " in caplog.text
    assert f" {heard / sum(whole):.1%} of its utterances" in caplog.text
    drawn = [utt for batch in factory.sampler for utt in batch]
    assert drawn.count(first) / len(drawn) == pytest.approx(0.5, abs=0.1)
    main(words)
    assert (tmp_path / "exp" / "2epoch.pth").is_file()
    error = error_of([*words, "--collate_fn_conf", "crop=true"], capsys)
    assert "crop: true would cut all to the shortest" in error


def save_noise(directory: Path, rate: int = RATE) -> str:
    """Save a noise, and return the table that lists it."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(4 * rate)
    soundfile.write(directory / "noise.wav", noise, rate)
    (directory / "noise.scp").write_text(f"noise {directory}/noise.wav\n")
    return str(directory / "noise.scp")


@pytest.mark.parametrize("mode", ["train", "valid"])
@pytest.mark.parametrize("is_live", [True, False])
def test_the_student_alone_hears_noise(training, corpus, tmp_path, mode, is_live):
    """In training; targets that are cached are those of clean speech already."""
    options = dict(noise_scp=save_noise(tmp_path), noise_db_range="5_5")
    if not is_live:
        (tmp_path / "cache").mkdir()
        about = dict(teacher="", hidden_size=16, num_layers=6, sampling_rate=RATE)
        about.update(normalize=True, layers=[2])
        (tmp_path / "cache" / "teacher.yaml").write_text(yaml.safe_dump(about))
        options["model_conf"] = dict(teacher=str(tmp_path / "cache"))
    words = training(tmp_path / "exp", collate_fn_conf=dict(max_seconds=9.0), **options)
    args = SFMDistillTask.get_parser().parse_args(words)
    factory = SFMDistillTask.build_iter_factory(args, DistributedOption(), mode)
    utts, batch = next(iter(factory.build_iter(1)))
    heard = batch["clean" if mode == "train" and is_live else "speech"]
    assert ("clean" in batch) == (mode == "train" and is_live)
    n = batch["speech"].size(1)
    for utt, noisy, clean in zip(utts, batch["speech"], heard):
        speech = torch.tensor(corpus.speech(utt), dtype=torch.float32)
        places = [i for i in range(0, len(speech) - n + 1, 320)]
        found = [torch.allclose(speech[i : i + n], clean, atol=1e-3) for i in places]
        assert any(found) == (mode == "valid" or is_live), utt
        assert torch.equal(noisy, clean) == ("clean" not in batch)


def test_trains_with_noise(training, tmp_path):
    noise = dict(noise_scp=save_noise(tmp_path), noise_apply_prob=0.5)
    Path(noise["noise_scp"]).write_text(f"{tmp_path}/noise.wav\n")  # ESPnet takes both
    main(training(tmp_path / "exp", **noise, max_epoch=1))
    assert (tmp_path / "exp" / "1epoch.pth").is_file()


def test_refuses_noise_of_another_rate(training, tmp_path, capsys):
    noise = save_noise(tmp_path, 16000)
    last = error_of(training(tmp_path / "exp", noise_scp=noise), capsys)
    assert f"{noise}: utterance noise has 16000 Hz, but the teacher" in last
    last = error_of(training(tmp_path / "exp", rir_scp="/no/rir.scp"), capsys)
    assert "/no/rir.scp does not exist" in last


@pytest.mark.parametrize("trainer", ["stacking", "resumable"])
def test_carriers_follow_the_growth_that_the_config_says(training, tmp_path, trainer):
    """And stand in the config of the experiment, by which the student is rebuilt."""
    growth = dict(trainer=trainer, trainer_conf={})
    if trainer == "stacking":
        growth["trainer_conf"] = dict(depths=[2, 4], method="gradstack", total_steps=9)
    conf = dict(carried_by="copies", teacher_layers=[3, 6])
    main(training(tmp_path / "exp", model_conf=conf, dry_run=True, **growth))
    config = yaml.safe_load((tmp_path / "exp" / "config.yaml").read_text())
    found = config["model_conf"].get("student_layers")
    assert found == ({2: [1, 2], 4: [3, 4]} if trainer == "stacking" else None)
    args = SFMDistillTask.get_parser().parse_args(["--output_dir", "exp"])
    args.__dict__.update(config)
    assert SFMDistillTask.build_model(args).student_layers == (found or {})


def test_exports_no_layers_that_had_not_grown_yet(trained, training, tmp_path):
    """A training that stopped after an epoch, when two of four layers ran."""
    main(training(tmp_path / "exp", max_epoch=1))
    latest, hf = tmp_path / "exp" / "latest.pth", tmp_path / "hf"
    with pytest.raises(UserError, match="latest.pth: the student had grown to 2 layer"):
        export(latest, hf)
    assert export(latest, hf, depth=2, selector="prefix") == (0, 1)
    # killed between the epoch's model and its checkpoint
    checkpoint = tmp_path / "exp" / "checkpoint.pth"
    checkpoint.rename(checkpoint.with_name("checkpoint.pth.pending"))
    with pytest.raises(UserError, match="latest.pth: the student had grown to 2 layer"):
        export(latest, hf)
    assert export(trained / "latest.pth", hf) == (0, 1, 2, 3)


def test_the_first_stage_begins_with_layers_of_the_teacher(training, teacher, tmp_path):
    """Nothing is learnt here, so that at the end each copy is still a teacher layer."""
    main(
        training(
            tmp_path / "exp",
            student_conf={**SIZES, "hidden_size": 16},
            model_conf=dict(layer_init=[5, 2]),
            trainer_conf=dict(depths=[2, 4], total_steps=9, method="interleave"),
            optim="sgd",
            optim_conf=dict(lr=0.0),
        )
    )
    student = load(tmp_path / "exp" / "3epoch.pth")
    theirs = HubertModel.from_pretrained(teacher).encoder.layers
    for slot, layer in enumerate([5, 5, 2, 2]):
        expected = theirs[layer - 1].state_dict()
        for name, value in expected.items():
            assert same(student[f"student.encoder.layers.{slot}.{name}"], value), name


@pytest.mark.parametrize("epochs", [1, 2, 4])
@pytest.mark.parametrize("trainer", ["resumable", "stacking"])
def test_the_learning_rate_is_zero_at_the_end(training, tmp_path, epochs, trainer):
    """For any number of epochs, and with several batches to a step."""
    changes = dict(trainer_conf=dict(depths=[2, 4]) if trainer == "stacking" else {})
    changes.update(scheduler="transformers", scheduler_conf=dict(warmup_ratio=0.4))
    changes.update(trainer=trainer, batch_size=1, accum_grad=3, max_epoch=epochs)
    main(training(tmp_path / "exp", **changes))
    checkpoint = load(tmp_path / "exp" / "checkpoint.pth")
    assert checkpoint["schedulers"][0]["last_epoch"] == 3 * epochs
    assert checkpoint["optimizers"][0]["param_groups"][0]["lr"] == 0
    stats = checkpoint["reporter"]["stats"]
    assert stats[epochs]["train"]["optim0_lr0"] > 0


def test_the_learning_rate_takes_its_total_from_the_stages(training, tmp_path):
    changes = dict(scheduler="transformers", scheduler_conf=dict(warmup_ratio=0.4))
    main(training(tmp_path / "exp", **changes, max_epoch=1))  # 3 of 9 steps
    checkpoint = load(tmp_path / "exp" / "checkpoint.pth")
    rate = checkpoint["optimizers"][0]["param_groups"][0]["lr"]
    assert rate == pytest.approx(0.005 * 3 / 4)


@pytest.mark.integration
def test_a_run_can_be_repeated(trained, training, tmp_path):
    main(training(tmp_path / "exp"))
    assert_same_runs(trained, tmp_path / "exp")


@pytest.mark.integration
@pytest.mark.parametrize("epochs", [1, 2])
def test_a_resumed_run_is_the_unbroken_one(trained, training, tmp_path, caplog, epochs):
    """Stopped before the student grew, and after; its CNN learns."""
    main(training(tmp_path / "exp", max_epoch=epochs))
    assert not (tmp_path / "exp" / "3epoch.pth").exists()
    with caplog.at_level("INFO"):
        main(training(tmp_path / "exp"))
    assert "cnn_init: teacher is not done, because weights were loaded" in caplog.text
    assert_same_runs(trained, tmp_path / "exp")


def test_a_resumed_run_without_the_gradients_that_an_epoch_left_over(
    training, tmp_path
):
    """Nine batches, of which two make a step: the ninth belongs to no checkpoint."""
    conf = dict(batch_size=1, accum_grad=2, trainer="resumable", trainer_conf={})
    main(training(tmp_path / "unbroken", **conf))
    for epochs in (1, 3):
        main(training(tmp_path / "resumed", max_epoch=epochs, **conf))
    assert_same_runs(tmp_path / "unbroken", tmp_path / "resumed")


# Nine steps: one layer for two, two layers until the fourth, amid the second epoch, and
# then one, two or four, drawn for each.
EVERY_DEPTH = dict(
    model_conf=dict(
        depth_sampler={1: 1, 2: 1, 4: 1}, layer_choice="prefix", exits=[1, 2]
    ),
    trainer_conf=dict(
        depths=[1, 2, 4],
        schedule="fractions",
        fractions=[2 / 9, 2 / 9, 5 / 9],
        random_depth="last_stage",
    ),
)
# A training that is killed, for good, in its fifth optimiser step.
KILLED = """
import os, signal, sys, torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from dldkit.bin.sfm_distill_train import main
torch.set_num_threads(1)
steps = []
def count(*_):
    steps.append(1)
    if len(steps) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
register_optimizer_step_post_hook(count)
main(sys.argv[1:])
"""


@pytest.mark.integration
def test_a_student_of_every_depth_grows_and_then_draws_depths(
    training, python, tmp_path, monkeypatch
):
    """And ends alike when it is killed twice, at depths that are drawn."""
    drawn = []
    layers_of_step = GatedModuleList.layers_of_step

    def recorded(gates):
        layers = layers_of_step(gates)
        if drawn[-1:] != [(optimizer_steps(), layers)]:
            drawn.append((optimizer_steps(), layers))
        return layers

    told = []
    grown = SFMDistillModel.grown

    def recorded_growth(model, before, after):
        grown(model, before, after)
        told.append((before, after))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the other processes
    with monkeypatch.context() as patch:
        patch.setattr(GatedModuleList, "layers_of_step", recorded)
        patch.setattr(SFMDistillModel, "grown", recorded_growth)
        main(training(tmp_path / "whole", **EVERY_DEPTH))
    assert told == [(1, 2), (2, 4)]
    steps = {step: layers for step, layers in drawn}
    depths = [len(layers) for layers in steps.values()]
    assert list(steps.values()) == [tuple(range(depth)) for depth in depths]
    assert len(depths) == 9 and depths[:4] == [1, 1, 2, 2]
    assert set(depths[4:]) <= {1, 2, 4} and len(set(depths[4:])) > 1

    epochs = load(tmp_path / "whole" / "checkpoint.pth")["reporter"]["stats"]
    for epoch, exits in ((1, [1, 2]), (2, [1, 2, 4]), (3, [1, 2, 4])):
        valid = epochs[epoch]["valid"]
        losses = [valid[f"loss_depth{n}"] for n in exits]
        assert valid["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert "loss_depth4" not in epochs[1]["valid"]

    for _ in range(2):  # after five steps, and after eight
        python("-c", KILLED, *training(tmp_path / "broken", **EVERY_DEPTH), status=-9)
    stats = load(tmp_path / "broken" / "checkpoint.pth")["reporter"]["stats"]
    assert list(stats) == [1, 2]
    main(training(tmp_path / "broken", **EVERY_DEPTH))
    torch.set_num_threads(threads)
    assert_same_runs(tmp_path / "whole", tmp_path / "broken")


# A training that writes down, after each optimiser step, the layers that ran and all
# weights.
RECORDED = """
import sys, torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from dldkit.bin.sfm_distill_train import main
from dldkit.depth.layers import GatedModuleList
torch.set_num_threads(1)
steps, ran = [], []
layers_of_step = GatedModuleList.layers_of_step
def recorded(gates):
    ran.append(layers_of_step(gates))
    return ran[-1]
def write_down(optimizer, *_):
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    steps.append((ran[-1], torch.cat([p.detach().flatten() for p in weights])))
GatedModuleList.layers_of_step = recorded
register_optimizer_step_post_hook(write_down)
main(sys.argv[2:])
torch.save(steps, sys.argv[1])
"""


# A training that says which utterances it heard.
HEARD = """
import sys, torch
from dldkit.bin.sfm_distill_train import main
from dldkit.sfm.model import SFMDistillModel
torch.set_num_threads(1)
heard = []
forward = SFMDistillModel.forward
def noted(model, *args, utt_id, **batch):
    heard.extend(utt_id if model.training else [])
    return forward(model, *args, utt_id=utt_id, **batch)
SFMDistillModel.forward = noted
main(sys.argv[1:])
print(*heard)
"""


@pytest.mark.integration
def test_two_ranks_grow_as_one_process_does(training, corpus, python, tmp_path):
    """Two gloo processes train on batches of two and of one utterance.

    All are equally long, and nothing is dropped: so the mean over both ranks is that of
    one process with batches of three. SGD, since Adam makes a step of rounding errors
    where a gradient is zero.
    """
    data = {}
    for part, source in (("train", corpus.train), ("valid", corpus.dev)):
        data[part] = tmp_path / part
        data[part].mkdir()
        lines = [line.split()[0] for line in open(source / "wav.scp")]
        for utt in lines:
            speech = np.resize(corpus.speech(utt), 2400)
            soundfile.write(data[part] / f"{utt}.wav", speech, RATE)
        table = "".join(f"{utt} {data[part]}/{utt}.wav\n" for utt in lines)
        (data[part] / "wav.scp").write_text(table)
        lengths = "".join(f"{utt} 2400\n" for utt in lines)
        (data[part] / "utt2num_samples").write_text(lengths)
    dropouts = ("hidden", "attention", "activation", "feat_proj")
    changes = dict(
        student_conf={**SIZES, **{f"{name}_dropout": 0.0 for name in dropouts}},
        optim="sgd",
        optim_conf=dict(lr=0.1, momentum=0.9),
        unused_parameters=True,
    )
    gloo = dict(
        dist_backend="gloo",
        dist_world_size=2,
        dist_init_method=f"file://{tmp_path}/meeting",
    )

    def arguments(name: str, **more) -> list[str]:
        words = training(tmp_path / name, **changes, **more)
        point_to(data.values(), words)
        return words

    command = arguments("two", **gloo)
    with ThreadPoolExecutor() as pool:
        ranks = [
            pool.submit(
                python, "-c", RECORDED, f"{tmp_path}/{n}", *command, "--dist_rank", n
            )
            for n in (0, 1)
        ]
        for rank in ranks:
            rank.result()
    python("-c", RECORDED, f"{tmp_path}/alone", *arguments("one"))

    first, second, alone = (load(tmp_path / name) for name in ("0", "1", "alone"))
    assert [len(layers) for layers, _ in first] == [2] * 4 + [4] * 5
    for (layers, weights), (others, theirs) in zip(first, second, strict=True):
        assert layers == others and torch.equal(weights, theirs)
    for (layers, weights), (others, theirs) in zip(first, alone, strict=True):
        assert layers == others
        torch.testing.assert_close(weights, theirs, rtol=1e-3, atol=1e-5)
    moved = (first[-1][1] - first[0][1]).abs().max()
    assert moved > 0.01  # what the tolerance is small against
    epochs = load(tmp_path / "two" / "checkpoint.pth")["reporter"]["stats"]
    losses = [epoch["valid"]["loss"] for epoch in epochs.values()]
    assert losses[2] < losses[0]


def test_print_config_shows_our_options(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sfm_distill_train", "--print_config"])
    output = io.StringIO()
    SFMDistillTask.print_config(output)
    config = yaml.safe_load(output.getvalue())
    ours = dict(
        teacher=None,
        teacher_layers=None,
        layer_weight=0.5,
        loss="mse",
        target_norm="none",
        carried_by="position",
        student_layers=None,
        cnn_init=None,
        layer_init=None,
        freeze_cnn=False,
        depth_sampler="full",
        layer_choice="random",
        exits=[],
        normalize=None,
    )
    assert {name: config["model_conf"].get(name) for name in ours} == ours
    assert config["student_conf"] == {} and config["collate_fn_conf"] == {}
    assert config["cached_features"] is False
    assert (config["model"], config["trainer"]) == ("sfm_distill", "resumable")
    assert config["batch_type"] == "sorted"


def test_collect_stats_writes_the_lengths_of_whole_utterances(
    training, corpus, tmp_path
):
    main(training(tmp_path / "stats", collect_stats=True))
    for part, data in (("train", corpus.train), ("valid", corpus.dev)):
        shapes = (tmp_path / "stats" / part / "speech_shape").read_text()
        assert shapes == (data / "utt2num_samples").read_text()
        keys = (tmp_path / "stats" / part / "batch_keys").read_text().split()
        assert keys == ["speech"]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model_conf=dict(teacher=None)), "model_conf names no teacher"),
        (dict(model_conf=dict(teacher="/not/there")), "no teacher /not/there"),
        (dict(model_conf=dict(layer_wieght=1.0)), "model_conf: .*'layer_wieght'"),
        (dict(model_conf=dict(teacher_layers=[2, 7])), "layers 0 .input. to 6"),
        (dict(collate_fn_conf=dict(max_second=1)), "collate_fn_conf: .*'max_second'"),
        (dict(collate_fn_conf=dict(train=False)), "collate_fn_conf: .*'train'"),
        (dict(student_conf=dict(dropout=0.1)), "HubertConfig has no dropout"),
        (dict(trainer="resumable"), "takes no trainer_conf"),
        (dict(trainer_conf=dict(depths=[2, 6])), "the model has 4"),
        (dict(trainer_conf=dict(depth=[2, 4])), "trainer_conf: .*'depth'"),
        (
            dict(trainer_conf=dict(depths=[2, 4], random_depth="last_stage")),
            "the model draws no depths",
        ),
        (
            dict(scheduler="transformers", scheduler_conf=dict(warmup_steps=9)),
            "warmup_steps: scheduler: transformers takes name and warmup_ratio",
        ),
        (
            dict(
                scheduler="transformers",
                scheduler_conf={},
                trainer="default",
                trainer_conf={},
            ),
            "scheduler: transformers with trainer: default, .* resumable or stacking",
        ),
        (dict(model_conf=dict(depth_sampler={4: 1})), "2 layers: no depth is left"),
        (dict(model_conf=dict(exits=[2])), "set layer_choice: prefix"),
        (dict(model_conf=dict(layer_init=[1])), "layer_init .*hidden_size is 12, but"),
        (dict(model_conf=dict(layer_init=[1, 2, 3])), "begins with 2 .*list 2 at most"),
    ],
    ids=str,
)
def test_refuses_in_one_line(training, tmp_path, capsys, changes, message):
    last = error_of(training(tmp_path / "exp", **changes), capsys)
    assert re.search(message, last), last


def test_refuses_another_sampling_rate(training, tmp_path, capsys):
    teacher = save_teacher(tmp_path / "teacher", 16000)
    changes = dict(model_conf=dict(teacher=str(teacher)))
    last = error_of(training(tmp_path / "exp", **changes), capsys)
    assert "8000 Hz, but the teacher takes 16000 Hz: format the data" in last
    assert not (tmp_path / "exp").exists()


@pytest.mark.parametrize("content", ["", "a /not/there.wav\n"], ids=["empty", "gone"])
def test_refuses_data_that_is_not_there(training, tmp_path, capsys, content):
    (tmp_path / "wav.scp").write_text(content)
    arguments = training(tmp_path / "exp")
    file = Path(arguments[1])
    config = yaml.safe_load(file.read_text())
    config["train_data_path_and_name_and_type"][0][0] = str(tmp_path / "wav.scp")
    file.write_text(yaml.safe_dump(config))
    assert str(tmp_path / "wav.scp") in error_of(arguments, capsys)


def test_another_teacher_is_refused(training, teacher, tmp_path, capsys):
    copy = tmp_path / "teacher"
    shutil.copytree(teacher, copy)
    conf = dict(teacher=str(copy))
    arguments = training(tmp_path / "exp", model_conf=conf, max_epoch=1)
    main(arguments)
    model = HubertModel.from_pretrained(copy)
    torch.nn.init.normal_(model.encoder.layers[0].final_layer_norm.weight)
    model.save_pretrained(copy)
    arguments = training(tmp_path / "exp", model_conf=conf, max_epoch=2)
    last = error_of(arguments, capsys)
    assert "begun with other input: teacher model.safetensors" in last
    assert not (tmp_path / "exp" / "2epoch.pth").exists()


@pytest.mark.integration
def test_another_teacher_of_the_hub_is_refused(training, teacher, tmp_path):
    for name in ("one", "two"):
        model = tmp_path / "hub" / "hub" / f"models--some--{name}"
        shutil.copytree(teacher, model / "snapshots" / "1234")
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text("1234")
    commands = []
    for epochs, name in enumerate(["some/one", "some/one", "some/two", str(teacher)]):
        conf = dict(model_conf=dict(teacher=name), max_epoch=epochs + 1)
        file = Path(training(tmp_path / f"{epochs}", **conf)[1])
        commands.append(["--config", str(file), "--output_dir", str(tmp_path / "exp")])
    code = (
        "import sys\nfrom dldkit.bin.sfm_distill_train import main\n"
        f"for command in {commands!r}:\n"
        "    try:\n        main(command)\n"
        "    except SystemExit as stop:\n        print('stopped', stop.code)\n"
    )
    offline = dict(HF_HOME=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["stopped", "1"] * 2
    assert done.stderr.count("exp was begun with other input: hub_teachers") == 2
    assert len(load(tmp_path / "exp" / "checkpoint.pth")["reporter"]["stats"]) == 2


def point_to(data, arguments) -> None:
    """Let the config of a training name other directories."""
    file = Path(arguments[1])
    config = yaml.safe_load(file.read_text())
    for part, directory in zip(("train", "valid"), data):
        config[f"{part}_data_path_and_name_and_type"][0][0] = f"{directory}/wav.scp"
        config[f"{part}_shape_file"] = [f"{directory}/utt2num_samples"]
    file.write_text(yaml.safe_dump(config))


class TestCachedTargets:
    def test_training_reads_them(self, training, corpus, teacher, tmp_path):
        """Until the teacher is gone; its layers are those that were collected."""
        copy, cache = tmp_path / "teacher", tmp_path / "cache"
        shutil.copytree(teacher, copy)
        collect_targets(copy, [3, 6], [corpus.train, corpus.dev], cache)
        shutil.rmtree(copy)
        conf = dict(teacher=str(cache), cnn_init=None)
        whole = dict(max_seconds=9.0, fs=RATE)
        arguments = dict(model_conf=conf, collate_fn_conf=whole, num_workers=1)
        main(training(tmp_path / "exp", **arguments))
        config = yaml.safe_load((tmp_path / "exp" / "config.yaml").read_text())
        assert config["model_conf"]["teacher_layers"] == [3, 6]
        epochs = load(tmp_path / "exp" / "checkpoint.pth")["reporter"]["stats"]
        losses = [epoch["valid"]["loss_layer3"] for epoch in epochs.values()]
        assert losses[2] < losses[0]

    def test_features_in_place_of_audio(self, training, corpus, teacher, tmp_path):
        """The same training as on audio, when neither it nor the teacher is there."""
        data = []
        for part, source in (("train", corpus.train), ("dev", corpus.dev)):
            cut_data(str(source), str(tmp_path / part), 0.3, RATE, "wav")
            data.append(tmp_path / part)
        own = HubertModel.from_pretrained(teacher).feature_extractor.state_dict()
        copy, cache = tmp_path / "teacher", tmp_path / "cache"
        shutil.copytree(teacher, copy)
        collect_targets(copy, [3, 6], data, cache, features=True)
        conf = dict(cnn_init="teacher", freeze_cnn=True, teacher_layers=[3, 6])
        still = {**SIZES, **dict.fromkeys(DROPOUT, 0.0)}
        losses = {}
        for name in ("audio", "features"):
            changes: dict = dict(model_conf=dict(conf, teacher=str(copy)))
            if name == "features":
                changes["model_conf"]["teacher"] = str(cache)
                changes.update(cached_features=True, num_workers=1)
                shutil.rmtree(copy)
                for wav in tmp_path.rglob("*.wav"):
                    wav.unlink()
            exp = tmp_path / name
            # with SGD: Adam makes a step of rounding where a gradient is zero
            changes.update(optim="sgd", optim_conf=dict(lr=0.1))
            # what is cached is never cropped
            changes["collate_fn_conf"] = dict(max_seconds=0.3, fs=RATE, crop=False)
            arguments = training(
                exp, student_conf=still, batch_type="sorted", **changes
            )
            point_to(data, arguments)
            main(arguments)
            checkpoint = load(exp / "checkpoint.pth")
            epochs = checkpoint["reporter"]["stats"]
            losses[name] = [
                epochs[n][part]["loss"]
                for n in (1, 2, 3)
                for part in ("train", "valid")
            ]
            for key, value in own.items():
                ours = checkpoint["model"][f"student.feature_extractor.{key}"]
                assert torch.equal(ours, value)
        assert losses["features"] == pytest.approx(losses["audio"], rel=1e-3)
        assert losses["audio"][-1] < losses["audio"][0]
        # the teacher hears what the student does
        loss = teacher_loss(str(tmp_path / "features" / "config.yaml"), str(teacher))
        assert 0 < loss["loss"] < 1e-4

    @pytest.mark.parametrize(
        "changes, message",
        [
            (dict(cnn_init=None), "set model_conf cnn_init: teacher and freeze_cnn"),
            (dict(freeze_cnn=False), "set model_conf cnn_init: teacher and freeze_cnn"),
            (dict(normalize=False), "the student has another one: .* leave normalize"),
            (dict(teacher="targets"), "there is no .*/features.scp: set model_conf"),
            (dict(teacher="model"), "there is no .*/features.scp: set model_conf"),
        ],
        ids=str,
    )
    def test_features_of_another_cnn_are_refused(
        self, training, corpus, teacher, tmp_path, capsys, changes, message
    ):
        collect_targets(teacher, [6], [corpus.train, corpus.dev], tmp_path / "targets")
        both = [corpus.train, corpus.dev], tmp_path / "cache"
        collect_targets(teacher, [6], *both, features=True)
        names = dict(targets=tmp_path / "targets", model=teacher)
        named = names.get(changes.get("teacher"), tmp_path / "cache")
        conf = {"cnn_init": "teacher", "freeze_cnn": True, **changes}
        conf["teacher"] = str(named)
        arguments = training(
            tmp_path / "exp",
            model_conf=conf,
            cached_features=True,
            collate_fn_conf=dict(max_seconds=9.0, fs=RATE),
        )
        last = error_of(arguments, capsys)
        assert re.search(message, last), last

    def test_noise_needs_audio(self, training, corpus, teacher, tmp_path, capsys):
        both = [corpus.train, corpus.dev], tmp_path / "cache"
        collect_targets(teacher, [6], *both, features=True)
        conf = dict(teacher=str(both[1]), cnn_init="teacher", freeze_cnn=True)
        noise = save_noise(tmp_path)
        changes = dict(model_conf=conf, cached_features=True, noise_scp=noise)
        last = error_of(training(tmp_path / "exp", **changes), capsys)
        assert f"{noise}: with cached_features: true no audio is read" in last

    def test_a_second_teacher_runs_beside_them(
        self, training, corpus, teacher, tmp_path, capsys
    ):
        both = [corpus.train, corpus.dev], tmp_path / "cache"
        collect_targets(teacher, [3, 6], *both, features=True)
        other = save_teacher(tmp_path / "other", hidden_size=12, num_hidden_layers=4)
        conf = dict(teacher=str(both[1]), second_teacher=str(other))
        whole = dict(max_seconds=9.0, fs=RATE)
        exp, changes = tmp_path / "exp", dict(collate_fn_conf=whole)
        changes["model_conf"] = {**conf, "second_layers": [2, 4]}
        main(training(exp, noise_scp=save_noise(tmp_path), **changes))
        config = yaml.safe_load((exp / "config.yaml").read_text())
        assert config["model_conf"]["second_size"] == 12
        epochs = load(exp / "checkpoint.pth")["reporter"]["stats"]
        for name in ("loss_layer3", "second_loss_layer2"):
            assert epochs[3]["valid"][name] < epochs[1]["valid"][name]
        changes["model_conf"] = {**conf, "cnn_init": "teacher", "freeze_cnn": True}
        last = error_of(training(exp, cached_features=True, **changes), capsys)
        assert f"second_teacher {other} hears the audio" in last
        changes["model_conf"] = dict(conf, second_teacher=conf["teacher"])
        last = error_of(training(exp, **changes), capsys)
        assert "only the first teacher can be cached" in last
        faster = save_teacher(tmp_path / "faster", 16000)
        changes["model_conf"] = dict(conf, second_teacher=str(faster))
        last = error_of(training(exp, **changes), capsys)
        assert "takes 16000 Hz, but the first teacher 8000 Hz" in last

    def test_of_other_audio_are_refused_in_one_line(
        self, training, corpus, teacher, tmp_path, capsys
    ):
        """The refusal comes from a worker of the DataLoader."""
        data, cache = tmp_path / "data", tmp_path / "cache"
        shutil.copytree(corpus.train, data)
        soundfile.write(data / "c.wav", np.zeros(6000), 8000)
        (data / "utt2num_samples").unlink()
        scp = (corpus.train / "wav.scp").read_text()
        (data / "wav.scp").write_text(scp.replace(str(corpus.train), str(data)))
        collect_targets(teacher, [6], [data, corpus.dev], cache)
        conf = dict(teacher=str(cache), cnn_init=None)
        whole = dict(max_seconds=9.0, fs=RATE)
        changes = dict(model_conf=conf, collate_fn_conf=whole, num_workers=1)
        arguments = training(tmp_path / "exp", **changes)
        last = error_of(arguments, capsys)
        assert last.startswith("error: utterance c has ")
        assert "cached targets" in last and "Traceback" not in last


def streamed(directory: Path, arguments: list[str]) -> list[str]:
    """Let the config of a training name a Shar in place of its training data."""
    file = Path(arguments[1])
    config = yaml.safe_load(file.read_text())
    for name in ("train_data_path_and_name_and_type", "train_shape_file"):
        del config[name]
    file.write_text(yaml.safe_dump({**config, "train_shar": str(directory)}))
    return arguments


class TestShar:
    CHANGES = dict(num_iters_per_epoch=3, num_workers=1)

    def test_trains_and_resumes(self, training, shar, tmp_path, capsys):
        """Three epochs, whose ends are those of a run that was stopped in between."""
        for name, epochs in (("one", [3]), ("other", [1, 3])):
            for epoch in epochs:
                changes = dict(self.CHANGES, max_epoch=epoch)
                main(streamed(shar, training(tmp_path / name, **changes)))
        assert_same_runs(tmp_path / "one", tmp_path / "other")
        stats = load(tmp_path / "one" / "checkpoint.pth")["reporter"]["stats"]
        assert stats[3]["valid"]["loss"] < stats[1]["valid"]["loss"]
        # it is bound to its data
        copy = tmp_path / "shar"
        shutil.copytree(shar, copy)
        shutil.copy(copy / "cuts.000000.jsonl.gz", copy / "cuts.000001.jsonl.gz")
        changes = dict(self.CHANGES, max_epoch=4)
        last = error_of(streamed(copy, training(tmp_path / "one", **changes)), capsys)
        assert "begun with other input: train_shar cuts.000001.jsonl.gz" in last

    def test_the_length_of_the_training_is_known(self, training, shar, tmp_path):
        changes = dict(self.CHANGES, scheduler="transformers", max_epoch=2)
        changes.update(scheduler_conf={}, trainer="resumable", trainer_conf={})
        main(streamed(shar, training(tmp_path / "exp", **changes)))
        checkpoint = load(tmp_path / "exp" / "checkpoint.pth")
        assert checkpoint["optimizers"][0]["param_groups"][0]["lr"] == 0

    def test_the_student_alone_hears_noise(self, training, shar, tmp_path):
        changes = dict(self.CHANGES, noise_scp=save_noise(tmp_path))
        words = streamed(shar, training(tmp_path / "exp", **changes))
        args = SFMDistillTask.get_parser().parse_args(words)
        factory = SFMDistillTask.build_iter_factory(args, DistributedOption(), "train")
        _, batch = next(iter(factory.build_iter(1)))
        assert not torch.equal(batch["speech"], batch["clean"])
        assert batch["speech"].dtype == batch["clean"].dtype == torch.float32

    @pytest.mark.integration
    def test_two_ranks_hear_different_utterances(
        self, training, shar, python, tmp_path
    ):
        gloo = dict(dist_backend="gloo", dist_world_size=2, unused_parameters=True)
        meeting = f"file://{tmp_path}/meeting"
        changes = dict(max_epoch=1, num_iters_per_epoch=6, dist_init_method=meeting)
        changes.update(gloo, num_workers=1)
        words = streamed(shar, training(tmp_path / "exp", **changes))
        with ThreadPoolExecutor() as pool:
            ranks = [
                pool.submit(python, "-c", HEARD, *words, "--dist_rank", n)
                for n in (0, 1)
            ]
            heard = [rank.result().stdout.splitlines()[-1].split() for rank in ranks]
        # the first pass: of two shards, and of one
        assert sorted(heard[0][:6] + heard[1][:3]) == list("abcdefghi")

    @pytest.mark.parametrize(
        "changes, message",
        [
            (dict(num_iters_per_epoch=None), "set num_iters_per_epoch"),
            (dict(cached_features=True), "targets are cached for data with a wav.scp"),
            (dict(collect_stats=True), "it needs no statistics"),
            (dict(batch_type="numel"), "set batch_type: sorted"),
            (dict(iterator_type="chunk"), "iterator_type: sequence"),
            (dict(num_workers=4), "has 3 shards, but 4 processes"),
        ],
        ids=str,
    )
    def test_refuses_in_one_line(
        self, training, shar, tmp_path, capsys, changes, message
    ):
        arguments = training(tmp_path / "exp", **{**self.CHANGES, **changes})
        last = error_of(streamed(shar, arguments), capsys)
        assert last.startswith(f"error: train_shar {shar}") and message in last

    def test_refuses_cached_targets(
        self, training, corpus, shar, teacher, tmp_path, capsys
    ):
        cache = tmp_path / "cache"
        collect_targets(teacher, [6], [corpus.train, corpus.dev], cache)
        conf = dict(teacher=str(cache), cnn_init=None)
        changes = dict(self.CHANGES, model_conf=conf)
        last = error_of(streamed(shar, training(tmp_path / "exp", **changes)), capsys)
        assert "set model_conf teacher to the teacher itself" in last

    def test_refuses_other_audio(self, training, shar, tmp_path, capsys):
        arguments = training(tmp_path / "exp", train_shar=str(shar), **self.CHANGES)
        assert "leave train_data_path_and_name_and_type" in error_of(arguments, capsys)
        streamed(tmp_path, arguments)
        assert f"{tmp_path}: there are 0 cuts" in error_of(arguments, capsys)
        teacher = save_teacher(tmp_path / "teacher", 16000)
        changes = dict(self.CHANGES, model_conf=dict(teacher=str(teacher)))
        last = error_of(streamed(shar, training(tmp_path / "exp", **changes)), capsys)
        assert "utterance a has 8000 Hz, but the teacher takes 16000 Hz" in last


def test_the_loss_of_another_teacher_is_the_distance_of_both(
    training, corpus, teacher, tmp_path
):
    """By hand, of what transformers gives for each utterance alone."""
    other = save_teacher(tmp_path / "other", intermediate_size=24)
    crop = dict(max_seconds=9, fs=RATE, crop=False)
    conf = dict(teacher=str(teacher), cnn_init=None, teacher_layers=[3, 6])
    exp = tmp_path / "exp"
    main(training(exp, model_conf=conf, max_epoch=1, collate_fn_conf=crop))
    found = teacher_loss(str(exp / "config.yaml"), str(other))
    models = [HubertModel.from_pretrained(path).eval() for path in (teacher, other)]
    squares = {layer: [] for layer in (3, 6)}
    for line in (corpus.dev / "wav.scp").read_text().splitlines():
        speech = torch.from_numpy(soundfile.read(line.split()[1], dtype="float32")[0])
        speech = (speech - speech.mean()) / (speech.var(correction=0) + 1e-7).sqrt()
        with torch.no_grad():
            a, b = (m(speech[None], output_hidden_states=True) for m in models)
        for layer in squares:
            difference = a.hidden_states[layer] - b.hidden_states[layer]
            squares[layer].append(difference.square().mean(-1).flatten())
    third, sixth = (float(torch.cat(values).mean()) for values in squares.values())
    assert sixth > 1e-2
    assert found == pytest.approx(
        dict(
            loss=sixth + 0.5 * (third + sixth) / 2,
            loss_output=sixth,
            loss_layer3=third,
            loss_layer6=sixth,
        ),
        rel=1e-4,
    )


@pytest.mark.parametrize(
    "norm, layers", [("none", [3, 6]), ("layer", [3, 6]), ("none", [[2, 3], 6])]
)
def test_the_teacher_s_own_loss(
    norm, layers, training, corpus, teacher, tmp_path, capsys
):
    """Nothing with a live teacher, and what float16 costs with cached targets."""
    data = []
    for part, source in (("train", corpus.train), ("dev", corpus.dev)):
        cut_data(str(source), str(tmp_path / part), 0.3, RATE, "wav")
        data.append(tmp_path / part)
    collect_targets(teacher, [2, 3, 6], data, tmp_path / "cache")
    losses = {}
    for name in (str(teacher), str(tmp_path / "cache")):
        conf = dict(teacher=name, cnn_init=None, teacher_layers=layers)
        conf["target_norm"] = norm
        exp = tmp_path / f"exp{len(losses)}"
        arguments = training(exp, model_conf=conf, max_epoch=1, batch_type="sorted")
        point_to(data, arguments)
        main(arguments)
        losses[name] = teacher_loss(str(exp / "config.yaml"))
    live, cached = losses.values()
    first = "loss_layer3" if layers == [3, 6] else "loss_layer2_3"
    assert list(live) == ["loss", "loss_output", first, "loss_layer6"]
    assert set(live.values()) == {0.0}
    assert all(0 < value < 1e-4 for value in cached.values())
    sfm_teacher_loss.main(["--config", str(exp / "config.yaml")])
    assert "own loss on the student's input: loss=" in capsys.readouterr().out
