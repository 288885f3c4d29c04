"""One student that works at every depth: exits, and a depth that is drawn."""

import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, HubertConfig, HubertModel

from dldkit.bin.sfm_export import main
from dldkit.errors import UserError
from dldkit.sfm.model import SFMDistillModel

NO_DROPOUT = dict(
    hidden_dropout=0.0,
    activation_dropout=0.0,
    attention_dropout=0.0,
    feat_proj_dropout=0.0,
)
NORMS = dict(
    base=dict(),
    large=dict(
        do_stable_layer_norm=True, feat_extract_norm="layer", feat_proj_layer_norm=True
    ),
)
# of the first n layers, those that carry three teacher layers: at thirds, rounded up
CARRIERS = {1: [1, 1, 1], 2: [1, 2, 2], 3: [1, 2, 3], 4: [2, 3, 4]}


@pytest.fixture(params=NORMS, ids=list(NORMS))
def sizes(request, student_conf):
    """A student of four layers whose LayerNorms follow or precede their blocks."""
    return {**student_conf, **NO_DROPOUT, **NORMS[request.param]}


def make(sizes, teacher=None, **options):
    """Build a model, exits after two layers, with no weight zero and no norm one."""
    options = {
        "teacher_layers": [1, 2, 3],
        "teacher_size": 16,
        "normalize": False,
        "layer_choice": "prefix",
        "exits": [2],
        **options,
    }
    torch.manual_seed(0)
    model = SFMDistillModel(sizes, teacher=str(teacher), **options)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model


@torch.no_grad()
def transformers_states(student, sizes, depth, speech):
    """What transformers' own model of the first layers gives, with its output."""
    masks = dict(layerdrop=0.0, mask_time_prob=0.0, mask_feature_prob=0.0)
    model = HubertModel(HubertConfig(**{**sizes, **masks, "num_hidden_layers": depth}))
    states = student.state_dict()
    model.load_state_dict({key: states[key] for key in model.state_dict()})
    found = model.eval()(speech, output_hidden_states=True)
    return [*found.hidden_states[:-1], found.last_hidden_state]


def loss_by_hand(projections, states, targets, depth, weight):
    """Output term + weight x mean of the layer terms, in float64."""

    def term(projection, state, target):
        matrix, bias = (p.detach().double().numpy() for p in projection.parameters())
        guess = state.double().numpy() @ matrix.T + bias
        return ((guess - target.double().numpy()) ** 2).mean()

    terms = [
        term(projection, states[layer], target)
        for projection, layer, target in zip(
            projections.layer_projections, CARRIERS[depth], targets
        )
    ]
    output = term(projections.output_projection, states[-1], targets[-1])
    return output + weight * np.mean(terms)


@pytest.mark.parametrize("training", [True, False])
def test_loss_is_the_mean_over_the_exits(sizes, wave_teacher, training):
    """Of the depth that runs and the exits below it, each with its projections."""
    teacher, directory = wave_teacher()
    model = make(sizes, directory, layer_weight=0.3).train(training)
    speech, lengths = torch.randn(2, 3000), torch.tensor([3000, 3000])
    with torch.no_grad():
        targets = teacher(speech, output_hidden_states=True).hidden_states[1:]
    # a depth that is no exit has the projections of the next one
    projections = {n: model.exit_losses["2"] for n in (1, 2)}
    projections |= {n: model.loss for n in (3, 4)}
    assert model.loss.output_projection is not projections[1].output_projection
    for depth, exits in ((4, [2, 4]), (3, [2, 3]), (2, [2]), (1, [1])):
        model.student.encoder.layers.select(range(depth))
        expected = {
            n: loss_by_hand(
                projections[n],
                transformers_states(model.student, sizes, n, speech),
                targets,
                n,
                weight=0.3,
            )
            for n in exits
        }
        loss, stats, _ = model(speech, lengths)
        mean = np.mean(list(expected.values()))
        assert loss.item() == pytest.approx(mean, rel=1e-5)
        assert stats["loss"] == loss and stats["depth"] == depth
        parts = [stats[f"loss_layer{n}"] for n in (1, 2, 3)]
        total = stats["loss_output"] + 0.3 * sum(parts) / 3
        assert total.item() == pytest.approx(mean, rel=1e-5)
        found = {k: v.item() for k, v in stats.items() if k.startswith("loss_depth")}
        if training:
            assert not found  # they would be of other depths in each step
        else:
            values = {f"loss_depth{n}": value for n, value in expected.items()}
            assert found == pytest.approx(values, rel=1e-5)


def test_what_is_deeper_than_the_draw_does_not_learn(sizes, wave_teacher):
    """A draw means the first layers; deeper exits wait, in the state dict."""
    _, directory = wave_teacher()
    weights = {4: 1, 2: 1, 1: 1}
    model = make(sizes, directory, depth_sampler=weights, exits=[1, 2])
    names = {name.split(".")[1] for name in model.state_dict() if "exit_losses" in name}
    assert names == {"1", "2"}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    drawn = set()
    model.train()
    for _ in range(20):
        optimizer.zero_grad()
        loss, stats, _ = model(torch.randn(1, 2000), torch.tensor([2000]))
        loss.backward()
        depth = int(stats["depth"])
        drawn.add(depth)
        learns = {
            name.partition(".weight")[0]
            for name, weight in model.named_parameters()
            if weight.grad is not None and weight.grad.any()
        }
        for slot in range(4):
            name = f"student.encoder.layers.{slot}.final_layer_norm"
            assert (name in learns) == (slot < depth)
        projections = {1: "exit_losses.1", 2: "exit_losses.2", 4: "loss"}
        for n, name in projections.items():
            for part in ("output_projection", "layer_projections.0"):
                assert (f"{name}.{part}" in learns) == (n <= depth), (n, depth)
        optimizer.step()
    assert drawn == {1, 2, 4}


def test_carriers_may_be_given_for_exits(sizes, wave_teacher):
    _, directory = wave_teacher()
    speech, lengths = torch.randn(1, 2000), torch.tensor([2000])

    def losses(**options):
        stats = make(sizes, directory, **options).eval()(speech, lengths)[1]
        return [stats["loss_depth2"].item(), stats["loss_depth4"].item()]

    usual, named = losses(), losses(student_layers={2: [2, 2, 2]})
    assert named[0] != usual[0] and named[1] == usual[1]
    assert losses(carried_by="last")[0] == named[0]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(layer_choice="random"), "layer_choice: random.*set layer_choice: prefix"),
        (dict(layer_choice="even"), "exits .2. with layer_choice: even"),
        (dict(layer_choice="first"), "unknown layer_choice 'first'"),
        (dict(exits=[2, 4]), "4 is no depth below the 4 layers"),
        (dict(exits=0), "exits: 0: write a number above 0"),
        (dict(depth_sampler={5: 1, 2: 1}), "has a depth above the 4 layers"),
    ],
    ids=str,
)
def test_refuses_exits_that_can_not_be(student_conf, options, message):
    with pytest.raises(UserError, match=message):
        make(student_conf, **options)


@pytest.fixture
def trained(sizes, wave_teacher, save_training):
    """Return a function that saves a training; it gives the checkpoint and student."""

    def saved(**model_conf):
        _, teacher = wave_teacher()
        return save_training(sizes, teacher, **model_conf)

    return saved


def test_one_training_gives_a_student_of_each_depth(trained, tmp_path):
    """Bit by bit what runs at that depth, and what the exit of a deeper run gives."""
    weights = {4: 1, 2: 1, 1: 1}
    conf = dict(exits=[1, 2], layer_choice="prefix", depth_sampler=weights)
    checkpoint, model = trained(**conf)
    assert any(key.startswith("exit_losses.2.") for key in model.state_dict())
    speech, lengths = torch.randn(2, 4000), torch.tensor([4000, 4000])
    exits = []  # inputs of the exits' projections, of one forward at full depth
    for loss in (*model.exit_losses.values(), model.loss):
        loss.output_projection.register_forward_pre_hook(
            lambda _, args: exits.append(args[0])
        )
    model._teacher = lambda *_: ([torch.zeros(2, 12, 16)] * 3, torch.tensor([12, 12]))
    model(speech, lengths)
    for depth in (1, 2, 3, 4):
        hf = tmp_path / f"hf{depth}"
        command = ["--model_file", checkpoint, "--output_dir", hf, "--depth", depth]
        main(list(map(str, command)))
        plain = AutoModel.from_pretrained(hf)
        assert plain.config.student_layers == list(range(depth))
        saved = load_file(hf / "model.safetensors")
        assert not [key for key in saved if "projection" in key and "feat" not in key]
        assert len(saved) == len(plain.state_dict())
        model.student.encoder.layers.select(range(depth))
        with torch.no_grad():
            found = plain(speech, output_hidden_states=True)
            states = model.hidden_states(speech, lengths)
        for a, b in zip(found.hidden_states[:-1], states[:-1], strict=True):
            assert torch.equal(a, b)
        assert torch.equal(found.last_hidden_state, states[-1])
        if depth != 3:
            assert torch.equal(exits[{1: 0, 2: 1, 4: 2}[depth]], states[-1])


@pytest.mark.parametrize(
    "choice, words, layers",
    [
        ("prefix", [], [0, 1]),
        ("prefix", ["--selector", "even"], [0, 3]),
        ("even", [], [0, 3]),
        ("random", [], [0, 3]),
    ],
)
def test_a_depth_is_exported_as_it_was_trained(
    trained, tmp_path, choice, words, layers
):
    checkpoint, _ = trained(depth_sampler="uniform", layer_choice=choice)
    command = ["--model_file", str(checkpoint), "--output_dir", str(tmp_path / "hf")]
    main([*command, "--depth", "2", *words])
    assert AutoModel.from_pretrained(tmp_path / "hf").config.student_layers == layers


def test_a_depth_that_was_not_trained_is_warned_of(trained, tmp_path, caplog):
    checkpoint, _ = trained(exits=[1], layer_choice="prefix")
    command = ["--model_file", str(checkpoint), "--output_dir", str(tmp_path / "hf")]
    for depth in (1, 4):
        main([*command, "--depth", str(depth)])
    assert "was not trained" not in caplog.text
    main([*command, "--depth", "2"])
    assert "depth 2 was not trained" in caplog.text


def test_an_exit_of_another_training_is_refused(trained, tmp_path):
    """Its weights would be left out of a model without it."""
    checkpoint, _ = trained(exits=[1], layer_choice="prefix")
    config = checkpoint.parent / "config.yaml"
    config.write_text(re.sub(r"exits:\n *- 1\n", "exits: []\n", config.read_text()))
    with pytest.raises(SystemExit):
        main(["--model_file", str(checkpoint), "--output_dir", str(tmp_path / "hf")])
    assert not (tmp_path / "hf").exists()
