import copy
import io
import shutil
import sys

import numpy as np
import pytest
import torch
import yaml
from espnet2.bin import asr_train as espnet_train

from dldkit.bin.asr_train import main
from dldkit.tasks.asr import DLDASRTask


def load(file):
    return torch.load(file, weights_only=True)


def test_average_of_the_best_epochs(student, build):
    """Plain averages of all weights, under the names of ESPnet's own model."""
    epochs = [load(student / f"{n}epoch.pth") for n in (2, 3)]
    average = load(student / "valid.loss_ctc.ave.pth")
    assert any(not torch.equal(epochs[0][key], epochs[1][key]) for key in average)
    for key, value in average.items():
        total = epochs[0][key].double() + epochs[1][key].double()
        if value.dtype == torch.int64:
            assert torch.equal(value.double(), total), key  # ESPnet adds counters
        else:
            assert torch.allclose(value.double(), total / 2, atol=1e-6), key
    espnet = build(encoder="conformer")
    assert list(average) == list(espnet.state_dict())
    espnet.load_state_dict(average)


def test_training_reports_its_curves(student):
    epochs = load(student / "checkpoint.pth")["reporter"]["stats"]
    assert len(epochs) == 3
    for epoch in epochs.values():
        for phase in ("train", "valid"):
            for name in ("loss", "loss_ctc", "loss_kd", "depth"):
                assert np.isfinite(epoch[phase][name]), (phase, name)
        assert epoch["valid"]["depth"] == 4
    depths = [epoch["train"]["depth"] for epoch in epochs.values()]
    assert all(1 <= depth <= 4 for depth in depths) and min(depths) < 4


def test_init_param_takes_the_weights_of_espnets_model(
    static, dld_training, tmp_path, build, batch
):
    """One epoch without learning: what was loaded is what comes out."""
    checkpoint = static / "valid.loss_ctc.ave.pth"
    command = dld_training(
        tmp_path / "exp",
        init_param=[str(checkpoint)],
        optim="sgd",
        optim_conf=dict(lr=0.0),
        scheduler=None,
        max_epoch=1,
    )
    main(command)
    started, ended = load(checkpoint), load(tmp_path / "exp" / "1epoch.pth")
    for key, value in started.items():
        if "running_" not in key and "num_batches" not in key:
            assert torch.equal(ended[key], value), key


def test_print_config_shows_our_options(monkeypatch):
    argv = ["--print_config", "--encoder", "ld_conformer", "--model", "dld"]
    monkeypatch.setattr(sys, "argv", ["asr_train", *argv])
    output = io.StringIO()
    DLDASRTask.print_config(output)
    config = yaml.safe_load(output.getvalue())
    ours = dict(
        depth_sampler="bernoulli", keep_prob=0.5, min_depth=1, keep_final_norm=False
    )
    assert ours.items() <= config["encoder_conf"].items()
    assert "cnn_module_kernel" in config["encoder_conf"]  # ESPnet's own
    ours = dict(
        kd_weight=1.0,
        kd_temperature=1.0,
        kd_direction="forward",
        kd_reduction="utterance",
        reference=None,
    )
    assert ours.items() <= config["model_conf"].items()
    assert config["model_conf"]["ctc_weight"] == 0.5


@pytest.mark.parametrize("name", ["transformer", "branchformer", "e_branchformer"])
def test_dry_run_of_the_other_encoders(corpus, tmp_path, name):
    conf = dict(output_size=8, attention_heads=2, num_blocks=2, keep_prob=0.3)
    config = copy.deepcopy(corpus.config["encoder_conf"])
    command = corpus.training(
        tmp_path / "exp",
        encoder=f"ld_{name}",
        encoder_conf={**dict.fromkeys(config), **conf},
        dry_run=True,
    )
    main(command)
    stored = yaml.safe_load((tmp_path / "exp" / "config.yaml").read_text())
    assert stored["encoder"] == f"ld_{name}"
    assert stored["encoder_conf"] == conf


def test_collect_stats_works_without_the_reference(dld_training, tmp_path, corpus):
    command = dld_training(
        tmp_path / "stats",
        model_conf=dict(reference=str(tmp_path / "gone")),
        collect_stats=True,
        batch_type="unsorted",
    )
    main(command)
    for part, utts in (("train", 9), ("valid", 3)):
        shapes = (tmp_path / "stats" / part / "speech_shape").read_text().splitlines()
        assert len(shapes) == utts
        stats = np.load(tmp_path / "stats" / part / "feats_stats.npz")
        samples = [len(corpus.speech(line.split()[0])) for line in shapes]
        assert stats["count"] == sum(n // 128 + 1 for n in samples)


def test_a_user_error_is_one_line(dld_training, tmp_path, capsys):
    for changes, message in (
        (dict(encoder_conf=dict(keep_prob=2.0)), "keep_prob 2.0"),
        (dict(specaug_conf=dict(apply_time_warp=True)), "apply_time_warp: false"),
        (dict(model_conf=dict(reference="/not/there")), "no /not/there"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(dld_training(tmp_path / "exp", **changes))
        assert stop.value.code == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("error: ") and message in last
        shutil.rmtree(tmp_path / "exp", ignore_errors=True)


def test_has_espnets_options_and_a_choice_of_trainers():
    ours, theirs = DLDASRTask.get_parser(), espnet_train.get_parser()
    options = [
        {o for a in p._actions for o in a.option_strings} for p in (ours, theirs)
    ]
    assert options[0] - options[1] == {"--trainer", "--trainer_conf"}
    assert options[1] <= options[0]
    assert ours.get_default("trainer") == "resumable"
