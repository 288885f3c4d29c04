import itertools

import numpy as np
import pytest
import torch

from dldkit.depth.growth import copy_maps
from dldkit.errors import UserError
from dldkit.sfm.loss import HiddenStateLoss, carriers, carriers_of_copies, trim
from dldkit.sfm.model import SFMDistillModel

# of three teacher layers, by the student's depth
TABLE = {3: [1, 2, 3], 6: [2, 4, 6], 9: [3, 6, 9], 12: [4, 8, 12]}
LENGTHS = torch.tensor([7, 4])


@pytest.fixture
def states():
    """Hidden states of 6 student layers and their input, and of 3 teacher layers."""
    generator = torch.Generator().manual_seed(0)
    student = [torch.randn(2, 7, 5, generator=generator) for _ in range(7)]
    teacher = [torch.randn(2, 7, 4, generator=generator) for _ in range(3)]
    return student, teacher


def loss_of(distance="mse", layer_weight=0.5, layers=(2, 4, 9)):
    torch.manual_seed(1)
    return HiddenStateLoss(5, 4, layers, layer_weight, distance)


def by_hand(loss, student, teacher, carried_by, distance):
    """Output term, and the term of each layer, in numpy, one frame after the other."""

    def term(projection, states, targets):
        weight, bias = (p.detach().double().numpy() for p in projection.parameters())
        values = []
        for utt, frames in enumerate(LENGTHS.tolist()):
            for frame in range(frames):
                guess = weight @ states[utt, frame].double().numpy() + bias
                target = targets[utt, frame].double().numpy()
                if distance == "mse":
                    values.append(((guess - target) ** 2).sum() / 4)
                else:
                    norms = np.sqrt((guess**2).sum()) * np.sqrt((target**2).sum())
                    cosine = (guess * target).sum() / norms
                    distance_1 = np.abs(guess - target).sum() / 4
                    values.append(distance_1 - np.log(1 / (1 + np.exp(-cosine))))
        return sum(values) / 11

    layers = [
        term(loss.layer_projections[i], student[carried_by[i]], teacher[i])
        for i in range(3)
    ]
    return term(loss.output_projection, student[6], teacher[2]), layers


@pytest.mark.parametrize("carried_by", [None, [1, 1, 5]])
@pytest.mark.parametrize("layer_weight", [0.5, 0.0, 2.0])
@pytest.mark.parametrize("distance", ["mse", "l1_cosine"])
def test_is_what_a_hand_computes(states, distance, layer_weight, carried_by):
    loss = loss_of(distance, layer_weight)
    value, stats = loss(*states, LENGTHS, carried_by)
    output, layers = by_hand(loss, *states, carried_by or [2, 4, 6], distance)
    total = output + layer_weight * np.mean(layers)
    assert value.item() == pytest.approx(total, rel=1e-5)
    assert list(stats) == ["loss_output", *(f"loss_layer{n}" for n in (2, 4, 9))]
    found = [stat.item() for stat in stats.values()]
    assert found == pytest.approx([output, *layers], rel=1e-5)
    assert value.requires_grad
    assert not any(stat.requires_grad for stat in stats.values())


@pytest.mark.parametrize("distance", ["mse", "l1_cosine"])
def test_padding_is_masked(states, distance):
    loss = loss_of(distance)
    student, teacher = states
    student[3].requires_grad_()
    value, _ = loss(student, teacher, LENGTHS, [2, 3, 6])
    (gradient,) = torch.autograd.grad(value, student[3])
    assert gradient[0].any() and gradient[1, :4].any() and not gradient[1, 4:].any()
    for state in (*student, *teacher):
        state.data[1, 4:] = 1e6
    assert torch.equal(loss(student, teacher, LENGTHS, [2, 3, 6])[0], value)
    teacher[1][1, 3] += 1
    assert loss(student, teacher, LENGTHS, [2, 3, 6])[0] != value


def test_a_perfect_student_has_no_loss(states):
    loss = HiddenStateLoss(4, 4, [1, 2, 3])
    for projection in (loss.output_projection, *loss.layer_projections):
        torch.nn.init.eye_(projection.weight)
        torch.nn.init.zeros_(projection.bias)
    teacher = states[1]
    assert loss([teacher[0], *teacher], teacher, LENGTHS)[0] == 0


def test_target_norm_tames_outlier_dimensions(states):
    """Each frame of the teacher has zero mean and unit variance."""
    student, teacher = states
    torch.manual_seed(1)
    loss = HiddenStateLoss(5, 4, [2, 4, 9], target_norm="layer")
    outliers = [300 * state + 7 for state in teacher]
    value, _ = loss(student, outliers, LENGTHS)
    normed = []
    for state in teacher:
        spread = state.var(-1, unbiased=False, keepdim=True).sqrt()
        normed.append((state - state.mean(-1, keepdim=True)) / spread)
    expected, _ = loss_of()(student, normed, LENGTHS)
    assert value.item() == pytest.approx(expected.item(), rel=1e-3)
    assert loss_of()(student, outliers, LENGTHS)[0] > 1000 * value


def test_refuses_an_unknown_target_norm():
    with pytest.raises(UserError, match="target_norm 'batch': choose none or layer"):
        HiddenStateLoss(5, 4, [1], target_norm="batch")


def test_each_comparison_has_its_own_projection():
    shapes = {k: tuple(v.shape) for k, v in loss_of().state_dict().items()}
    names = ["output_projection", *(f"layer_projections.{i}" for i in range(3))]
    expected = {f"{name}.weight": (4, 5) for name in names}
    assert shapes == {**expected, **{f"{name}.bias": (4,) for name in names}}


@pytest.mark.parametrize("depth, expected", TABLE.items())
def test_carriers_of_three_teacher_layers(depth, expected):
    assert carriers(depth, 3) == expected


@pytest.mark.parametrize("start, num_stages", itertools.product([1, 2, 3, 4], [1, 4]))
def test_carriers_are_the_last_clones_of_each_group(start, num_stages):
    """Each layer of the first stage leads a group; the copies are followed."""
    depths = [start * stage for stage in range(1, num_stages + 1)]
    groups = list(range(start))
    for depth, copy_map in zip(depths, [None, *copy_maps("interleave", depths)]):
        if copy_map is not None:
            groups = [groups[source] for source in copy_map]
        last = [max(i for i, g in enumerate(groups) if g == n) for n in range(start)]
        assert carriers(depth, start) == [i + 1 for i in last], depth


@pytest.mark.parametrize(
    "method, expected",
    [
        ("interleave", TABLE),  # where copies and positions are the same
        ("gradstack", {3: [1, 2, 3], 6: [4, 5, 6], 9: [7, 8, 9], 12: [10, 11, 12]}),
        ("midas", {3: [1, 2, 3], 6: [4, 5, 6], 9: [7, 8, 9], 12: [10, 11, 12]}),
        ("stack", {3: [1, 2, 3], 6: [4, 5, 6], 9: [7, 8, 9], 12: [10, 11, 12]}),
    ],
)
def test_carriers_follow_copies(method, expected):
    assert carriers_of_copies(method, [3, 6, 9, 12], 3) == expected


def test_a_carrier_is_a_copy_of_the_carrier_before():
    """Followed through the copy maps, for stages that are no multiples."""
    depths = [4, 6, 9]
    found = carriers_of_copies("gradstack", depths, 2)
    origins = [1, 2, 3, 4]
    for depth, copy_map in zip(depths, [range(4), *copy_maps("gradstack", depths)]):
        origins = [origins[source] for source in copy_map]
        assert [origins[layer - 1] for layer in found[depth]] == [2, 4]
        assert not {2} & set(origins[found[depth][0] :])  # it is the last copy


@pytest.mark.parametrize("depth, teachers", itertools.product(range(1, 14), [1, 2, 5]))
def test_carriers_are_spread_over_any_depth(depth, teachers):
    found = carriers(depth, teachers)
    assert len(found) == teachers and found == sorted(found)
    assert found[-1] == depth and found[0] >= 1
    assert len(set(found)) == min(depth, teachers)
    if teachers <= depth:
        steps = np.diff([0, *found])
        assert steps.max() - steps.min() <= 1


@pytest.mark.parametrize("depth", TABLE)
@torch.no_grad()
def test_a_layer_moves_the_terms_that_hear_it(depth, student_conf):
    """Which of the student's layers is heard by which term, at each depth."""
    torch.manual_seed(0)
    model = SFMDistillModel(
        {**student_conf, "num_hidden_layers": 12},
        teacher_layers=[1, 2, 3],
        teacher_size=4,
    ).eval()
    layers = model.student.encoder.layers
    layers.select(range(depth))
    speech, lengths = torch.randn(1, 2000), torch.tensor([2000])
    targets = [torch.randn(1, 6, 4) for _ in range(3)]

    def terms():
        states = model.hidden_states(speech, lengths)
        return model.loss(states, targets, torch.tensor([6]))[1].values()

    before = list(terms())
    for slot, layer in enumerate(layers.children()):
        layer.final_layer_norm.bias[0] += 1
        output, *moved = [a != b for a, b in zip(before, terms())]
        layer.final_layer_norm.bias[0] -= 1
        heard = slot < depth
        assert bool(output) == heard, slot
        assert moved == [heard and slot + 1 <= n for n in TABLE[depth]], slot


def frames(*counts):
    lengths = torch.tensor(counts)
    states = [
        torch.arange(max(counts)).float().expand(2, -1)[..., None] + i for i in (0, 5)
    ]
    return states, lengths


@pytest.mark.parametrize(
    "ours, theirs, left",
    [
        ((9, 6), (9, 6), [9, 6]),
        ((9, 6), (10, 6), [9, 6]),
        ((9, 7), (9, 6), [9, 6]),
        ((10, 6), (9, 7), [9, 6]),
    ],
)
def test_one_frame_of_difference_is_trimmed(ours, theirs, left):
    student, teacher, lengths = trim(*frames(*ours), *frames(*theirs))
    assert lengths.tolist() == left
    for states in (student, teacher):
        for i, state in enumerate(states):
            assert state.shape == (2, left[0], 1)
            assert state[1, :, 0].tolist() == [5 * i + n for n in range(left[0])]


@pytest.mark.parametrize("theirs", [(11, 6), (9, 4), (18, 12), (7, 6)])
def test_refuses_two_frames_of_difference(theirs):
    with pytest.raises(UserError, match="frame rates differ.*conv_stride"):
        trim(*frames(9, 6), *frames(*theirs))


def test_a_group_of_layers_is_learnt_as_its_mean(states):
    """The hand computes the mean, and the loss of layers says what it costs."""
    student, (one, two, three) = states
    mean = torch.tensor((one.double() + two.double()).numpy() / 2).float()
    grouped, plain = loss_of(layers=[[2, 4], 9]), loss_of(layers=[4, 9])
    plain.load_state_dict(grouped.state_dict())
    value, stats = grouped(student, [one, two, three], LENGTHS)
    expected, parts = plain(student, [mean, three], LENGTHS)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert list(stats) == ["loss_output", "loss_layer2_4", "loss_layer9"]
    for a, b in zip(stats.values(), parts.values()):
        assert a.item() == pytest.approx(b.item(), rel=1e-5)
    assert grouped.teacher_layers == [2, 4, 9]
    last = loss_of(layers=[2, [4, 9]])  # the output learns the last mean
    (target,) = last.targets([one, two, three])[1:]
    assert torch.allclose(target, (two + three) / 2)


@pytest.mark.parametrize(
    "layers", [[], [0, 1], [2, 1], [1, 1], [-1], [[1, 2], 2], [[2, 1]], [[], 1]]
)
def test_refuses_layers_out_of_order(layers):
    with pytest.raises(UserError, match="teacher_layers .*ascending"):
        loss_of(layers=layers)


def test_refuses_an_unknown_distance():
    with pytest.raises(UserError, match="'l2': choose mse or l1_cosine"):
        loss_of("l2")
