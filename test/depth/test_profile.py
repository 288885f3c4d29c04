import numpy as np
import pytest
import torch

from dldkit.depth.profile import (
    CalibratedDepth,
    DepthProfile,
    batch_norms,
    calibrate,
    fingerprint,
)
from dldkit.errors import UserError


@pytest.fixture
def encoder(make_encoder, features):
    """A Conformer whose running statistics come from training at random depths."""
    encoder = make_encoder("ld_conformer").train()
    for _ in range(5):
        encoder(*features)
    return encoder.eval()


@pytest.fixture
def unpadded():
    """Batches without padding, of different lengths."""
    generator = torch.Generator().manual_seed(2)
    return [
        (2 + torch.randn(n, time, 20, generator=generator), torch.full((n,), time))
        for n, time in ((3, 40), (1, 61), (2, 75))
    ]


def direct_statistics(encoder, layers, batches):
    """Collect all BatchNorm inputs with hooks and reduce them in numpy."""
    inputs: dict[str, list[np.ndarray]] = {}
    hooks = []
    for name, norm in batch_norms(encoder).items():
        norm.train()  # normalises by the statistics of the batch ...
        norm.momentum = 0.0  # ... and keeps its running ones
        hooks.append(
            norm.register_forward_pre_hook(
                lambda _, x, name=name: inputs.setdefault(name, []).append(x[0].numpy())
            )
        )
    encoder.set_depth(layers=layers)
    with torch.no_grad():
        for batch in batches:
            encoder(*batch)
    for hook in hooks:
        hook.remove()
    encoder.eval()
    frames = {
        name: np.concatenate([x.transpose(0, 2, 1).reshape(-1, 8) for x in xs]).astype(
            np.float64
        )
        for name, xs in inputs.items()
    }
    return {name: (x.mean(0), x.var(0, ddof=1)) for name, x in frames.items()}


@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (0, 3), (2,)])
def test_calibrate_against_a_direct_computation(encoder, unpadded, layers):
    calibrated = calibrate(encoder, layers, unpadded, lambda batch: encoder(*batch))
    assert calibrated.layers == layers
    expected = direct_statistics(encoder, layers, unpadded)
    slots = {int(name.split(".")[1]) for name in calibrated.statistics}
    assert slots == set(layers)  # nothing is known about layers that did not run
    assert calibrated.statistics.keys() == expected.keys()
    for name, (mean, variance) in expected.items():
        assert np.allclose(calibrated.statistics[name][0], mean, atol=1e-6)
        assert np.allclose(calibrated.statistics[name][1], variance, rtol=1e-5)


def test_calibrate_does_not_depend_on_batches_where_frames_are_alike(encoder):
    """All frames count alike: not batch by batch, as running averages do."""
    x = torch.randn(1, 40, 20, generator=torch.Generator().manual_seed(0))
    one, forward = (x, torch.tensor([40])), lambda batch: encoder(*batch)
    twice = (x.repeat(2, 1, 1), torch.tensor([40, 40]))
    a = calibrate(encoder, (0,), [one], forward).statistics
    b = calibrate(encoder, (0,), [twice, one], forward).statistics
    for name in a:
        frames = 40 // 4 - 1
        assert torch.allclose(a[name][0], b[name][0], atol=1e-5)
        unbiased = (frames - 1) / frames * (3 * frames) / (3 * frames - 1)
        assert torch.allclose(a[name][1] * unbiased, b[name][1], rtol=1e-4)


def test_calibrate_leaves_the_encoder_as_it_was(encoder, unpadded):
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    calibrate(encoder, (0, 2), unpadded, lambda batch: encoder(*batch))
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    assert not any(module.training for module in encoder.modules())
    assert all(norm.track_running_stats for norm in batch_norms(encoder).values())
    assert not any(norm._forward_pre_hooks for norm in batch_norms(encoder).values())


@pytest.fixture
def profile(encoder, unpadded, tmp_path):
    """The file of a profile of depths 4 and 2."""
    depths = {
        len(layers): calibrate(encoder, layers, unpadded, lambda b: encoder(*b))
        for layers in ((0, 1, 2, 3), (0, 2))
    }
    encoder.set_depth()
    path = tmp_path / "depth_profile.pth"
    DepthProfile(depths, fingerprint(encoder.state_dict())).save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    return path


def statistics(encoder):
    return {
        name: (norm.running_mean.clone(), norm.running_var.clone())
        for name, norm in batch_norms(encoder).items()
    }


def same(a, b):
    return all(torch.equal(x, y) for n in b for x, y in zip(a[n], b[n]))


def test_set_depth_applies_layers_and_statistics(encoder, profile):
    calibrated = DepthProfile.load(profile).depths
    trained = statistics(encoder)
    encoder.load_depth_profile(profile)
    for depth in (2, 4, 2):
        encoder.set_depth(depth)
        assert encoder.active_layers == calibrated[depth].layers
        assert same(statistics(encoder), calibrated[depth].statistics)
    # layers 1 and 3 were not calibrated for depth 2: they keep the checkpoint's
    for name in trained:
        if name.split(".")[1] in "13":
            assert same(statistics(encoder), {name: trained[name]})


def test_the_same_layers_by_name_are_calibrated_as_well(encoder, profile):
    encoder.load_depth_profile(profile)
    encoder.set_depth(layers=[2, 0])
    assert same(statistics(encoder), DepthProfile.load(profile).depths[2].statistics)


@pytest.mark.parametrize("request_", [dict(depth=3), dict(layers=[1, 3]), {}])
def test_other_layers_run_with_the_checkpoints_statistics(encoder, profile, request_):
    trained = statistics(encoder)
    encoder.load_depth_profile(profile)
    encoder.set_depth(2)
    encoder.set_depth(**request_)
    assert same(statistics(encoder), trained)


def test_full_depth_is_unchanged_once_the_profile_is_gone(encoder, profile, features):
    before = encoder(*features)[0]
    encoder.load_depth_profile(profile)
    encoder.set_depth(4)
    assert not torch.equal(encoder(*features)[0], before)
    encoder.set_depth()
    assert torch.equal(encoder(*features)[0], before)
    encoder.set_depth(4)
    encoder.detach_depth_profile()
    assert torch.equal(encoder(*features)[0], before)
    encoder.set_depth(4)
    assert torch.equal(encoder(*features)[0], before)


def test_loading_a_second_profile_keeps_the_checkpoints_statistics(encoder, profile):
    trained = statistics(encoder)
    encoder.load_depth_profile(profile)
    encoder.set_depth(2)
    encoder.load_depth_profile(profile)
    encoder.set_depth()
    assert same(statistics(encoder), trained)


def test_state_dict_has_no_trace_of_a_profile(encoder, profile):
    keys = list(encoder.state_dict())
    encoder.load_depth_profile(profile)
    assert list(encoder.state_dict()) == keys


def test_refuses_the_profile_of_another_checkpoint(encoder, profile):
    trained = statistics(encoder)
    with torch.no_grad():
        encoder.encoders[0].feed_forward.w_1.weight[0, 0] += 1e-3
    with pytest.raises(UserError, match=f"{profile} .* another checkpoint"):
        encoder.load_depth_profile(profile)
    assert same(statistics(encoder), trained)
    encoder.set_depth(2)  # goes on without one
    assert same(statistics(encoder), trained)


def test_rounded_weights_are_known_by_those_of_the_checkpoint(encoder, profile):
    checkpoint = fingerprint(encoder.state_dict())
    encoder.half()
    with pytest.raises(UserError, match="another checkpoint"):
        encoder.load_depth_profile(profile)
    encoder.load_depth_profile(profile, checkpoint)
    encoder.set_depth(2)
    norms = DepthProfile.load(profile).depths[2].statistics
    for name, (mean, _) in norms.items():
        assert torch.equal(statistics(encoder)[name][0], mean.half())


def test_fingerprint_is_of_the_weights(encoder, make_encoder):
    print_ = fingerprint(encoder.state_dict())
    batch_norms(encoder)["encoders.0.conv_module.norm"].running_mean += 1
    assert fingerprint(encoder.state_dict()) == print_
    assert fingerprint(make_encoder("ld_conformer", seed=1).state_dict()) != print_
    copy = make_encoder("ld_conformer", seed=1)
    copy.load_state_dict(encoder.state_dict())
    assert fingerprint(copy.state_dict()) == print_


def test_refuses_what_is_no_profile(tmp_path):
    with pytest.raises(UserError, match="no depth profile .*dldkit.bin.calibrate"):
        DepthProfile.load(tmp_path / "missing.pth")
    torch.save({"some": "thing"}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("hello")
    for name in ("other.pth", "text.pth"):
        with pytest.raises(UserError, match=f"{name} is no depth profile"):
            DepthProfile.load(tmp_path / name)


def test_a_killed_save_leaves_the_old_profile(encoder, profile, monkeypatch):
    def killed(states, path):
        path.write_bytes(b"half a fi")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    other = DepthProfile({1: CalibratedDepth((0,), {})}, "other")
    with pytest.raises(KeyboardInterrupt):
        other.save(profile)
    assert set(DepthProfile.load(profile).depths) == {2, 4}


def test_an_encoder_without_batch_norm_has_nothing_to_calibrate(make_encoder):
    assert batch_norms(make_encoder("ld_conformer"))
    for name in ("transformer", "branchformer", "e_branchformer"):
        assert not batch_norms(make_encoder(f"ld_{name}"))
