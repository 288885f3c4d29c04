import pytest

from dldkit.depth.selector import select_layers
from dldkit.errors import UserError

DEPTHS = [(n, depth) for n in (1, 2, 3, 6, 12, 17, 24) for depth in range(1, n + 1)]


@pytest.mark.parametrize("num_layers, depth", DEPTHS)
def test_even(num_layers, depth):
    layers = select_layers(num_layers, depth)
    assert len(set(layers)) == len(layers) == depth
    assert list(layers) == sorted(layers)
    assert layers[0] == 0
    if depth > 1:
        assert layers[-1] == num_layers - 1
        gaps = {b - a for a, b in zip(layers, layers[1:])}
        assert max(gaps) - min(gaps) <= 1  # evenly spread


@pytest.mark.parametrize("num_layers, depth", DEPTHS)
def test_prefix(num_layers, depth):
    assert select_layers(num_layers, depth, selector="prefix") == tuple(range(depth))


def test_twelve_layers():
    chosen = {depth: select_layers(12, depth) for depth in (2, 4, 6)}
    assert chosen == {2: (0, 11), 4: (0, 4, 7, 11), 6: (0, 2, 4, 7, 9, 11)}


def test_nothing_asked_is_everything():
    assert select_layers(3) == (0, 1, 2)


def test_layers_are_put_in_order():
    assert select_layers(8, layers=[7, 0, 3]) == (0, 3, 7)


@pytest.mark.parametrize(
    "request_, message",
    [
        (dict(depth=0), "depth 0 .* 12 layers; choose 1 to 12"),
        (dict(depth=13), "depth 13 .* 12 layers"),
        (dict(layers=[0, 12]), r"layers \[0, 12\] .* 0 to 11"),
        (dict(layers=[3, 3]), r"layers \[3, 3\]"),
        (dict(layers=[]), r"layers \[\]"),
        (dict(depth=2, layers=[0, 1]), "either a depth or a list of layers"),
        (dict(depth=2, selector="odd"), "'odd': choose even or prefix"),
    ],
)
def test_refuses(request_, message):
    with pytest.raises(UserError, match=message):
        select_layers(12, **request_)
