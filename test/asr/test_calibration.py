import logging
import shutil
import subprocess
import sys

import kaldiio
import numpy as np
import pytest
import soundfile
import torch
import yaml

from dldkit.asr import calibration
from dldkit.asr.calibration import write_depth_profile
from dldkit.asr.inference import Speech2Text
from dldkit.asr.loading import load_asr_model
from dldkit.bin.calibrate import main
from dldkit.depth.profile import DepthProfile, profile_path
from dldkit.depth.statistics import batch_norms
from dldkit.errors import UserError

MODEL = "valid.loss_ctc.ave.pth"


@pytest.fixture
def model(student, tmp_path):
    """A copy of the student's checkpoint, which has no profile yet."""
    directory = tmp_path / "exp"
    shutil.copytree(student, directory, symlinks=True)
    return directory / MODEL


def calibrate(model, data_dir, depths=(4, 2), **options):
    """Return what the profile has: by layers."""
    write_depth_profile(model, data_dir, depths, **options)
    return DepthProfile.load(profile_path(model)).depths


def direct_statistics(checkpoint, layers, speech, batch_size):
    """What enters each BatchNorm, collected with hooks and reduced in numpy.

    Batches of similar length, cut to the shortest, hold no padding.
    """
    model, _ = load_asr_model(checkpoint)
    model.encoder.set_depth(layers=layers)
    inputs = {}
    for name, norm in model.encoder.named_modules():
        if isinstance(norm, torch.nn.BatchNorm1d):
            norm.train()  # normalises by the statistics of the batch
            norm.register_forward_pre_hook(
                lambda _, x, name=name: inputs.setdefault(name, []).append(x[0].numpy())
            )
    speech = sorted(speech, key=len)
    for start in range(0, len(speech), batch_size):
        batch = speech[start : start + batch_size]
        length = min(map(len, batch))
        batch = torch.from_numpy(np.stack([samples[:length] for samples in batch]))
        with torch.no_grad():
            model.encode(batch, torch.full((len(batch),), length))
    frames = {
        name: np.concatenate(
            [x.transpose(0, 2, 1).reshape(-1, x.shape[1]).astype(float) for x in xs]
        )
        for name, xs in inputs.items()
    }
    return {name: (x.mean(0), x.var(0, ddof=1)) for name, x in frames.items()}


ALL, ENDS = (0, 1, 2, 3), (0, 3)
NORM = "encoders.0.conv_module.norm"


@pytest.fixture
def unlabelled(corpus, tmp_path):
    """The training speech, without transcripts."""
    directory = tmp_path / "unlabelled"
    directory.mkdir()
    shutil.copy(corpus.train / "wav.scp", directory)
    return directory


@pytest.mark.parametrize("batch_size", [1, 3])
def test_statistics_against_a_direct_computation(model, corpus, unlabelled, batch_size):
    depths = calibrate(model, unlabelled, batch_size=batch_size)
    assert set(depths) == {ALL, ENDS}
    speech = [corpus.speech(utt) for utt in "abcdefghi"]
    for layers, depth in depths.items():
        expected = direct_statistics(model, layers, speech, batch_size)
        assert depth.statistics.keys() == expected.keys()
        for name, (mean, variance) in expected.items():
            result = depth.statistics[name]
            assert np.allclose(result[0], mean, atol=1e-5)
            assert np.allclose(result[1], variance, rtol=1e-4)


@pytest.mark.parametrize("normalize", ["global_mvn", "utterance_mvn"])
def test_features_are_the_same_for_every_depth(build, corpus, tmp_path, normalize):
    """ESPnet normalises in place, but batches serve several depths: each as it is."""
    data, stats = tmp_path / "data", tmp_path / "stats.npz"
    data.mkdir()
    rng = np.random.default_rng(0)
    feats = {f"u{i}": 5 + 3 * rng.standard_normal((40 + i, 20)) for i in range(6)}
    ark, scp = data / "feats.ark", data / "feats.scp"
    with kaldiio.WriteHelper(f"ark,scp:{ark},{scp}") as writer:
        for utt, matrix in feats.items():
            writer(utt, matrix.astype(np.float32))
    frames = np.concatenate(list(feats.values()))
    total, square = frames.sum(0), (frames**2).sum(0)
    np.savez(stats, count=len(frames), sum=total, sum_square=square)
    conf = {"stats_file": str(stats)} if normalize == "global_mvn" else {}
    build(
        directory=tmp_path / "exp",
        encoder="ld_conformer",
        input_size=20,
        frontend=None,
        normalize=normalize,
        normalize_conf=conf,
    )
    model = tmp_path / "exp" / "valid.loss_ctc.best.pth"
    together = calibrate(model, data, depths=(4, 3, 2))
    profile_path(model).unlink()
    for layers, depth in together.items():
        alone = calibrate(model, data, depths=[len(layers)])[layers]
        profile_path(model).unlink()
        assert depth.statistics.keys() == alone.statistics.keys()
        for name, (mean, variance) in depth.statistics.items():
            assert torch.equal(mean, alone.statistics[name][0])
            assert torch.equal(variance, alone.statistics[name][1])


def test_statistics_differ_from_the_checkpoints_and_between_depths(model, unlabelled):
    depths = calibrate(model, unlabelled)
    states = torch.load(model, weights_only=True)
    name = "encoders.3.conv_module.norm"
    means = [states[f"encoder.{name}.running_mean"]]
    means += [depths[layers].statistics[name][0] for layers in (ALL, ENDS)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (means[a] - means[b]).abs().max() > 1e-3


def mean(depths, layers=ENDS):
    return depths[layers].statistics[NORM][0]


def test_draws_some_utterances_always_the_same(model, unlabelled):
    some = calibrate(model, unlabelled, num_utts=3)
    profile_path(model).unlink()
    again = calibrate(model, unlabelled, num_utts=3)
    assert torch.equal(mean(some), mean(again))
    other = calibrate(model, unlabelled, num_utts=3, seed=1)
    assert not torch.equal(mean(some), mean(other))


def test_checkpoint_is_not_touched(model, corpus):
    files = [f for f in model.parent.glob("*.*") if f.suffix != ".lock"]
    before = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in files}
    calibrate(model, corpus.train)
    assert {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in files} == before


class TestJudgement:
    """Transcripts tell whether statistics are an improvement."""

    @pytest.fixture
    def many(self, corpus, tmp_path):
        """Nine utterances to calibrate on, and more of their kind to judge on."""
        directory = tmp_path / "many"
        directory.mkdir()
        for name in ("wav.scp", "text"):
            lines = (corpus.train / name).read_text().splitlines()
            lines = [f"{i}{line}\n" for i in range(3) for line in lines]
            (directory / name).write_text("".join(lines))
        return directory

    def test_helpful_statistics_are_taken(self, model, many, spoil):
        spoil(model)  # the checkpoint's are useless
        depths = calibrate(model, many, num_utts=9)
        for depth in depths.values():
            before, after = depth.ctc_loss
            assert after < before and depth.statistics

    def test_harmful_statistics_are_refused(self, model, many, caplog, monkeypatch):
        def nonsense(encoder, layers, batches, forward):
            return {
                name: (norm.running_mean + 30, norm.running_var * 100)
                for name, norm in batch_norms(encoder).items()
            }

        monkeypatch.setattr("dldkit.asr.calibration.estimate", nonsense)
        depths = calibrate(model, many, num_utts=9)
        for depth in depths.values():
            before, after = depth.ctc_loss
            assert after > before and not depth.statistics
        assert "make the model worse and are refused" in caplog.text
        files = model.parent / "config.yaml", model
        plain = Speech2Text(*files, depth=2, depth_profile=None)
        speech = np.random.default_rng(0).standard_normal(8000).astype(np.float32)
        calibrated = Speech2Text(*files, depth=2)
        assert plain(speech)[0][3].score == calibrated(speech)[0][3].score

    def test_transcripts_that_fit_no_speech_judge_nothing(self, model, many, caplog):
        utts = [line.split()[0] for line in open(many / "text")]
        (many / "text").write_text("".join(f"{u}{' one' * 999}\n" for u in utts))
        for depth in calibrate(model, many, num_utts=9).values():
            assert depth.statistics and depth.ctc_loss is None
        assert "the estimated statistics are not judged" in caplog.text

    def test_a_tenth_judges_where_one_utterance_is_left(self, many):
        sample, held_back = calibration._draw(many, num_utts=26, seed=0)
        assert (len(sample), len(held_back)) == (24, 2)

    def test_losses_are_those_of_utterances_that_were_not_used(
        self, model, many, monkeypatch
    ):
        """Computed here with stock torch, one utterance at a time."""
        chosen = []
        read = calibration._read
        monkeypatch.setattr(
            calibration,
            "_read",
            lambda *args: chosen.append(args[-1]) or read(*args),
        )
        depths = calibrate(model, many, depths=[2], num_utts=9)
        sample, held_back = chosen
        assert len(sample) == 9 and not set(sample) & set(held_back)
        asr_model, _ = load_asr_model(model)
        texts = dict(line.split(maxsplit=1) for line in open(many / "text"))
        wavs = dict(line.split() for line in open(many / "wav.scp"))
        tokens = (many.parent / "exp" / "config.yaml").read_text()
        tokens = yaml.safe_load(tokens)["token_list"]
        losses = []
        with torch.no_grad(), asr_model.encoder.running(ENDS):
            for utt in held_back:
                speech = torch.from_numpy(soundfile.read(wavs[utt], dtype="float32")[0])
                encoded, lengths = asr_model.encode(
                    speech[None], torch.tensor([len(speech)])
                )
                text = torch.tensor([[tokens.index(w) for w in texts[utt].split()]])
                losses.append(
                    torch.nn.functional.ctc_loss(
                        asr_model.ctc.ctc_lo(encoded).log_softmax(-1).transpose(0, 1),
                        text,
                        lengths,
                        torch.tensor([text.size(1)]),
                        reduction="sum",
                    ).item()
                )
        assert depths[ENDS].ctc_loss[0] == pytest.approx(np.mean(losses), rel=1e-4)


@pytest.fixture
def spoil():
    """Return a function that makes the running statistics of a checkpoint useless."""

    def change(checkpoint):
        states = torch.load(checkpoint, weights_only=True)
        for key in states:
            if key.endswith("running_mean"):
                states[key] = states[key] + 20
        checkpoint.unlink()
        torch.save(states, checkpoint)

    return change


class TestProfile:
    """What is kept, added and made anew."""

    def test_prefix(self, model, unlabelled):
        assert set(calibrate(model, unlabelled, selector="prefix")) == {ALL, (0, 1)}

    def test_depths_are_added(self, model, unlabelled):
        calibrate(model, unlabelled)
        depths = calibrate(model, unlabelled, depths=[3])
        assert set(depths) == {ALL, ENDS, (0, 2, 3)}
        depths = calibrate(model, unlabelled, selector="prefix")
        assert set(depths) == {ALL, ENDS, (0, 2, 3), (0, 1)}
        assert depths[(0, 1)].selector == "prefix" and depths[ENDS].selector == "even"

    def test_what_is_up_to_date_is_kept(self, model, unlabelled):
        calibrate(model, unlabelled)
        stamp = profile_path(model).stat().st_mtime_ns
        (unlabelled / "wav.scp").touch()
        calibrate(model, unlabelled)
        assert profile_path(model).stat().st_mtime_ns == stamp

    @pytest.mark.parametrize(
        "changes", [dict(seed=1), dict(num_utts=4), dict(batch_size=2), "data"]
    )
    def test_other_data_or_options_make_it_anew(self, model, unlabelled, changes):
        before = calibrate(model, unlabelled, num_utts=7)
        if changes == "data":
            lines = (unlabelled / "wav.scp").read_text().splitlines()[:5]
            (unlabelled / "wav.scp").write_text("\n".join(lines) + "\n")
            changes = {}
        after = calibrate(model, unlabelled, depths=[2], **{"num_utts": 7, **changes})
        assert not torch.equal(mean(before), mean(after))
        assert torch.equal(mean(before, ALL), mean(after, ALL))  # was not asked for

    def test_other_weights_make_it_anew(self, model, unlabelled):
        before = calibrate(model, unlabelled)
        states = torch.load(model, weights_only=True)
        name = next(
            n for n in states if n.startswith("encoder.encoders.0.feed_forward_macaron")
        )
        states[name] *= torch.linspace(0, 2, states[name].size(-1))
        torch.save(states, model)
        after = calibrate(model, unlabelled, depths=[2])
        assert set(after) == {ENDS}
        assert not torch.equal(mean(before), mean(after))

    def test_cut_off_one_is_made_anew(self, model, unlabelled):
        profile_path(model).write_text("a profile that was cut off")
        assert set(calibrate(model, unlabelled)) == {ALL, ENDS}

    def test_two_jobs_at_once_lose_nothing(self, model, unlabelled):
        command = [sys.executable, "-m", "dldkit.bin.calibrate"]
        command += ["--asr_model_file", str(model), "--data_dir", str(unlabelled)]
        jobs = [subprocess.Popen([*command, "--depths", str(d)]) for d in (4, 2)]
        assert [job.wait() for job in jobs] == [0, 0]
        assert set(DepthProfile.load(profile_path(model)).depths) == {ALL, ENDS}


def test_a_short_utterance_does_not_stop_it(model, unlabelled, caplog):
    soundfile.write(unlabelled / "short.wav", np.zeros(300), 8000)
    with open(unlabelled / "wav.scp", "a") as scp:
        scp.write(f"short {unlabelled / 'short.wav'}\n")
    assert set(calibrate(model, unlabelled)) == {ALL, ENDS}
    assert "left out: ['short']" in caplog.text
    (unlabelled / "wav.scp").write_text(f"short {unlabelled / 'short.wav'}\n")
    with pytest.raises(UserError, match="all of 1 utterances are too short"):
        calibrate(model, unlabelled)


def test_depths_that_are_not_there_are_left_out(model, unlabelled):
    assert set(calibrate(model, unlabelled, depths=(12, 4, 2))) == {ALL, ENDS}
    with pytest.raises(UserError, match=r"none of the depths \[12, 8\] fits 4 layers"):
        calibrate(model, unlabelled, depths=(12, 8))
    with pytest.raises(UserError, match="depth 0"):
        calibrate(model, unlabelled, depths=(2, 0))


def test_a_model_without_batch_norm_gets_none_and_works(
    build, corpus, tmp_path, caplog
):
    build(directory=tmp_path / "exp", encoder="ld_transformer", encoder_conf=PLAIN)
    caplog.set_level(logging.INFO)
    checkpoint = tmp_path / "exp" / "valid.loss_ctc.best.pth"
    write_depth_profile(checkpoint, corpus.train, [4, 2])
    assert not profile_path(checkpoint).exists()
    assert "no BatchNorm" in caplog.text
    model, _ = load_asr_model(checkpoint)
    model.encoder.set_depth(2)
    assert model.encoder.active_layers == (0, 3)


PLAIN = dict(cnn_module_kernel=None, macaron_style=None)


def test_refuses_a_model_of_fixed_depth(static, corpus):
    with pytest.raises(
        UserError, match="ConformerEncoder has no run-time depth: train with"
    ):
        calibrate(static / MODEL, corpus.train)


def test_command(model, corpus, capsys):
    command = ["--asr_model_file", str(model), "--data_dir", str(corpus.train)]
    main([*command, "--depths", "4 3", "--num_utts", "2", "--selector", "prefix"])
    assert set(DepthProfile.load(profile_path(model)).depths) == {ALL, (0, 1, 2)}
    assert "Calibrating depths" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([*command, "--depths", "9"])
    assert stop.value.code == 1
    assert "error: none of the depths [9] fits 4 layers" in capsys.readouterr().err
