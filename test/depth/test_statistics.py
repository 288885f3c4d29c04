import copy
import threading

import numpy as np
import pytest
import torch

from dldkit.depth.profile import CalibratedDepth, DepthProfile
from dldkit.depth.statistics import batch_norms, estimate


@pytest.fixture
def encoder(make_encoder, features):
    """A Conformer whose running statistics come from training at random depths."""
    encoder = make_encoder("ld_conformer").train()
    for layers in ((0, 1), (1, 3), (0, 1, 2, 3), (2,), (0, 3)):
        with encoder.running(layers):
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
    with torch.no_grad(), encoder.running(layers):
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


class TestEstimate:
    @pytest.mark.parametrize("layers", [(0, 1, 2, 3), (0, 3), (2,)])
    def test_against_a_direct_computation(self, encoder, unpadded, layers):
        statistics = estimate(encoder, layers, unpadded, lambda batch: encoder(*batch))
        expected = direct_statistics(encoder, layers, unpadded)
        slots = {int(name.split(".")[1]) for name in statistics}
        assert slots == set(layers)  # nothing is known about layers that did not run
        assert statistics.keys() == expected.keys()
        for name, (mean, variance) in expected.items():
            assert np.allclose(statistics[name][0], mean, atol=1e-6)
            assert np.allclose(statistics[name][1], variance, rtol=1e-5)

    def test_of_an_encoder_in_training_is_without_dropout(self, encoder, unpadded):
        for module in encoder.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        found = [
            estimate(
                encoder.train(is_training), (0, 3), unpadded, lambda b: encoder(*b)
            )
            for is_training in (True, False)
        ]
        for name, (mean, variance) in found[0].items():
            assert torch.equal(mean, found[1][name][0])
            assert torch.equal(variance, found[1][name][1])

    def test_does_not_depend_on_batches_where_frames_are_alike(self, encoder):
        """All frames count alike: not batch by batch, as running averages do."""
        x = torch.randn(1, 40, 20, generator=torch.Generator().manual_seed(0))
        one, forward = (x, torch.tensor([40])), lambda batch: encoder(*batch)
        twice = (x.repeat(2, 1, 1), torch.tensor([40, 40]))
        a = estimate(encoder, (0,), [one], forward)
        b = estimate(encoder, (0,), [twice, one], forward)
        for name in a:
            frames = 40 // 4 - 1
            assert torch.allclose(a[name][0], b[name][0], atol=1e-5)
            unbiased = (frames - 1) / frames * (3 * frames) / (3 * frames - 1)
            assert torch.allclose(a[name][1] * unbiased, b[name][1], rtol=1e-4)

    def test_leaves_the_encoder_as_it_was(self, encoder, unpadded):
        before = {k: v.clone() for k, v in encoder.state_dict().items()}
        encoder.set_depth(3)
        estimate(encoder, (0, 2), unpadded, lambda batch: encoder(*batch))
        assert encoder.active_layers == (0, 2, 3)
        assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
        assert not any(module.training for module in encoder.modules())
        norms = batch_norms(encoder).values()
        assert all(norm.track_running_stats for norm in norms)
        assert not any(norm._forward_pre_hooks for norm in norms)


def test_an_encoder_without_batch_norm_has_nothing_to_calibrate(make_encoder):
    assert batch_norms(make_encoder("ld_conformer"))
    for name in ("transformer", "branchformer", "e_branchformer"):
        assert not batch_norms(make_encoder(f"ld_{name}"))


@pytest.fixture
def profile(encoder, unpadded):
    """The depths 4 and 2."""
    choices = ((0, 1, 2, 3), (0, 2))
    return DepthProfile(
        [
            CalibratedDepth(c, estimate(encoder, c, unpadded, lambda b: encoder(*b)))
            for c in choices
        ],
        "checkpoint",
    )


@pytest.fixture
def expected(encoder, profile, features):
    """What plain BatchNorms with these statistics in their buffers give."""

    def output(layers, calibrated=True):
        plain = copy.deepcopy(encoder)
        statistics = profile.depths[layers].statistics if calibrated else {}
        for name, (mean, variance) in statistics.items():
            norm = batch_norms(plain)[name]
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
        plain.set_depth(layers=layers)
        return plain(*features)[0]

    return output


def test_each_choice_of_layers_runs_with_its_own(encoder, profile, expected, features):
    outputs = {layers: expected(layers) for layers in profile.depths}
    others = {layers: expected(layers, False) for layers in [(1, 3), (0, 2, 3)]}
    encoder.attach_depth_profile(profile)
    for layers, output in (outputs | others | outputs).items():
        encoder.set_depth(layers=layers)
        assert torch.equal(encoder(*features)[0], output)
        encoder.set_depth()
        with encoder.running(layers):
            assert torch.equal(encoder(*features)[0], output)


def test_full_depth_means_the_same_however_it_was_reached(encoder, profile, features):
    encoder.attach_depth_profile(profile)
    outputs = [encoder(*features)[0]]
    for request in (dict(), dict(depth=4), dict(layers=[0, 1, 2, 3]), dict(depth=None)):
        encoder.set_depth(2)
        encoder.set_depth(**request)
        outputs.append(encoder(*features)[0])
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_no_profile_is_the_checkpoint_alone(encoder, profile, expected, features):
    alone = [expected(layers, False) for layers in profile.depths]
    encoder.attach_depth_profile(profile)
    encoder.attach_depth_profile(None)
    for layers, output in zip(profile.depths, alone):
        encoder.set_depth(layers=layers)
        assert torch.equal(encoder(*features)[0], output)


def test_training_goes_on_with_the_statistics_of_the_batch(encoder, profile, features):
    plain = copy.deepcopy(encoder).train()
    encoder.attach_depth_profile(profile)
    encoder.train()
    outputs = []
    for model in (plain, encoder):
        torch.manual_seed(0)  # of dropout
        with model.running((0, 2)):
            outputs.append(model(*features)[0])
    assert torch.equal(*outputs)
    for key, value in plain.state_dict().items():
        assert torch.equal(encoder.state_dict()[key], value)


def test_state_dict_has_no_trace_of_a_profile(encoder, profile):
    before = copy.deepcopy(encoder.state_dict())
    encoder.attach_depth_profile(profile)
    assert list(encoder.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_statistics_follow_the_model_to_half_precision(encoder, profile, features):
    encoder.attach_depth_profile(profile)
    encoder.set_depth(2)
    output = encoder(*features)[0]
    encoder.double()
    doubled = encoder(features[0].double(), features[1])[0]
    assert doubled.dtype == torch.float64
    assert torch.allclose(doubled.float(), output, atol=1e-4)


def test_a_copy_follows_its_own_depth(encoder, profile, expected, features):
    outputs = [expected((0, 2)), expected((0, 1, 2, 3))]
    encoder.attach_depth_profile(profile)
    other = copy.deepcopy(encoder)
    encoder.set_depth(2)
    assert torch.equal(encoder(*features)[0], outputs[0])
    assert torch.equal(other(*features)[0], outputs[1])


def test_requests_in_two_threads_do_not_meet(encoder, profile, expected, features):
    """Both are in the middle of a forward at the same time, at different depths."""
    outputs = {layers: expected(layers) for layers in profile.depths}
    encoder.attach_depth_profile(profile)
    together = threading.Barrier(2, timeout=30)
    encoder.embed.register_forward_hook(lambda *_: [together.wait()] and None)
    found = {}

    def request(layers):
        with torch.no_grad(), encoder.running(layers):
            found[layers] = [encoder(*features)[0] for _ in range(5)]

    threads = [threading.Thread(target=request, args=(c,)) for c in outputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for layers, output in outputs.items():
        assert len(found[layers]) == 5
        assert all(torch.equal(result, output) for result in found[layers])
