"""Real trainings in one directory: at once, again, with other data, and moved away."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from espnet2.bin import split_scps

from dldkit import step
from dldkit.asr.collection import collect_posteriors
from dldkit.asr.inference import Speech2Text
from dldkit.bin.asr_train import main
from dldkit.errors import UserError
from dldkit.step import Lock
from dldkit.tasks.asr import DLDASRTask
from dldkit.train.experiment import experiment

MODEL = "valid.loss_ctc.ave.pth"


def error_of(command, capsys):
    """Run the training and return its last line; it has to fail in one line."""
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    return last


@pytest.fixture
def begun(student, dld_training, tmp_path):
    """A copy of a finished experiment, and a function for its training's arguments."""
    directory = tmp_path / "exp"
    shutil.copytree(student, directory, symlinks=True)
    return directory, lambda **changes: dld_training(directory, **changes)


def epochs_of(directory):
    checkpoint = torch.load(directory / "checkpoint.pth", weights_only=True)
    return len(checkpoint["reporter"]["stats"])


class TestAgain:
    def test_what_is_finished_is_not_done_again(self, begun, caplog):
        directory, training = begun
        before = {f: f.stat().st_mtime_ns for f in directory.iterdir()}
        caplog.set_level("INFO")
        main(training(num_workers=1, log_interval=3))
        assert "is finished already" in caplog.text
        after = {f: f.stat().st_mtime_ns for f in directory.iterdir()}
        assert after == before

    def test_more_epochs_go_on_and_say_so(self, begun, caplog):
        directory, training = begun
        main(training(max_epoch=4))
        assert epochs_of(directory) == 4
        assert "changed: max_epoch: 3 -> 4" in caplog.text

    def test_other_options_for_what_has_ended_are_refused(self, begun, capsys):
        """Its config would say that it was trained with them."""
        directory, training = begun
        before = (directory / "config.yaml").read_bytes()
        for changes in (
            dict(optim_conf=dict(lr=0.5)),
            dict(encoder_conf=dict(keep_prob=0.9)),
            dict(max_epoch=2),
        ):
            last = error_of(training(**changes), capsys)
            assert (
                f"{directory}: this training has ended, and {min(changes)} is" in last
            )
        assert (directory / "config.yaml").read_bytes() == before
        main(training(keep_nbest_models=1, model_conf=dict(valid_depths=[4])))
        main(training(optim_conf=dict(lr=0.5), max_epoch=4))
        assert epochs_of(directory) == 4

    def test_early_stopping_is_an_end(self, corpus, tmp_path):
        """ESPnet's own would train one epoch more each time."""
        command = corpus.training(
            tmp_path / "exp", max_epoch=9, patience=0, optim_conf=dict(lr=0.0)
        )
        main(command)
        stopped = epochs_of(tmp_path / "exp")
        assert stopped < 9
        main(command)
        assert epochs_of(tmp_path / "exp") == stopped

    @pytest.mark.parametrize("name", ["wav.scp", "text", "tokens.txt"])
    def test_other_data_are_refused(self, begun, corpus, tmp_path, capsys, name):
        directory, training = begun
        other = tmp_path / "other"
        shutil.copytree(corpus.root / "train", other)
        shutil.copy(corpus.tokens, other)
        lines = (other / name).read_text().splitlines()
        (other / name).write_text("\n".join([lines[-1], *lines[:-1]]) + "\n")
        changes = dict(token_list=str(other / "tokens.txt"))
        options = training(max_epoch=5, **changes)
        table = dict(zip(options[::2], options[1::2]))
        config = yaml.safe_load(open(table["--config"]))
        for entry in config["train_data_path_and_name_and_type"]:
            entry[0] = entry[0].replace(str(corpus.train), str(other))
        with open(table["--config"], "w") as file:
            yaml.safe_dump(config, file)
        last = error_of(options, capsys)
        assert f"{directory} was begun with other input: " in last
        assert epochs_of(directory) == 3

    def test_another_reference_is_refused(self, static, dld_training, tmp_path, capsys):
        """One that was trained on, in the same place, and the same one cached."""
        reference, directory = tmp_path / "reference", tmp_path / "exp"
        shutil.copytree(static, reference)
        conf = dict(reference=str(reference))
        main(dld_training(directory, model_conf=conf, max_epoch=1))
        checkpoint = reference / "valid.loss_ctc.ave.pth"
        states = torch.load(checkpoint, weights_only=True)
        states["ctc.ctc_lo.bias"][0] += 1
        checkpoint.unlink()
        torch.save(states, checkpoint)
        command = dld_training(directory, model_conf=conf, max_epoch=2)
        last = error_of(command, capsys)
        assert last.endswith(
            "was begun with other input: reference. Remove it, or choose another "
            "directory"
        )
        assert epochs_of(directory) == 1
        shutil.rmtree(reference)
        shutil.copytree(static, reference)
        main(command)
        assert epochs_of(directory) == 2

    def test_the_first_versions_experiments_go_on(self, begun):
        """They have no record, or one of another form."""
        directory, training = begun
        (directory / ".done").write_text("0123456789abcdef\n")
        main(training(max_epoch=4))
        assert epochs_of(directory) == 4


def test_data_in_splits(corpus, static, tmp_path, monkeypatch, capsys):
    """As ESPnet's --num_splits_asr gives them to training."""
    command = corpus.training(
        tmp_path / "exp", max_epoch=1, encoder="ld_conformer", model="dld"
    )
    config = yaml.safe_load(open(command[1]))
    entries = config["train_data_path_and_name_and_type"]
    tables = [entry[0] for entry in entries] + config["train_shape_file"]
    arguments = ["--scps", *tables, "--num_splits", "2"]
    split_scps.main([*arguments, "--output_dir", str(tmp_path / "splits")])
    for entry in entries:
        entry[0] = str(tmp_path / "splits" / os.path.basename(entry[0]))
    config["train_shape_file"] = [f"{tmp_path}/splits/utt2num_samples"]
    config["multiple_iterator"] = True
    with open(command[1], "w") as file:
        yaml.safe_dump(config, file)
    main(command)
    done = json.loads((tmp_path / "exp" / ".done").read_text())
    assert {"train speech (sound) split.0", "train text (text) split.1"} <= set(
        done["files"]
    )
    collect_posteriors(static, [corpus.train, corpus.dev], tmp_path / "cache")
    command += ["--model_conf", f"reference={tmp_path}/cache"]
    assert "can not be split for multiple_iterator" in error_of(command, capsys)


def test_statistics_are_shared_and_collected_once(corpus, tmp_path, caplog):
    """By systems that differ in their encoder, but not by other frontends."""
    stats = tmp_path / "stats"

    def collect(**changes):
        command = corpus.training(stats, **changes)
        main([*command, "--collect_stats", "true", "--specaug", "none"])
        return (stats / "train" / "feats_stats.npz").stat().st_mtime_ns

    first = collect()
    caplog.set_level("INFO")
    assert collect(encoder="ld_conformer", max_epoch=7, seed=9) == first
    assert "is finished already" in caplog.text
    assert collect(frontend_conf=dict(n_mels=10)) > first
    assert np.load(stats / "train" / "feats_stats.npz")["sum"].shape == (10,)


@pytest.mark.integration
def test_two_jobs_in_one_directory(corpus, tmp_path):
    """One trains, the other waits and uses what it made; both end well."""
    exp = tmp_path / "exp"
    command = [sys.executable, "-m", "dldkit.bin.asr_train"]
    command += corpus.training(exp, max_epoch=20)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as `python` has it
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    with Lock(exp / ".lock"):  # so that both want it at once, however slow they start
        jobs = []
        for log in logs:
            with open(log, "w") as stderr:
                jobs.append(subprocess.Popen(command, stderr=stderr, env=environment))
        while not all(f"process {os.getpid()}" in log.read_text() for log in logs):
            assert [job.poll() for job in jobs] == [None, None]
            time.sleep(0.1)
    assert [job.wait(240) for job in jobs] == [0, 0]
    texts = [log.read_text() for log in logs]
    trained = ["1epoch results" in text for text in texts]
    assert sorted(trained) == [False, True]
    waiting = texts[trained.index(False)]
    holder = jobs[trained.index(True)].pid
    assert f"is in use by process {holder}" in waiting
    assert "is finished already" in waiting
    alone = tmp_path / "alone"
    main(corpus.training(alone, max_epoch=20))
    for key, value in torch.load(alone / MODEL).items():
        assert torch.equal(value, torch.load(exp / MODEL)[key])


@pytest.mark.integration
def test_a_killed_job_leaves_no_lock(corpus, tmp_path):
    command = corpus.training(tmp_path / "exp", max_epoch=200)
    job = subprocess.Popen([sys.executable, "-m", "dldkit.bin.asr_train", *command])
    while not (tmp_path / "exp" / "1epoch.pth").exists():
        assert job.poll() is None
        time.sleep(0.1)
    holder = json.loads((tmp_path / "exp" / ".lock").read_text())
    assert holder["pid"] == job.pid
    job.kill()
    job.wait()
    main(corpus.training(tmp_path / "exp", max_epoch=1))


class TestByItself:
    """An experiment needs nothing but its directory."""

    @pytest.fixture
    def moved(self, corpus, tmp_path):
        """Trained with statistics; then all that it was made from is gone."""
        stats, exp = tmp_path / "stats", tmp_path / "exp"
        main([*corpus.training(stats), "--collect_stats", "true"])
        tokens = tmp_path / "list.txt"
        shutil.copy(corpus.tokens, tokens)
        main(
            corpus.training(
                exp,
                encoder="ld_conformer",
                normalize="global_mvn",
                normalize_conf=dict(stats_file=str(stats / "train/feats_stats.npz")),
                token_list=str(tokens),
                max_epoch=1,
            )
        )
        speech = corpus.speech("c")
        expected = Speech2Text(exp / "config.yaml", exp / MODEL)(speech)[0]
        there = tmp_path / "another disk" / "exp"
        shutil.copytree(exp, there, symlinks=True)
        for directory in (stats, exp):
            shutil.rmtree(directory)
        tokens.unlink()
        return there, speech, expected

    def test_names_its_files_bare(self, moved):
        there, *_ = moved
        config = yaml.safe_load(open(there / "config.yaml"))
        assert config["normalize_conf"]["stats_file"] == "feats_stats.npz"
        assert (there / "feats_stats.npz").is_file()
        assert (there / "tokens.txt").is_file()

    def test_recognises_after_a_move(self, moved, monkeypatch, tmp_path):
        there, speech, expected = moved
        monkeypatch.chdir(tmp_path)
        found = Speech2Text(there / "config.yaml", there / MODEL)(speech)[0]
        assert found[2] == expected[2] and found[3].score == expected[3].score

    def test_is_loaded_by_espnets_command(self, moved, corpus, python, tmp_path):
        there, *_ = moved
        python(
            *("-m", "dldkit", "-m", "espnet2.bin.asr_inference"),
            *("--output_dir", tmp_path / "out", "--ctc_weight", "1.0"),
            *("--asr_train_config", there / "config.yaml"),
            *("--asr_model_file", there / MODEL, "--beam_size", "2"),
            *("--data_path_and_name_and_type", f"{corpus.dev}/wav.scp,speech,sound"),
            cwd=tmp_path,
        )
        found = (tmp_path / "out" / "1best_recog" / "text").read_text()
        assert len(found.splitlines()) == 3

    def test_other_statistics_do_not_spoil_it(self, moved, tmp_path, monkeypatch):
        there, speech, expected = moved
        monkeypatch.chdir(tmp_path)
        np.savez("feats_stats.npz", count=1, sum=np.ones(3), sum_square=np.ones(3))
        found = Speech2Text(there / "config.yaml", there / MODEL)(speech)[0]
        assert found[3].score == expected[3].score

    def test_missing_statistics_are_named(self, moved, tmp_path, monkeypatch):
        there, *_ = moved
        (there / "feats_stats.npz").unlink()
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match="feats_stats.npz as its normalize_conf"):
            Speech2Text(there / "config.yaml", there / MODEL)


class TestRefusals:
    def test_several_gpus_in_one_process(self, corpus, tmp_path, capsys):
        command = [*corpus.training(tmp_path / "exp"), "--ngpu", "4"]
        last = error_of(command, capsys)
        assert "--ngpu 4" in last and "--multiprocessing_distributed true" in last
        assert not (tmp_path / "exp").exists()

    def test_a_file_in_the_way(self, corpus, tmp_path, capsys):
        command = corpus.training(tmp_path / "exp")
        (tmp_path / "exp").touch()
        assert "is a file" in error_of(command, capsys)

    def test_a_config_that_is_no_yaml(self, tmp_path, capsys):
        (tmp_path / "c.yaml").write_text("encoder: [ld_conformer\nmax_epoch: }")
        command = ["--config", str(tmp_path / "c.yaml"), "--output_dir", str(tmp_path)]
        assert "no YAML" in error_of(command, capsys)

    @pytest.mark.parametrize(
        "content, words", [("", "is empty"), ("a /no/such.wav\n", "does not exist")]
    )
    def test_speech_that_is_not_there(
        self, corpus, tmp_path, capsys, monkeypatch, content, words
    ):
        (tmp_path / "wav.scp").write_text(content)
        options = corpus.training(tmp_path / "exp")
        file = tmp_path / "exp.yaml"
        file.write_text(
            file.read_text().replace(f"{corpus.train}/wav.scp", f"{tmp_path}/wav.scp")
        )
        last = error_of(options, capsys)
        assert f"{tmp_path}/wav.scp" in last and words in last

    def test_another_node_does_not_wait(self, corpus, tmp_path, monkeypatch):
        """The others of its job would time out without a word."""
        command = corpus.training(tmp_path / "exp", dist_backend="gloo")
        args = DLDASRTask.get_parser().parse_args(command)
        args.dist_world_size, args.dist_rank = 2, 0
        monkeypatch.setattr(step, "HEARTBEAT", 0.3)
        with experiment(DLDASRTask.get_parser().parse_args(command)):
            with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
                with experiment(args):
                    pass
            args.dist_rank = 1  # the first one holds it for all
            with experiment(args) as is_to_be_done:
                assert is_to_be_done
        with experiment(args) as is_to_be_done:  # nor waits for one that is done
            assert not is_to_be_done

    def test_tasks_that_srun_has_not_started(self, corpus, tmp_path, monkeypatch):
        command = corpus.training(tmp_path / "exp", dist_launcher="slurm")
        args = DLDASRTask.get_parser().parse_args(command)
        monkeypatch.delenv("SLURM_PROCID", raising=False)
        with pytest.raises(UserError, match="tasks that srun has started"):
            with experiment(args):
                pass
