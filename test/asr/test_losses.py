import numpy as np
import pytest
import torch

from dldkit.asr.losses import CTCPosteriorKL
from dldkit.asr.posteriors import Posteriors
from dldkit.errors import UserError

LENGTHS = [7, 4, 5]


@pytest.fixture
def student():
    """Logits (Batch, Time, Vocab) with garbage in the padding."""
    generator = torch.Generator().manual_seed(0)
    return padded_with(3 * torch.randn(3, 7, 6, generator=generator), 1e4)


@pytest.fixture
def teacher():
    generator = torch.Generator().manual_seed(1)
    log_probs = (3 * torch.randn(3, 7, 6, generator=generator)).log_softmax(-1)
    return padded_with(log_probs, -1e3)


def padded_with(x, scale):
    for row, length in zip(x, LENGTHS):
        row[length:] *= scale
    return x


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_hand(student, teacher, temperature=1.0, direction="forward", reduction=None):
    """Sum p (log p - log q) frame by frame, in float64."""
    totals = []
    for s, t, length in zip(student, teacher, LENGTHS):
        total = 0.0
        for frame in range(length):
            p = softmax(t[frame].double().numpy() / temperature)
            q = softmax(s[frame].double().numpy() / temperature)
            forward = sum(a * np.log(a / b) for a, b in zip(p, q))
            reverse = sum(b * np.log(b / a) for a, b in zip(p, q))
            total += {
                "forward": forward,
                "reverse": reverse,
                "symmetric": (forward + reverse) / 2,
            }[direction]
        totals.append(total * temperature**2)
    return sum(totals) / (sum(LENGTHS) if reduction == "frame" else len(LENGTHS))


def loss(student, teacher, *args, tokens=None, **options):
    lengths = torch.tensor(LENGTHS)
    return CTCPosteriorKL(*args, **options)(
        student.float().log_softmax(-1), Posteriors(teacher, lengths, tokens)
    )


@pytest.mark.parametrize("reduction", ["utterance", "frame"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "symmetric"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_against_a_computation_by_hand(
    student, teacher, temperature, direction, reduction
):
    options = temperature, direction, reduction
    expected = by_hand(student, teacher, *options)
    assert loss(student, teacher, *options).item() == pytest.approx(expected, rel=1e-5)


def test_defaults_are_forward_per_utterance_at_temperature_one(student, teacher):
    assert torch.equal(
        loss(student, teacher), loss(student, teacher, 1.0, "forward", "utterance")
    )


@pytest.mark.parametrize("reduction", ["utterance", "frame"])
def test_padding_does_not_matter(student, teacher, reduction):
    before = loss(student, teacher, reduction=reduction)
    for row, length in zip(student, LENGTHS):
        row[length:] = 123.0 * torch.randn_like(row[length:])
    for row, length in zip(teacher, LENGTHS):
        row[length:] = -7.0
    student.requires_grad_()
    after = loss(student, teacher, reduction=reduction)
    assert torch.equal(before, after)
    after.backward()
    for row, length in zip(student.grad, LENGTHS):
        assert torch.equal(row[length:], torch.zeros_like(row[length:]))
        assert (row[:length] != 0).all()


def test_is_zero_for_equal_posteriors_and_positive_otherwise(student, teacher):
    for direction in ("forward", "reverse", "symmetric"):
        same = loss(student, student.float().log_softmax(-1), direction=direction)
        assert abs(same.item()) < 1e-5
        assert loss(student, teacher, direction=direction).item() > 0.1


@pytest.mark.parametrize("direction", ["forward", "reverse", "symmetric"])
@pytest.mark.parametrize("top_k", [None, 2])
def test_gradient(student, teacher, direction, top_k):
    """Against finite differences in float64 of the computation by hand."""
    valid = [(b, t) for b, length in enumerate(LENGTHS) for t in range(length)]
    tokens, log_probs = None, teacher
    if top_k:
        log_probs, tokens = cut(teacher, top_k)
    student = student.requires_grad_()
    loss(student, log_probs, direction=direction, tokens=tokens).backward()
    step = 1e-3
    for b, t in valid[::5]:
        for unit in range(6):
            values = []
            for sign in (1, -1):
                moved = student.detach().clone()
                moved[b, t, unit] += sign * step
                if top_k:
                    values.append(by_hand_cut(moved, teacher, top_k, direction))
                else:
                    values.append(by_hand(moved, teacher, direction=direction))
            slope = (values[0] - values[1]) / (2 * step)
            assert student.grad[b, t, unit].item() == pytest.approx(slope, abs=2e-3)


def cut(teacher, top_k):
    """Keep the `top_k` likeliest tokens and the rest's mass, as a cache does."""
    values, tokens = teacher.double().log_softmax(-1).topk(top_k, -1)
    rest = (1 - values.exp().sum(-1, keepdim=True)).clamp(min=1e-30).log()
    return torch.cat([values, rest], -1).float(), tokens


def by_hand_cut(student, teacher, top_k, direction="forward"):
    total = 0.0
    for s, t, length in zip(student, teacher, LENGTHS):
        for frame in range(length):
            p = softmax(t[frame].double().numpy())
            q = softmax(s[frame].double().numpy())
            kept = np.argsort(-p)[:top_k]
            p, q = (np.append(x[kept], 1 - x[kept].sum()) for x in (p, q))
            forward, reverse = (p * np.log(p / q)).sum(), (q * np.log(q / p)).sum()
            total += {
                "forward": forward,
                "reverse": reverse,
                "symmetric": (forward + reverse) / 2,
            }[direction]
    return total / len(LENGTHS)


@pytest.mark.parametrize("direction", ["forward", "reverse", "symmetric"])
@pytest.mark.parametrize("top_k", [1, 3, 5])
def test_top_tokens_and_the_rest_as_one_bin(student, teacher, direction, top_k):
    log_probs, tokens = cut(teacher, top_k)
    result = loss(student, log_probs, direction=direction, tokens=tokens)
    expected = by_hand_cut(student, teacher, top_k, direction)
    assert result.item() == pytest.approx(expected, rel=1e-4)


def test_a_cut_loses_information_and_never_adds_any(student, teacher):
    losses = []
    for top_k in (1, 2, 3, 4, 5):
        log_probs, tokens = cut(teacher, top_k)
        losses.append(loss(student, log_probs, tokens=tokens).item())
    assert losses == sorted(losses)
    assert losses[-1] <= loss(student, teacher).item() + 1e-5


def frames_by_hand(teacher, blank):
    """How much each valid frame counts, from the reference's full posteriors."""
    weights = []
    for t, length in zip(teacher, LENGTHS):
        p = softmax(t[:length].double().numpy())
        is_token = (p.argmax(-1) != 0).astype(float)
        weights.append({"drop": is_token, "scale": 1 - p[:, 0]}[blank])
    return weights


@pytest.mark.parametrize(
    "blank, top_k",
    [("drop", None), ("drop", 4), ("drop", 1), ("scale", None), ("scale", 4)],
)
@pytest.mark.parametrize("reduction", ["utterance", "frame"])
def test_frames_of_blank_count_less(student, teacher, blank, reduction, top_k):
    """One frame at a time, and each weighted, in float64."""
    likely = teacher.clone()
    likely[:, :2, 0] += 6.0  # some frames of blank, some of no blank at all
    likely[:, 2:4, 0] -= 20.0
    # the likeliest is blank, but less likely than all others together
    likely[0, 4] = -0.01 * torch.arange(likely.size(-1))
    teacher = likely.log_softmax(-1)
    weights, total = frames_by_hand(teacher, blank), 0.0
    for utt, length in enumerate(LENGTHS):
        for frame in range(length):
            p = softmax(teacher[utt, frame].double().numpy())
            q = softmax(student[utt, frame].double().numpy())
            if top_k:
                kept = np.argsort(-p)[:top_k]
                p, q = (np.append(x[kept], 1 - x[kept].sum()) for x in (p, q))
            total += weights[utt][frame] * (p * np.log(p / q)).sum()
    counted = sum(map(sum, weights))
    assert 0 < counted < sum(LENGTHS) - 1
    expected = total / (counted if reduction == "frame" else len(LENGTHS))
    tokens = None
    if top_k:
        teacher, tokens = cut(teacher, top_k)
    result = loss(student, teacher, reduction=reduction, blank=blank, tokens=tokens)
    assert result.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("reduction", ["utterance", "frame"])
@pytest.mark.parametrize("blank", ["drop", "scale"])
def test_nothing_but_blank_is_no_loss(student, teacher, blank, reduction):
    teacher[..., 0] = 1e4
    student.requires_grad_()
    teacher = teacher.log_softmax(-1)
    result = loss(student, teacher, reduction=reduction, blank=blank)
    result.backward()
    assert result.item() == 0.0 and not student.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_computes_in_float32_under_autocast(student, teacher, dtype):
    student = student.clamp(-50, 50).to(dtype)
    expected = loss(student.float(), teacher)
    with torch.autocast("cpu", dtype=dtype):
        result = loss(student, teacher)
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)
    by_hand_ = by_hand(student, teacher)
    assert result.item() == pytest.approx(by_hand_, rel=1e-5)


@pytest.mark.parametrize("direction", ["forward", "reverse", "symmetric"])
def test_a_student_that_is_certain_can_learn(student, teacher, direction):
    """Its other probabilities are below what float32 holds."""
    logits = (100 * student).requires_grad_()
    assert (logits.log_softmax(-1).exp() == 0).any()
    loss = CTCPosteriorKL(direction=direction)
    log_probs = logits.log_softmax(-1)
    loss(log_probs, Posteriors(teacher, torch.tensor(LENGTHS))).backward()
    assert logits.grad.isfinite().all() and logits.grad.any()


def test_impossible_tokens_of_the_reference_cost_nothing(student, teacher):
    """float16 caches round very small probabilities to zero."""
    teacher[:, :, 2] = float("-inf")
    teacher = teacher.log_softmax(-1)
    student.requires_grad_()
    result = loss(student, teacher)
    result.backward()
    assert torch.isfinite(result) and torch.isfinite(student.grad).all()
    without = [0, 1, 3, 4, 5]
    p = teacher[:, :, without].log_softmax(-1)
    expected = 0.0
    for b, length in enumerate(LENGTHS):
        q = student[b, :length].log_softmax(-1)[:, without]
        expected += (p[b, :length].exp() * (p[b, :length] - q)).sum().item() / 3
    assert result.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(temperature=0.0), "kd_temperature 0.0"),
        (dict(temperature=-1.0), "kd_temperature -1.0"),
        (dict(direction="backward"), "kd_direction 'backward': choose forward"),
        (dict(reduction="mean"), "kd_reduction 'mean': choose utterance or frame"),
    ],
)
def test_refuses_impossible_options(options, message):
    with pytest.raises(UserError, match=message):
        CTCPosteriorKL(**options)


def test_refuses_a_temperature_without_full_posteriors(student, teacher):
    log_probs, tokens = cut(teacher, 2)
    with pytest.raises(UserError, match="kd_temperature .*--top_k"):
        loss(student, log_probs, 2.0, tokens=tokens)


def test_has_nothing_to_learn_or_store():
    assert not CTCPosteriorKL().state_dict()
