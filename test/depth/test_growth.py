import copy
import re

import pytest
import torch
from transformers import HubertConfig, HubertModel

from dldkit.depth.growth import boundaries, copy_maps, grow
from dldkit.depth.sampler import DepthSampler
from dldkit.errors import UserError
from dldkit.sfm.student import build_student

# Copy maps written by hand: old positions, from 0, of each new position.
TABLES = [
    ("interleave", [3, 6], "001122"),
    ("interleave", [3, 6, 9], "011233455"),
    ("interleave", [3, 6, 9, 12], "012234556788"),
    ("interleave", [3, 12], "000011112222"),
    ("interleave", [3, 6, 12], "001122334455"),
    ("interleave", [6, 12], "001122334455"),
    ("interleave", [4, 8], "00112233"),
    ("interleave", [4, 8, 16], "0011223344556677"),
    ("interleave", [2, 4], "0011"),
    ("interleave", [2, 4, 6], "011233"),
    ("interleave", [2, 4, 10], "0011122333"),
    ("interleave", [2, 6, 10], "0112234455"),
    ("interleave", [1, 3, 4], "0122"),
    ("stack", [3, 6], "012012"),
    ("stack", [3, 6, 9], "012345012"),
    ("stack", [3, 6, 9, 12], "012345678012"),
    ("stack", [3, 12], "012012012012"),
    ("stack", [4, 8, 16], "0123456701234567"),
    ("stack", [2, 4, 6], "012301"),
    ("stack", [6, 12], "012345012345"),
    ("gradstack", [3, 6], "012012"),
    ("gradstack", [3, 6, 9], "012345345"),
    ("gradstack", [3, 6, 9, 12], "012345678678"),
    ("gradstack", [4, 8, 16], "0123456701234567"),
    ("gradstack", [2, 4, 6], "012323"),
    ("gradstack", [6, 12], "012345012345"),
    ("gradstack", [4, 5, 7], "0123434"),
    ("midas", [3, 6], "012012"),
    ("midas", [3, 6, 9], "012012345"),
    ("midas", [3, 6, 9, 12], "012345345678"),
    ("midas", [4, 8, 16], "0123456701234567"),
    ("midas", [2, 4, 6], "010123"),
    ("midas", [6, 8], "01232345"),
    ("midas", [6, 8, 10], "0123234567"),
    ("midas", [6, 12], "012345012345"),
    ("midas", [5, 6], "012234"),
]
METHODS = ["interleave", "stack", "gradstack", "midas"]


@pytest.mark.parametrize("method, depths, table", TABLES)
def test_copy_map(method, depths, table):
    maps = copy_maps(method, depths)
    assert [len(m) for m in maps] == depths[1:]
    assert maps[-1] == tuple(map(int, table))


@pytest.mark.parametrize(
    "method, table",
    [
        ("interleave", "111122223333"),
        ("stack", "123123123123"),
        ("gradstack", "123123123123"),
        ("midas", "123123123123"),
    ],
)
def test_what_becomes_of_three_layers(method, table):
    layers = "123"
    for copy_map in copy_maps(method, [3, 6, 9, 12]):
        layers = "".join(layers[source] for source in copy_map)
    assert layers == table


def test_a_single_stage_does_not_grow():
    assert copy_maps("stack", [12]) == []


@pytest.mark.parametrize("method", METHODS)
def test_a_refusal_names_depths_that_fit(method):
    """All depths are tried: those that a refusal names fit, and it is complete."""
    refused = 0
    for start in range(1, 7):
        for depths in ([start], [start, 2 * start]):
            old = depths[-1]
            fitting, named = set(), set()
            for new in range(old + 1, old + 2 * start + 1):
                try:
                    copy_maps(method, [*depths, new])
                    fitting.add(new)
                except UserError as refusal:
                    refused += 1
                    message = f"{method} can not grow a stack of {old} layers to {new}:"
                    assert message in str(refusal)
                    (would,) = re.findall(r": ([\d or]+) would fit$", str(refusal))
                    named.add(tuple(map(int, would.split(" or "))))
            if named:
                assert len(named) == 1
                (named,) = named
                assert set(named) >= fitting
            for new in named:
                copy_maps(method, [*depths, new])
    assert refused > 20


@pytest.mark.parametrize(
    "method, depths, message",
    [
        ("interleave", [3, 6, 10], "6 layers to 10: 9 or 12 would fit"),
        ("stack", [4, 6], "4 layers to 6: 8 or 12 would fit"),
        ("gradstack", [3, 12], "3 layers to 12: 4 or 5 or 6 would fit"),
        ("midas", [6, 10], "6 layers to 10: 7 or 8 or 9 or 12 would fit"),
        ("zip", [3, 6], "'zip': choose interleave, stack, gradstack, midas"),
        ("stack", [], "have to grow"),
        ("stack", [0, 3], "at least 1 layer"),
        ("stack", [6, 3], r"depths \[6, 3\] have to grow"),
        ("stack", [3, 3], "have to grow"),
    ],
)
def test_refuses_depths(method, depths, message):
    with pytest.raises(UserError, match=message):
        copy_maps(method, depths)


@pytest.mark.parametrize(
    "total, stages, options, expected",
    [
        (100, 4, dict(), [25, 50, 75]),
        (10, 4, dict(), [2, 5, 8]),  # 2.5, 5, 7.5: halves go to the even number
        (11, 4, dict(), [3, 6, 8]),  # 2.75, 5.5, 8.25
        (4, 4, dict(), [1, 2, 3]),
        (7, 1, dict(), []),
        (100, 4, dict(schedule="prop"), [10, 30, 60]),  # 1 : 2 : 3 : 4
        (77, 4, dict(schedule="prop"), [8, 23, 46]),  # 7.7, 23.1, 46.2
        (60, 3, dict(schedule="prop"), [10, 30]),  # 1 : 2 : 3
        (100, 4, dict(schedule="prop", alpha=2.0), [3, 17, 47]),  # 1 : 4 : 9 : 16
        (1000, 4, dict(schedule="prop", alpha=-1.0), [480, 720, 880]),
        (100, 4, dict(schedule="prop", alpha=0.0), [25, 50, 75]),
        (
            50,
            4,
            dict(schedule="fractions", fractions=[0.1, 0.2, 0.3, 0.4]),
            [5, 15, 30],
        ),
        (15, 3, dict(schedule="fractions", fractions=[0.5, 0.1, 0.4]), [8, 9]),
    ],
)
def test_boundaries(total, stages, options, expected):
    assert boundaries(total, stages, **options) == expected


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(schedule="late"), "'late': choose equal, prop or fractions"),
        (dict(total_steps=3), r"3 optimiser steps are too few for 4 stages \(equal\)"),
        (dict(total_steps=12, schedule="prop", alpha=4.0), r"too few .* \(prop\)"),
        (dict(schedule="fractions"), r"fractions \[\] do not fit: 4 numbers"),
        (dict(schedule="fractions", fractions=[0.5, 0.5]), "do not fit: 4 numbers"),
        (dict(schedule="fractions", fractions=[0.1, 0.2, 0.3, 0.3]), "sum to 1"),
        (dict(schedule="fractions", fractions=[0.5, 0.0, 0.1, 0.4]), "above 0"),
        (dict(schedule="fractions", fractions=[1.5, -0.9, 0.2, 0.2]), "above 0"),
    ],
)
def test_refuses_schedules(options, message):
    with pytest.raises(UserError, match=message):
        boundaries(**{"total_steps": 100, "stages": 4, **options})


OPTIMIZERS = dict(
    adam=lambda p: torch.optim.Adam(p, lr=0.01),
    adamw_fused=lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    sgd_momentum=lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
)


NO_DROPOUT = dict(dropout_rate=0.0, positional_dropout_rate=0.0)


class Conformer:
    """An encoder of ESPnet, whose layers have BatchNorm buffers."""

    def __init__(self, make_encoder, features):
        self.make_encoder = make_encoder
        self.inputs = features
        self.gated = make_encoder("ld_conformer", 6, depth_sampler="full", **NO_DROPOUT)
        self.layers = self.gated.encoders

    def plain(self, depth: int) -> torch.nn.Module:
        return self.make_encoder("conformer", depth, seed=5, **NO_DROPOUT)

    def run(self, model):
        return model(*self.inputs)[0]

    @staticmethod
    def layers_of(model):
        return model.encoders


class Hubert:
    """A student of foundation-model distillation."""

    CONF = dict(
        hidden_size=16,
        num_hidden_layers=6,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=[8] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
    )

    def __init__(self, *_):
        torch.manual_seed(0)
        self.gated = build_student(self.CONF, DepthSampler("full"))
        self.layers = self.gated.encoder.layers
        self.inputs = torch.randn(2, 4000, generator=torch.Generator().manual_seed(1))

    def plain(self, depth: int) -> torch.nn.Module:
        config = {**self.CONF, "num_hidden_layers": depth}
        off = dict(layerdrop=0.0, mask_time_prob=0.0)
        return HubertModel(HubertConfig(**config, **off)).train()

    def run(self, model):
        return model(self.inputs).last_hidden_state

    @staticmethod
    def layers_of(model):
        return model.encoder.layers


@pytest.fixture(params=[Conformer, Hubert])
def shallow(request, make_encoder, features):
    """A model with six slots, of which two run."""
    case = request.param(make_encoder, features)
    case.layers.select(range(2))
    return case


def train(case, model, optimizer, steps: int) -> None:
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        (case.run(model) - step).square().mean().backward()
        optimizer.step()


def by_hand(case, optimizer, copy_map, optimizer_state, make_optimizer):
    """Build the deeper plain model and its optimiser out of copies."""
    plain = case.plain(len(copy_map))
    slots = list(case.layers.children())
    layers = case.layers_of(plain)
    shared = {
        key: value
        for key, value in case.gated.state_dict().items()
        if not re.match(r"(encoders|encoder\.layers)\.\d", key)
    }
    missing = plain.load_state_dict(shared, strict=False)
    assert not missing.unexpected_keys
    for layer, source in zip(layers, copy_map, strict=True):
        layer.load_state_dict(slots[source].state_dict())

    plain_optimizer = make_optimizer(plain.parameters())
    old = dict(case.gated.named_parameters())
    ours = dict(case.layers.named_parameters())
    for name, parameter in plain.named_parameters():
        found = re.match(r"(?:encoders|encoder\.layers)\.(\d+)\.(.*)", name)
        if not found:
            source = old[name]
        else:
            position, rest = int(found[1]), found[2]
            if (
                optimizer_state == "zero"
                and copy_map.index(copy_map[position]) != position
            ):
                continue
            source = ours[f"{copy_map[position]}.{rest}"]
        if source in optimizer.state:
            plain_optimizer.state[parameter] = copy.deepcopy(optimizer.state[source])
    return plain, plain_optimizer


@pytest.mark.parametrize("optimizer_state", ["copy", "zero"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_grows_into_the_model_built_by_hand(shallow, method, name, optimizer_state):
    """Its function, and all that it learns next, are those of plain deeper models."""
    case = shallow
    keys = list(case.gated.state_dict())
    optimizer = OPTIMIZERS[name](case.gated.parameters())
    train(case, case.gated, optimizer, 3)
    for copy_map in copy_maps(method, [2, 4, 6]):
        plain, plain_optimizer = by_hand(
            case, optimizer, copy_map, optimizer_state, OPTIMIZERS[name]
        )
        grow(case.layers, copy_map, optimizer, optimizer_state)
        assert case.layers.active == tuple(range(len(copy_map)))
        for steps in (0, 2):
            train(case, case.gated, optimizer, steps)
            train(case, plain, plain_optimizer, steps)
            expected = case.run(plain.eval())
            assert torch.equal(case.run(case.gated.eval()), expected)
            ours, theirs = case.gated.state_dict(), plain.state_dict()
            for key, value in theirs.items():
                assert torch.equal(ours[key], value), key
        assert list(case.gated.state_dict()) == keys


def test_buffers_are_copied(make_encoder, features):
    """BatchNorm's, whose values come from what each layer has seen."""
    case = Conformer(make_encoder, features)
    case.layers.select(range(2))
    optimizer = torch.optim.SGD(case.gated.parameters(), lr=0.1)
    train(case, case.gated, optimizer, 2)
    norms = [layer.conv_module.norm for layer in case.layers.children()]
    means = [norm.running_mean.clone() for norm in norms]
    assert not torch.equal(means[0], means[1])
    assert [int(norm.num_batches_tracked) for norm in norms] == [2, 2, 0, 0, 0, 0]
    grow(case.layers, (0, 0, 1, 1), optimizer)
    assert [int(norm.num_batches_tracked) for norm in norms] == [2, 2, 2, 2, 0, 0]
    for norm, source in zip(norms, (0, 0, 1, 1)):
        assert torch.equal(norm.running_mean, means[source])


@pytest.mark.parametrize("optimizer_state", ["copy", "zero"])
def test_moments(optimizer_state, make_encoder, features):
    """[1 2] -> [1 1 2 2]: layer 2 moves to slot 2, and its moments with it."""
    case = Conformer(make_encoder, features)
    case.layers.select(range(2))
    optimizer = torch.optim.Adam(case.gated.parameters(), lr=0.01)
    train(case, case.gated, optimizer, 3)
    slots = list(case.layers.children())
    weights = [layer.feed_forward.w_1.weight for layer in slots]
    before = [copy.deepcopy(optimizer.state[weight]) for weight in weights[:2]]
    after_norm = copy.deepcopy(optimizer.state[case.gated.after_norm.weight])
    assert weights[2] not in optimizer.state

    grow(case.layers, (0, 0, 1, 1), optimizer, optimizer_state)

    def same(state, expected):
        assert state.keys() == expected.keys() == {"step", "exp_avg", "exp_avg_sq"}
        return all(torch.equal(state[key], expected[key]) for key in state)

    assert same(optimizer.state[weights[0]], before[0])
    assert same(optimizer.state[weights[2]], before[1])
    assert same(optimizer.state[case.gated.after_norm.weight], after_norm)
    if optimizer_state == "copy":
        assert same(optimizer.state[weights[1]], before[0])
        assert same(optimizer.state[weights[3]], before[1])
    else:
        assert weights[1] not in optimizer.state
        assert weights[3] not in optimizer.state
    assert weights[4] not in optimizer.state

    tensors = [v for w in weights[:4] for v in optimizer.state.get(w, {}).values()]
    assert len({v.data_ptr() for v in tensors}) == len(tensors)  # nothing is shared
    train(case, case.gated, optimizer, 1)
    step = 4 if optimizer_state == "copy" else 1
    assert [int(optimizer.state[w]["step"]) for w in weights[:4]] == [4, step, 4, step]


def test_layers_share_nothing_after_growth(make_encoder, features):
    case = Conformer(make_encoder, features)
    case.layers.select(range(2))
    optimizer = torch.optim.SGD(case.gated.parameters(), lr=0.1)
    grow(case.layers, (0, 0, 1, 1), optimizer)
    values = list(case.gated.state_dict().values())
    assert len({v.data_ptr() for v in values}) == len(values)
    assert len(list(case.gated.parameters())) == len(
        list(Conformer(make_encoder, features).gated.parameters())
    )
    slots = list(case.layers.children())
    first, clone = (layer.feed_forward.w_1.weight for layer in slots[:2])
    assert torch.equal(first, clone)
    train(case, case.gated, optimizer, 2)
    assert not torch.equal(first, clone)


def test_parameters_without_state_stay_without(make_encoder, features):
    """Growth before the first step, and frozen parameters."""
    case = Conformer(make_encoder, features)
    case.layers.select(range(2))
    slots = list(case.layers.children())
    slots[0].norm_final.weight.requires_grad = False
    optimizer = torch.optim.Adam(case.gated.parameters())
    grow(case.layers, (0, 1, 0, 1), optimizer)
    assert not optimizer.state
    train(case, case.gated, optimizer, 1)
    grow(case.layers, (0, 1, 2, 3, 0, 1), optimizer)
    assert slots[0].norm_final.weight not in optimizer.state
    assert slots[4].norm_final.weight not in optimizer.state
    assert slots[5].norm_final.weight in optimizer.state
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
