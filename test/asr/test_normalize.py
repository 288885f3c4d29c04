import numpy as np
import pytest
import torch
from espnet2.layers.global_mvn import GlobalMVN
from espnet2.layers.utterance_mvn import UtteranceMVN
from espnet2.tasks.asr import normalize_choices

import dldkit

dldkit.register()


@pytest.fixture(params=["global_mvn", "utterance_mvn"])
def pair(request, tmp_path):
    """ESPnet's class, and what a config gets under its name."""
    ours = normalize_choices.get_class(request.param)
    if request.param == "utterance_mvn":
        return UtteranceMVN(norm_vars=True), ours(norm_vars=True)
    rng = np.random.default_rng(0)
    x = 3 + 2 * rng.standard_normal((100, 20))
    stats = tmp_path / "stats.npz"
    np.savez(stats, count=100, sum=x.sum(0), sum_square=(x**2).sum(0))
    return GlobalMVN(stats), ours(stats)


@pytest.mark.parametrize("learns", [False, True])
def test_gives_what_espnet_gives_and_leaves_its_input(pair, learns):
    theirs, ours = pair
    x = 3 + torch.randn(2, 50, 20, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([50, 31])
    expected, _ = theirs(x.clone(), lengths)
    given = x.clone().requires_grad_(learns)
    for _ in range(2):
        found, found_lengths = ours(given, lengths)
        assert torch.equal(found, expected)
        assert torch.equal(found_lengths, lengths)
    assert torch.equal(given, x)
    assert list(ours.state_dict()) == list(theirs.state_dict())
