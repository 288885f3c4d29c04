import os
import shutil

import numpy as np
import pytest
import torch

from dldkit.asr import decode
from dldkit.asr.calibration import write_depth_profile
from dldkit.asr.inference import Speech2Text
from dldkit.bin.decode import main
from dldkit.depth.thresholds import read_thresholds
from dldkit.errors import UserError

MODEL = "valid.loss_ctc.ave.pth"
FILES = ["score", "text", "token", "token_int"]


@pytest.fixture
def jobs(monkeypatch):
    """Run the jobs one after the other, and remember them."""
    done = []

    def parallel_map(fn, items, *_):
        done.extend(str(log) for _, log in items)
        return [fn(item) for item in items]

    monkeypatch.setattr(decode, "parallel_map", parallel_map)
    return done


@pytest.fixture
def experiment(student, tmp_path):
    """A copy of the student, to be changed."""
    directory = tmp_path / "exp"
    directory.mkdir()
    shutil.copy(student / "config.yaml", directory)
    states = torch.load(student / MODEL, weights_only=True)
    states["ctc.ctc_lo.bias"][0] -= 5  # few epochs leave nothing but blanks
    torch.save(states, directory / MODEL)
    return directory


@pytest.fixture
def run(experiment, corpus, jobs):
    """Return a function that decodes and tells how many jobs that took."""

    def decoded(depths=(4, 2), sets=(corpus.dev, corpus.train), args=(), nj=1):
        before = len(jobs)
        decode.decode_depths(
            experiment / MODEL, sets, depths, experiment / "greedy", args, nj
        )
        return len(jobs) - before

    return decoded


def read(file):
    return dict(line.partition(" ")[::2] for line in file.read_text().splitlines())


def test_writes_a_directory_for_each_depth_and_set(run, experiment, corpus):
    assert run() == 4
    for depth in (4, 2):
        speech2text = Speech2Text(
            experiment / "config.yaml", experiment / MODEL, depth=depth
        )
        for name, utts in (("dev", "xyz"), ("train", "abcdefghi")):
            directory = experiment / "greedy" / f"depth{depth}" / name
            results = {file: read(directory / file) for file in FILES}
            for result in results.values():
                assert list(result) == list(utts)  # sorted
            by_length = sorted(utts, key=lambda utt: len(corpus.speech(utt)))
            decoded = speech2text([corpus.speech(utt) for utt in by_length])
            for utt, ((text, token, token_int, hypothesis),) in zip(by_length, decoded):
                assert results["text"][utt].strip() == text
                assert results["token"][utt].split() == token
                assert results["token_int"][utt].split() == list(map(str, token_int))
                score = float(results["score"][utt])
                assert score == pytest.approx(hypothesis.score, rel=1e-4)
            assert any(results["text"].values())
            (log,) = (directory / "logdir").glob("asr_inference.*.log")
            lines = log.read_text()
            assert lines.count("INFO: speech length: ") == len(utts)
            assert lines.count("INFO: best hypo: ") == len(utts)
            assert f"Encoder layers: {speech2text.asr_model.encoder.active_layers}" in (
                lines
            )


def test_a_second_run_decodes_nothing(run, experiment):
    run()
    texts = list(experiment.glob("greedy/*/*/text"))
    before = [text.stat().st_mtime_ns for text in texts]
    assert len(texts) == 4
    assert run() == 0
    assert [text.stat().st_mtime_ns for text in texts] == before


def test_just_what_is_missing_is_decoded(run, experiment, jobs):
    run(depths=[4])
    assert run(depths=[4, 2, 1]) == 4
    assert not any("depth4" in log for log in jobs[-4:])


def test_a_changed_model_is_decoded_again(run, experiment, student):
    run()
    before = (experiment / "greedy/depth4/dev/score").read_text()
    shutil.copy(student / "2epoch.pth", experiment / MODEL)
    assert run() == 4
    assert (experiment / "greedy/depth4/dev/score").read_text() != before


def test_other_options_a_profile_and_other_data_are_decoded_again(
    run, experiment, corpus, tmp_path
):
    data = tmp_path / "dev"
    shutil.copytree(corpus.dev, data)
    one = dict(depths=[2], sets=[data])
    assert run(**one) == 1
    assert run(**one, args=["--selector", "prefix"]) == 1
    assert run(**one, args=["--selector", "prefix"]) == 0
    assert run(**one) == 1
    write_depth_profile(experiment / MODEL, corpus.train, [2])
    before = (experiment / "greedy/depth2/dev/score").read_text()
    assert run(**one) == 1
    assert (experiment / "greedy/depth2/dev/score").read_text() != before
    scp = data / "wav.scp"
    scp.write_text(scp.read_text().partition("\n")[0] + "\n")
    assert run(**one) == 1
    os.utime(scp, ns=(0, 1))
    assert run(**one) == 0
    assert list(read(experiment / "greedy/depth2/dev/text")) == ["x"]


def test_what_a_config_says_counts_and_not_its_name(run, corpus, tmp_path):
    one = dict(depths=[2], sets=[corpus.dev])
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    files[0].write_text("beam_size: 2\nctc_weight: 1.0\nbatch_size: 1\n")
    assert run(**one, args=["--config", str(files[0])]) == 1
    shutil.copy(*files)
    assert run(**one, args=["--config", str(files[1])]) == 0
    files[1].write_text("beam_size: 3\nctc_weight: 1.0\nbatch_size: 1\n")
    assert run(**one, args=["--config", str(files[1])]) == 1


def test_an_interrupted_run_is_not_taken_for_a_complete_one(
    run, experiment, monkeypatch
):
    run(depths=[4])
    merge = decode.Decoding.merge
    monkeypatch.setattr(decode.Decoding, "merge", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(depths=[4, 2])
    monkeypatch.setattr(decode.Decoding, "merge", merge)
    assert run(depths=[4, 2]) == 2


def test_what_another_model_said_is_gone_while_it_is_decoded_again(
    run, experiment, student, monkeypatch
):
    """Else a report would mix both."""
    run(depths=[4])
    shutil.copy(student / "2epoch.pth", experiment / MODEL)
    monkeypatch.setattr(decode.Decoding, "merge", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(depths=[4])
    assert not list(experiment.glob("greedy/depth4/*/text"))


@pytest.mark.parametrize("nj", [2, 3, 8])
def test_parts_make_the_same_whole(run, experiment, corpus, nj):
    """Also when there are more jobs than utterances."""
    single = ["--batch_size", "1"]  # or padding would differ
    run(depths=[2], sets=[corpus.dev], args=single)
    whole = {f: (experiment / "greedy/depth2/dev" / f).read_text() for f in FILES}
    shutil.rmtree(experiment / "greedy")
    assert run(depths=[2], sets=[corpus.dev], args=single, nj=nj) > 1
    for file, content in whole.items():
        assert (experiment / "greedy/depth2/dev" / file).read_text() == content


@pytest.mark.parametrize("nj", [2, 5])
def test_parts_are_enough_for_all_jobs(run, corpus, nj):
    assert run(depths=[2], sets=[corpus.train], nj=nj) == nj


def test_beam_search(run, experiment, corpus):
    args = ["--beam_size", "3", "--ctc_weight", "1.0", "--batch_size", "1"]
    run(depths=[2], sets=[corpus.dev], args=args)
    speech2text = Speech2Text(
        experiment / "config.yaml",
        experiment / MODEL,
        depth=2,
        beam_size=3,
        ctc_weight=1.0,
    )
    text = read(experiment / "greedy/depth2/dev/text")
    assert text["x"].strip() == speech2text(corpus.speech("x"))[0][0]


def test_refuses_impossible_requests(run, corpus, tmp_path):
    with pytest.raises(UserError, match="depth 7"):
        run(depths=[7])
    with pytest.raises(UserError, match=f"{tmp_path} has neither wav.scp"):
        run(sets=[tmp_path])
    with pytest.raises(SystemExit):
        run(args=["--no_such_option", "1"])


def test_two_sets_of_one_name_do_not_wait_for_each_other(run, corpus, tmp_path):
    shutil.copytree(corpus.dev, tmp_path / corpus.dev.name)
    with pytest.raises(UserError, match=f"two of the sets .* called {corpus.dev.name}"):
        run(sets=[corpus.dev, tmp_path / corpus.dev.name])


def test_logging_is_left_as_it_was(run, caplog, corpus):
    import logging

    root = logging.getLogger()
    before = list(root.handlers), root.level
    run(depths=[2], sets=[corpus.dev])
    assert (root.handlers, root.level) == before


@pytest.fixture
def with_exits(build, tmp_path):
    """An untrained model with exits, of which CTC is sure here and there."""
    directory = tmp_path / "exits"
    model = build(
        directory=directory,
        encoder="ld_conformer",
        model="dld",
        encoder_conf=dict(depth_sampler="full", layer_choice="prefix", exits=1),
    )
    states = model.state_dict()
    states["ctc.ctc_lo.weight"] *= 8
    torch.save(states, directory / MODEL)
    return directory


class TestEarlyStopping:
    @pytest.fixture
    def run(self, with_exits, corpus, jobs):
        def decoded(thresholds, depths=(4, 3, 2), **options):
            before = len(jobs)
            decode.decode_depths(
                *(with_exits / MODEL, [corpus.train], depths, with_exits / "greedy"),
                exit_thresholds=thresholds,
                valid_dir=corpus.train,
                **options,
            )
            return len(jobs) - before

        return decoded

    def test_thresholds_have_directories_with_depths(self, run, with_exits, corpus):
        threshold = 0.3
        assert run([threshold, 0.0]) == 5
        assert read_thresholds(with_exits / "greedy") == [threshold, 0.0]
        speech2text = Speech2Text(with_exits / "config.yaml", with_exits / MODEL)
        by_length = sorted("abcdefghi", key=lambda utt: len(corpus.speech(utt)))
        decoded = speech2text([corpus.speech(u) for u in by_length], threshold)
        found = with_exits / "greedy/threshold0.3/train"
        assert list(read(found / "depth")) == list("abcdefghi")
        for utt, ((text, *_, hypothesis),) in zip(by_length, decoded):
            assert read(found / "text")[utt].strip() == text
            assert read(found / "depth")[utt] == str(hypothesis.depth)
        never = read(with_exits / "greedy/threshold0/train/text")
        assert never == read(with_exits / "greedy/depth4/train/text")
        assert not (with_exits / "greedy/depth4/train/depth").exists()

    def test_auto_thresholds_give_mean_depths_of_the_validation_set(
        self, run, with_exits
    ):
        assert run("auto") == 5  # depths 4 3 2, thresholds for 3 and 2
        thresholds = read_thresholds(with_exits / "greedy")
        assert len(thresholds) == 2
        for threshold, wanted in zip(thresholds, (2, 3)):
            depths = read(with_exits / f"greedy/threshold{threshold:g}/train/depth")
            assert np.mean(list(map(int, depths.values()))) == pytest.approx(
                wanted, abs=0.5
            )
        assert run("auto") == 0
        assert run([0.3]) == 1
        assert read_thresholds(with_exits / "greedy") == [0.3]
        assert run("auto") == 0  # they are chosen again, and decoded before
        assert read_thresholds(with_exits / "greedy") == thresholds
        assert run("none") == 0
        assert read_thresholds(with_exits / "greedy") == []

    def test_a_login_node_needs_no_gpu(self, run, with_exits, jobs, monkeypatch):
        """It chooses the thresholds; the jobs decode, and say what they lack."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(UserError, match="ngpu 1: no GPU"):
            run("auto", inference_args=["--ngpu", "1"], parallel_config="slurm.yaml")
        assert len(read_thresholds(with_exits / "greedy")) == 2
        assert len(jobs) == 5

    def test_what_can_not_stop_early_is_refused(self, run, experiment, corpus):
        with pytest.raises(UserError, match="beam_size 1"):
            run("auto", inference_args=["--beam_size", "3", "--ctc_weight", "1.0"])
        one = (experiment / MODEL, [corpus.dev], [2], experiment / "greedy")
        for asked in ("auto", [0.1]):
            with pytest.raises(UserError, match="needs a model with exits"):
                decode.decode_depths(*one, exit_thresholds=asked, valid_dir=corpus.dev)
        with pytest.raises(UserError, match="--valid_dir"):
            decode.decode_depths(*one, exit_thresholds="auto")


@pytest.mark.integration
def test_command_with_two_processes(experiment, corpus, capsys):
    command = ["--asr_exp", str(experiment), "--inference_asr_model", MODEL]
    command += ["--data_dirs", str(corpus.dev), str(corpus.train), "--depths", "4"]
    command += ["--inference_tag", "tag", "--nj", "2"]
    main([*command, "--inference_args", "--selector prefix --depth_profile none"])
    assert list(read(experiment / "tag/depth4/dev/text")) == list("xyz")
    assert list(read(experiment / "tag/depth4/train/text")) == list("abcdefghi")
    assert "Decoding: 100%" in capsys.readouterr().err


def test_command_says_what_is_wrong(experiment, corpus, capsys):
    command = ["--asr_exp", str(experiment), "--inference_asr_model", MODEL]
    command += ["--data_dirs", str(corpus.dev), "--inference_tag", "tag"]
    with pytest.raises(SystemExit) as stop:
        main([*command, "--depths", "5"])
    assert stop.value.code == 1
    assert "error: depth 5 is impossible" in capsys.readouterr().err
    main([*command, "--depths", "1", "--inference_args", "--batch_size 2"])
    assert (experiment / "tag/depth1/dev/text").is_file()
