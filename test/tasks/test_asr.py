import copy
import io
import os
import shutil
import sys
from pathlib import Path

import kaldiio
import numpy as np
import pytest
import soundfile
import torch
import yaml
from espnet2.bin import asr_train as espnet_train
from espnet2.train.dataset import DATA_TYPES

from dldkit.asr.collection import collect_posteriors
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


class RecordingArk(kaldiio.utils.LazyLoader):
    """Says which process reads."""

    record: Path

    def __getitem__(self, key):
        with open(self.record, "a") as file:
            file.write(f"{os.getpid()} {key}\n")
        return super().__getitem__(key)


class TestCachedPosteriors:
    @pytest.fixture(scope="class")
    def cache(self, corpus, static):
        """Return a function that gives the cached posteriors of `static`."""

        def directory(top_k=None):
            output = corpus.root / f"cache.{top_k}"
            collect_posteriors(static, [corpus.train, corpus.dev], output, top_k)
            return output

        return directory

    def first_epoch(self, directory):
        return load(directory / "checkpoint.pth")["reporter"]["stats"][1]

    def test_workers_read_them(
        self, corpus, cache, dld_training, static, tmp_path, monkeypatch
    ):
        record = tmp_path / "record"

        def load_recording(scp):
            arks = RecordingArk(kaldiio.load_mat)
            arks.update(line.split() for line in open(scp))
            arks.record = record
            return arks

        monkeypatch.setitem(DATA_TYPES["numpy_ark"], "func", load_recording)
        still = dict(
            encoder_conf=dict(dropout_rate=0.0),
            specaug=None,
            num_workers=1,
            max_epoch=1,
        )
        for name, reference in (("live", static), ("cached", cache())):
            conf = dict(reference=str(reference))
            main(dld_training(tmp_path / name, model_conf=conf, **still))
        live, cached = (self.first_epoch(tmp_path / n) for n in ("live", "cached"))
        for phase in ("train", "valid"):
            expected = pytest.approx(float(live[phase]["loss_kd"]), rel=0.01)
            assert float(cached[phase]["loss_kd"]) == expected
        pids, utts = zip(*(line.split() for line in record.read_text().splitlines()))
        assert str(os.getpid()) not in pids
        assert sorted(utts) == list("abcdefghixyz")

    def test_of_the_likeliest_tokens(
        self, corpus, static, cache, dld_training, tmp_path
    ):
        conf = dict(reference=str(cache(3)))
        main(dld_training(tmp_path / "exp", model_conf=conf, max_epoch=1))
        assert self.first_epoch(tmp_path / "exp")["valid"]["loss_kd"] > 0
        # it goes on with those that were collected again, elsewhere
        collect_posteriors(static, [corpus.train, corpus.dev], tmp_path / "new", 3)
        conf = dict(reference=str(tmp_path / "new"))
        main(dld_training(tmp_path / "exp", model_conf=conf, max_epoch=2))
        assert (tmp_path / "exp" / "2epoch.pth").is_file()

    def test_by_espnets_own_command(self, corpus, cache, dld_training, tmp_path):
        conf = dict(reference=str(cache()))
        command = dld_training(tmp_path / "exp", model_conf=conf, max_epoch=1)
        file = Path(command[1])
        config = yaml.safe_load(file.read_text())
        for part in ("train", "valid"):
            entry = [f"{cache()}/posteriors.scp", "posteriors", "numpy_ark"]
            config[f"{part}_data_path_and_name_and_type"].append(entry)
        file.write_text(yaml.safe_dump(config))
        espnet_train.main([*command, "--allow_variable_data_keys", "true"])
        assert self.first_epoch(tmp_path / "exp")["valid"]["loss_kd"] > 0

    def test_that_lack_an_utterance_are_refused(
        self, corpus, static, dld_training, tmp_path, capsys
    ):
        collect_posteriors(static, [corpus.dev], tmp_path / "cache")
        conf = dict(reference=str(tmp_path / "cache"))
        with pytest.raises(SystemExit):
            main(dld_training(tmp_path / "exp", model_conf=conf))
        last = capsys.readouterr().err.splitlines()[-1]
        assert "error: 9 of 12 utterances have no posteriors" in last
        assert not (tmp_path / "exp").exists()

    def test_of_other_audio_are_refused_in_one_line(
        self, corpus, static, dld_training, tmp_path, capsys
    ):
        """The student hears longer recordings than the reference did."""
        data = tmp_path / "data"
        shutil.copytree(corpus.train, data)
        soundfile.write(data / "c.wav", np.zeros(4000), 8000)
        scp = (corpus.train / "wav.scp").read_text()
        (data / "wav.scp").write_text(scp.replace(str(corpus.train), str(data)))
        collect_posteriors(static, [data, corpus.dev], tmp_path / "cache")
        conf = dict(reference=str(tmp_path / "cache"))
        with pytest.raises(SystemExit):
            main(dld_training(tmp_path / "exp", model_conf=conf, num_workers=1))
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("error: the reference ") and "(stage 9)" in last


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
