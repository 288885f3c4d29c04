import logging

import numpy as np
import pytest
import torch

from dldkit.asr.calibration import write_depth_profile
from dldkit.asr.loading import load_asr_model
from dldkit.bin.calibrate import main
from dldkit.depth.profile import DepthProfile
from dldkit.errors import UserError

MODEL = "valid.loss_ctc.ave.pth"


def calibrate(student, corpus, output, depths=(4, 2), **options):
    write_depth_profile(student / MODEL, corpus.train, depths, output, **options)
    return DepthProfile.load(output)


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


@pytest.mark.parametrize("batch_size", [1, 3])
def test_statistics_against_a_direct_computation(student, corpus, tmp_path, batch_size):
    profile = calibrate(student, corpus, tmp_path / "p.pth", batch_size=batch_size)
    assert {n: d.layers for n, d in profile.depths.items()} == {
        4: (0, 1, 2, 3),
        2: (0, 3),
    }
    speech = [corpus.speech(utt) for utt in "abcdefghi"]
    for calibrated in profile.depths.values():
        expected = direct_statistics(
            student / MODEL, calibrated.layers, speech, batch_size
        )
        assert calibrated.statistics.keys() == expected.keys()
        for name, (mean, variance) in expected.items():
            result = calibrated.statistics[name]
            assert np.allclose(result[0], mean, atol=1e-5)
            assert np.allclose(result[1], variance, rtol=1e-4)


def test_statistics_differ_from_the_checkpoints_and_between_depths(
    student, corpus, tmp_path
):
    profile = calibrate(student, corpus, tmp_path / "p.pth")
    states = torch.load(student / MODEL, weights_only=True)
    name = "encoders.3.conv_module.norm"
    means = [states[f"encoder.{name}.running_mean"]]
    means += [profile.depths[depth].statistics[name][0] for depth in (4, 2)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (means[a] - means[b]).abs().max() > 1e-3


def test_draws_some_utterances_always_the_same(student, corpus, tmp_path):
    some = calibrate(student, corpus, tmp_path / "3.pth", num_utts=3)
    again = calibrate(student, corpus, tmp_path / "again.pth", num_utts=3)
    other = calibrate(student, corpus, tmp_path / "other.pth", num_utts=3, seed=1)
    name = "encoders.0.conv_module.norm"
    mean, mean_again, mean_other = (
        p.depths[2].statistics[name][0] for p in (some, again, other)
    )
    assert torch.equal(mean, mean_again)
    assert not torch.equal(mean, mean_other)


def test_checkpoint_and_transcripts_are_not_touched(student, corpus, tmp_path):
    data = tmp_path / "unlabelled"
    data.mkdir()
    (data / "wav.scp").write_text((corpus.train / "wav.scp").read_text())
    before = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in student.glob("*.*")}
    write_depth_profile(student / MODEL, data, [2], tmp_path / "p.pth")
    assert {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in student.glob("*.*")} == (
        before
    )


def test_prefix(student, corpus, tmp_path):
    profile = calibrate(student, corpus, tmp_path / "p.pth", selector="prefix")
    assert profile.depths[2].layers == (0, 1)


def test_an_up_to_date_profile_is_kept(student, corpus, tmp_path):
    output = tmp_path / "p.pth"
    calibrate(student, corpus, output)
    stamp = output.stat().st_mtime_ns
    calibrate(student, corpus, output)
    assert output.stat().st_mtime_ns == stamp
    assert 3 in calibrate(student, corpus, output, depths=(4, 3)).depths
    calibrate(student, corpus, output, selector="prefix", depths=(4, 3))
    assert DepthProfile.load(output).depths[3].layers == (0, 1, 2)


def test_the_profile_of_another_model_is_written_anew(student, corpus, tmp_path):
    output = tmp_path / "p.pth"
    write_depth_profile(student / "2epoch.pth", corpus.train, [2], output)
    old = DepthProfile.load(output)
    profile = calibrate(student, corpus, output, depths=[2])
    assert profile.checkpoint != old.checkpoint
    output.write_text("a profile that was cut off")
    calibrate(student, corpus, output, depths=[2])


def test_depths_that_are_not_there_are_left_out(student, corpus, tmp_path):
    profile = calibrate(student, corpus, tmp_path / "p.pth", depths=(12, 4, 2))
    assert sorted(profile.depths) == [2, 4]
    with pytest.raises(UserError, match=r"none of the depths \[12, 8\] fits 4 layers"):
        calibrate(student, corpus, tmp_path / "q.pth", depths=(12, 8))
    with pytest.raises(UserError, match="depth 0"):
        calibrate(student, corpus, tmp_path / "q.pth", depths=(2, 0))


def test_a_model_without_batch_norm_gets_none_and_works(
    build, corpus, tmp_path, caplog
):
    build(directory=tmp_path / "exp", encoder="ld_transformer", encoder_conf=PLAIN)
    caplog.set_level(logging.INFO)
    checkpoint = tmp_path / "exp" / "valid.loss_ctc.best.pth"
    output = tmp_path / "exp" / "depth_profile.pth"
    write_depth_profile(checkpoint, corpus.train, [4, 2], output)
    assert not output.exists()
    assert "no BatchNorm" in caplog.text
    model, _ = load_asr_model(checkpoint)
    model.encoder.set_depth(2)
    assert model.encoder.active_layers == (0, 3)


PLAIN = dict(cnn_module_kernel=None, macaron_style=None)


def test_refuses_a_model_of_fixed_depth(static, corpus, tmp_path):
    with pytest.raises(UserError, match="ConformerEncoder has no depth to set"):
        calibrate(static, corpus, tmp_path / "p.pth")


def test_command(student, corpus, tmp_path, capsys):
    output = tmp_path / "p.pth"
    command = ["--asr_model_file", str(student / MODEL), "--output", str(output)]
    command += ["--data_dir", str(corpus.train)]
    main([*command, "--depths", "4 3", "--num_utts", "2", "--selector", "prefix"])
    assert DepthProfile.load(output).depths[3].layers == (0, 1, 2)
    assert "Calibrating depths" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([*command, "--depths", "9"])
    assert stop.value.code == 1
    assert "error: none of the depths [9] fits 4 layers" in capsys.readouterr().err
