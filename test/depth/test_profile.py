import logging

import pytest
import torch

from dldkit.depth.profile import (
    CalibratedDepth,
    DepthProfile,
    find_profile,
    fingerprint,
    profile_path,
)
from dldkit.depth.statistics import batch_norms, estimate
from dldkit.errors import UserError


@pytest.fixture
def encoder(make_encoder):
    return make_encoder("ld_conformer").eval()


@pytest.fixture
def calibrated(encoder):
    """Return a function that calibrates a choice of layers on noise."""
    noise = torch.randn(3, 40, 20, generator=torch.Generator().manual_seed(2))
    batch = (noise, torch.full((3,), 40))

    def calibrate(layers, **about):
        statistics = estimate(encoder, layers, [batch], lambda b: encoder(*b))
        return CalibratedDepth(layers, statistics, **about)

    return calibrate


@pytest.fixture
def profile(encoder, calibrated):
    depths = [
        calibrated((0, 1, 2, 3), selector="even"),
        calibrated((0, 3), selector="even", made_from={"seed": 1}, ctc_loss=(2.0, 1.5)),
    ]
    return DepthProfile(depths, fingerprint(encoder.state_dict()))


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(x, y) for n in b for x, y in zip(a[n], b[n]))


class TestFile:
    def test_what_is_saved_is_loaded(self, profile, tmp_path):
        profile.save(tmp_path / "a.profile.pth")
        assert [path.name for path in tmp_path.iterdir()] == ["a.profile.pth"]
        loaded = DepthProfile.load(tmp_path / "a.profile.pth")
        assert loaded.checkpoint == profile.checkpoint
        assert list(loaded.depths) == [(0, 1, 2, 3), (0, 3)]
        for layers, depth in profile.depths.items():
            found = loaded.depths[layers]
            assert same(found.statistics, depth.statistics)
            assert (found.selector, found.made_from) == ("even", depth.made_from)
        assert loaded.depths[(0, 3)].ctc_loss == (2.0, 1.5)

    def test_refuses_what_is_no_profile(self, tmp_path):
        with pytest.raises(UserError, match="no depth profile .*dldkit.bin.calibrate"):
            DepthProfile.load(tmp_path / "missing.pth")
        torch.save({"some": "thing"}, tmp_path / "other.pth")
        (tmp_path / "text.pth").write_text("hello")
        for name in ("other.pth", "text.pth"):
            with pytest.raises(UserError, match=f"{name} is no depth profile"):
                DepthProfile.load(tmp_path / name)

    def test_a_killed_save_leaves_the_old_one(self, profile, tmp_path, monkeypatch):
        profile.save(tmp_path / "p.pth")

        def killed(states, path):
            path.write_bytes(b"half a fi")
            raise KeyboardInterrupt

        monkeypatch.setattr(torch, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            DepthProfile([], "other").save(tmp_path / "p.pth")
        assert DepthProfile.load(tmp_path / "p.pth").checkpoint == profile.checkpoint


class TestFind:
    """Which file belongs to a checkpoint."""

    @pytest.fixture
    def checkpoint(self, tmp_path):
        (tmp_path / "valid.loss.ave_2best.pth").touch()
        link = tmp_path / "valid.loss.ave.pth"
        link.symlink_to("valid.loss.ave_2best.pth")
        return link

    def test_is_named_after_the_file_that_the_link_means(self, checkpoint, tmp_path):
        path = tmp_path / "valid.loss.ave_2best.profile.pth"
        assert profile_path(checkpoint) == path
        assert profile_path(tmp_path / "valid.loss.ave_2best.pth") == path
        outside = tmp_path / "linked.pth"  # to a directory that may be another one's
        outside.symlink_to(tmp_path / "elsewhere" / "model.pth")
        assert profile_path(outside) == tmp_path / "linked.profile.pth"

    def test_checkpoints_of_a_directory_have_one_each(
        self, checkpoint, encoder, profile, make_encoder, tmp_path
    ):
        other = make_encoder("ld_conformer", seed=1).state_dict()
        profile.save(profile_path(checkpoint))
        DepthProfile([], fingerprint(other)).save(tmp_path / "3epoch.profile.pth")
        states = encoder.state_dict()
        assert find_profile(checkpoint, states) == profile_path(checkpoint)
        found = find_profile(tmp_path / "3epoch.pth", other)
        assert found == tmp_path / "3epoch.profile.pth"
        assert find_profile(tmp_path / "9epoch.pth", {"w": torch.ones(1)}) is None

    def test_in_a_copy_whose_links_became_files(self, encoder, profile, tmp_path):
        profile.save(tmp_path / "valid.loss.ave_2best.profile.pth")
        found = find_profile(tmp_path / "valid.loss.ave.pth", encoder.state_dict())
        assert found == tmp_path / "valid.loss.ave_2best.profile.pth"

    def test_stale_one_is_not_used_and_says_how_to_make_another(
        self, checkpoint, profile, make_encoder, caplog
    ):
        profile.save(profile_path(checkpoint))
        other = make_encoder("ld_conformer", seed=1).state_dict()
        assert find_profile(checkpoint, other) is None
        assert f"calibrate --asr_model_file {checkpoint}" in caplog.text


class TestEncoder:
    """An encoder with a profile."""

    @pytest.fixture
    def path(self, profile, tmp_path):
        profile.save(tmp_path / "p.pth")
        return tmp_path / "p.pth"

    def test_a_depth_means_the_layers_that_were_calibrated(self, encoder, calibrated):
        profile = DepthProfile([calibrated((0, 1)), calibrated((1, 2))], "")
        encoder.attach_depth_profile(profile)
        encoder.set_depth(2)
        assert encoder.active_layers == (1, 2)  # the last one
        encoder.set_depth(2, selector="prefix")
        assert encoder.active_layers == (0, 1)
        profile.add(calibrated((0, 3)))
        profile.add(calibrated((1, 2)))
        encoder.set_depth(2)
        assert encoder.active_layers == (0, 3)  # what the encoder itself would choose

    def test_a_selector_is_never_overridden(self, encoder, path, caplog):
        encoder.load_depth_profile(path)
        encoder.set_depth(2, selector="prefix")
        assert encoder.active_layers == (0, 1)
        assert "(0, 1) are not in the depth profile" in caplog.text

    def test_what_is_not_in_it_is_warned_of_once(self, encoder, path, caplog):
        encoder.load_depth_profile(path)
        for _ in range(2):
            for depth in (4, 2, None):
                encoder.set_depth(depth)
            assert not caplog.records
        encoder.set_depth(3)
        encoder.set_depth(3)
        assert [record.levelno for record in caplog.records] == [logging.WARNING]

    def test_a_static_model_at_full_depth_needs_none(
        self, make_encoder, calibrated, caplog
    ):
        static = make_encoder("ld_conformer", depth_sampler="full")
        static.attach_depth_profile(DepthProfile([calibrated((0, 3))], ""))
        caplog.clear()
        static.set_depth()
        assert not caplog.records

    def test_refuses_the_profile_of_another_checkpoint(self, encoder, path):
        with torch.no_grad():
            encoder.encoders[0].feed_forward.w_1.weight[0, 0] += 1e-3
        with pytest.raises(UserError, match=f"{path} .* another checkpoint"):
            encoder.load_depth_profile(path)
        encoder.set_depth(2)  # goes on without one

    def test_rounded_weights_are_known_by_those_of_the_checkpoint(self, encoder, path):
        checkpoint = fingerprint(encoder.state_dict())
        encoder.half()
        with pytest.raises(UserError, match="another checkpoint"):
            encoder.load_depth_profile(path)
        encoder.load_depth_profile(path, checkpoint)
        assert batch_norms(encoder)["encoders.0.conv_module.norm"].means.dtype == (
            torch.float16
        )


def test_fingerprint_is_of_the_weights(encoder, make_encoder):
    print_ = fingerprint(encoder.state_dict())
    batch_norms(encoder)["encoders.0.conv_module.norm"].running_mean += 1
    assert fingerprint(encoder.state_dict()) == print_
    assert fingerprint(make_encoder("ld_conformer", seed=1).state_dict()) != print_
    copy = make_encoder("ld_conformer", seed=1)
    copy.load_state_dict(encoder.state_dict())
    assert fingerprint(copy.state_dict()) == print_
