import numpy as np
import pytest
import torch

from dldkit.asr.posteriors import pack, unpack


@pytest.fixture
def log_probs():
    generator = torch.Generator().manual_seed(0)
    return (4 * torch.randn(30, 50, generator=generator)).log_softmax(-1)


def read(matrix, top_k, padding=0):
    """As ESPnet gives a stored matrix to the model, with frames of padding."""
    value = 0.0 if top_k is None else -1
    dtype = torch.float32 if top_k is None else torch.int64
    stored = torch.from_numpy(matrix).to(dtype)
    stored = torch.nn.functional.pad(stored, (0, 0, 0, padding), value=value)
    return unpack(stored[None], torch.tensor([len(matrix)]), top_k)


def test_all_tokens_as_float16(log_probs):
    matrix = pack(log_probs, None)
    assert matrix.dtype == np.float16 and matrix.shape == (30, 50)
    posteriors = read(matrix, None)
    assert posteriors.tokens is None and posteriors.lengths.tolist() == [30]
    assert torch.allclose(posteriors.log_probs[0], log_probs, rtol=1e-3)


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("top_k", [1, 5, 49])
def test_top_tokens(log_probs, top_k, padding):
    matrix = pack(log_probs, top_k)
    assert matrix.dtype == np.int16 and matrix.shape == (30, 2 * top_k)
    posteriors = read(matrix, top_k, padding)
    assert posteriors.tokens.min() >= 0 and posteriors.tokens.max() < 50
    assert posteriors.log_probs.isfinite().all()
    order = log_probs.numpy().argsort(-1)[:, ::-1][:, :top_k]
    assert np.array_equal(posteriors.tokens[0, :30].numpy(), order)
    kept = np.take_along_axis(log_probs.numpy(), order, -1)
    values = posteriors.log_probs[0, :30]
    assert np.allclose(values[:, :-1].numpy(), kept, rtol=1e-3, atol=1e-3)
    rest = 1 - np.exp(kept).sum(-1)
    assert np.allclose(values[:, -1].exp().numpy(), rest, atol=2e-3)


def test_many_tokens():
    """Their numbers need all of 16 bits."""
    log_probs = torch.randn(2, 2**16).log_softmax(-1)
    posteriors = read(pack(log_probs, 3), 3)
    assert torch.equal(posteriors.tokens[0], log_probs.topk(3).indices)


def test_a_certain_frame_leaves_almost_nothing_for_the_rest():
    log_probs = torch.tensor([[0.0, -30.0, -40.0]]).log_softmax(-1)
    values = read(pack(log_probs, 1), 1).log_probs
    assert torch.isfinite(values).all()
    assert values[0, 0, -1] < -15
