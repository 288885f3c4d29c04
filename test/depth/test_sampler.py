import itertools
import math
import random
from collections import Counter

import pytest

from dldkit.depth.sampler import DepthSampler
from dldkit.errors import UserError


def draws(sampler, num_layers: int, number: int, seed: int = 0):
    rng = random.Random(seed)
    return [sampler.draw(range(num_layers), rng) for _ in range(number)]


def chi_square(counts: Counter, expected: dict) -> float:
    """Return the statistic over its degrees of freedom: near 1 for a good fit."""
    total = sum(counts.values())
    assert set(counts) <= set(expected)
    cells = [(counts[key], p * total) for key, p in expected.items()]
    assert min(e for _, e in cells) > 5  # or the statistic means nothing
    return sum((n - e) ** 2 / e for n, e in cells) / (len(cells) - 1)


def gates_one_by_one(num_layers: int, keep: float, min_depth: int) -> dict:
    """Return the probability of each subset under the paper's own description.

    Independent gates, drawn again until enough of them are on.
    """
    subsets = {}
    for gates in itertools.product((0, 1), repeat=num_layers):
        if sum(gates) >= min_depth:
            layers = tuple(slot for slot, gate in enumerate(gates) if gate)
            subsets[layers] = math.prod(keep if g else 1 - keep for g in gates)
    total = sum(subsets.values())
    return {layers: p / total for layers, p in subsets.items()}


@pytest.mark.parametrize("keep, min_depth", [(0.5, 1), (0.3, 1), (0.8, 2), (0.5, 3)])
def test_bernoulli_is_independent_gates_without_the_empty_draw(keep, min_depth):
    drawn = draws(DepthSampler("bernoulli", keep, min_depth), 5, 20000)
    assert chi_square(Counter(drawn), gates_one_by_one(5, keep, min_depth)) < 1.8


def test_bernoulli_of_another_keep_prob_is_told_apart():
    drawn = draws(DepthSampler("bernoulli", 0.45), 5, 20000)
    assert chi_square(Counter(drawn), gates_one_by_one(5, 0.5, 1)) > 5


def test_bernoulli_depths_of_twelve_layers():
    drawn = draws(DepthSampler("bernoulli", 0.5), 12, 40000)
    depths = Counter(len(layers) for layers in drawn)
    probability = {n: math.comb(12, n) / (2**12 - 1) for n in range(1, 13)}
    assert chi_square(depths, probability) < 2.5


def test_bernoulli_that_keeps_everything():
    assert set(draws(DepthSampler("bernoulli", 1.0), 4, 50)) == {(0, 1, 2, 3)}


@pytest.mark.parametrize("min_depth", [1, 3])
def test_uniform_depth_then_a_random_subset(min_depth):
    depths = range(min_depth, 6)
    expected = {
        subset: 1 / len(depths) / math.comb(5, n)
        for n in depths
        for subset in itertools.combinations(range(5), n)
    }
    drawn = draws(DepthSampler("uniform", min_depth=min_depth), 5, 20000)
    assert chi_square(Counter(drawn), expected) < 1.8


@pytest.mark.parametrize(
    "choice, six_of_twelve",
    [("even", (0, 2, 4, 7, 9, 11)), ("prefix", (0, 1, 2, 3, 4, 5))],
)
@pytest.mark.parametrize("name", ["bernoulli", "uniform"])
def test_a_layer_choice_changes_the_layers_but_not_the_depths(
    name, choice, six_of_twelve
):
    drawn = draws(DepthSampler(name, layer_choice=choice), 12, 20000)
    assert len(set(drawn)) == len({len(layers) for layers in drawn})
    assert six_of_twelve in drawn
    weights = DepthSampler(name).weight_of_each_depth(12)
    expected = {n: w / sum(weights.values()) for n, w in weights.items()}
    rare = [n for n, p in expected.items() if p * 20000 < 6]
    counts = Counter(len(layers) for layers in drawn if len(layers) not in rare)
    assert chi_square(counts, {n: p for n, p in expected.items() if n not in rare}) < 2


def test_a_layer_choice_holds_among_the_given_layers():
    """As in a growing model, of which only some slots are there yet."""
    rng = random.Random(0)
    sampler = DepthSampler("uniform", layer_choice="prefix")
    drawn = {sampler.draw((2, 5, 9), rng) for _ in range(100)}
    assert drawn == {(2,), (2, 5), (2, 5, 9)}


def test_weights_by_depth():
    drawn = draws(DepthSampler({12: 2, 6: 1, 2: 1.0}), 12, 20000)
    depths = Counter(len(layers) for layers in drawn)
    assert chi_square(depths, {12: 0.5, 6: 0.25, 2: 0.25}) < 3


@pytest.mark.parametrize("exits", [2, [2, 4]])
def test_depths_that_have_an_exit(exits):
    sampler = DepthSampler("exits", layer_choice="prefix", exits=exits)
    depths = Counter(len(layers) for layers in draws(sampler, 6, 20000))
    assert chi_square(depths, {2: 1 / 3, 4: 1 / 3, 6: 1 / 3}) < 3
    assert sampler.smallest(6) == 2
    # growing models begin with fewer layers
    assert {len(layers) for layers in draws(sampler, 3, 100)} == {2, 3}


@pytest.mark.parametrize("exits", [0, ()])
def test_depths_of_exits_need_some(exits):
    with pytest.raises(UserError, match="depth_sampler: exits .*: set exits"):
        DepthSampler("exits", layer_choice="prefix", exits=exits)


@pytest.mark.parametrize(
    "weights, message",
    [
        ({}, r"depth_sampler \{\} is impossible"),
        ({0: 1.0}, r"\{0: 1.0\} is impossible: write depths"),
        ({"six": 1.0}, "'six': 1.0"),
        ({3: -1.0}, "3: -1.0"),
        ({3: 0.0}, "no depth is left"),
        ({5: 1.0}, "a depth above the 4 layers"),
    ],
)
def test_refuses_impossible_weights(weights, message):
    with pytest.raises(UserError, match=message):
        DepthSampler(weights).check(4)


def test_full():
    assert set(draws(DepthSampler("full"), 6, 20)) == {(0, 1, 2, 3, 4, 5)}


@pytest.mark.parametrize("name", ["bernoulli", "uniform", "full"])
def test_never_zero_layers_and_always_in_order(name):
    for num_layers in (1, 2, 12):
        for layers in draws(DepthSampler(name, 0.02, 1), num_layers, 500):
            assert len(layers) >= 1
            assert list(layers) == sorted(set(layers))
            assert set(layers) <= set(range(num_layers))


def test_draws_some_of_the_given_layers():
    rng = random.Random(0)
    drawn = {DepthSampler("uniform").draw((2, 5, 9), rng) for _ in range(200)}
    assert drawn == {(2,), (5,), (9,), (2, 5), (2, 9), (5, 9), (2, 5, 9)}


def test_the_generator_decides():
    sampler = DepthSampler("bernoulli", 0.5)
    assert draws(sampler, 12, 50, seed=4) == draws(sampler, 12, 50, seed=4)
    assert draws(sampler, 12, 50, seed=4) != draws(sampler, 12, 50, seed=5)


@pytest.mark.parametrize(
    "name, keep_prob, min_depth, message",
    [
        ("bernoulli", 0.0, 1, "keep_prob 0.0"),
        ("bernoulli", 1.5, 1, "keep_prob 1.5"),
        ("uniform", 0.5, 0, "min_depth 0"),
        ("bernouli", 0.5, 1, "'bernouli': choose bernoulli, uniform, exits or full"),
    ],
)
def test_refuses_impossible_options(name, keep_prob, min_depth, message):
    with pytest.raises(UserError, match=message):
        DepthSampler(name, keep_prob, min_depth)


def test_refuses_an_unknown_layer_choice():
    with pytest.raises(UserError, match="'odd': choose one of random, even, prefix"):
        DepthSampler("uniform", layer_choice="odd")


def test_refuses_a_min_depth_above_the_layers():
    with pytest.raises(UserError, match="min_depth 4 .* 3 layers"):
        DepthSampler("uniform", min_depth=4).draw(range(3), random.Random(0))


@pytest.mark.parametrize(
    "options, depths",
    [
        (dict(depth_sampler="full", exits=2), {2, 4, 6}),
        (dict(depth_sampler="exits", exits=[1, 4]), {1, 4, 6}),
        (dict(depth_sampler={6: 1, 3: 2, 5: 0}, exits=[2]), {2, 3, 6}),
        (dict(depth_sampler="uniform", exits=[2], min_depth=4), {2, 4, 5, 6}),
        (dict(depth_sampler="full"), {1, 2, 3, 4, 5, 6}),
    ],
)
def test_trained_depths_are_drawn_or_have_an_exit(options, depths):
    sampler = DepthSampler(**options, layer_choice="prefix")
    assert {depth for depth in range(1, 7) if sampler.trains(depth, 6)} == depths
