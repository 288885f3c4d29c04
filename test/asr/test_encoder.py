import inspect

import pytest
import torch
from espnet2.asr.ctc import CTC
from espnet2.tasks.asr import encoder_choices
from espnet2.torch_utils.load_pretrained_model import load_pretrained_model

from dldkit.errors import UserError


def test_full_depth_is_bit_identical_to_espnet(make_encoder, encoder_name, features):
    theirs = make_encoder(encoder_name, 12).eval()
    ours = make_encoder(f"ld_{encoder_name}", 12, seed=1).eval()
    ours.load_state_dict(theirs.state_dict())
    for output, expected in zip(ours(*features), theirs(*features)):
        assert (output is expected is None) or torch.equal(output, expected)


def test_weights_are_drawn_as_espnet_draws_them(make_encoder, encoder_name):
    theirs = make_encoder(encoder_name, seed=5).state_dict()
    ours = make_encoder(f"ld_{encoder_name}", seed=5).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_training_at_full_depth_is_bit_identical(make_encoder, encoder_name, features):
    """Outputs, gradients and running statistics of two steps, with dropout."""
    trained = []
    for prefix, options in (("", {}), ("ld_", {"depth_sampler": "full"})):
        encoder = make_encoder(prefix + encoder_name, dropout_rate=0.2, **options)
        torch.manual_seed(11)
        encoder.train()
        outputs = []
        for _ in range(2):
            output = encoder(*features)[0]
            output.square().sum().backward()
            outputs.append(output.detach())
        gradients = {n: p.grad for n, p in encoder.named_parameters()}
        trained.append((outputs, gradients, encoder.state_dict()))
    (outputs, gradients, states), (our_outputs, our_gradients, our_states) = trained
    assert all(map(torch.equal, our_outputs, outputs))
    for name, gradient in gradients.items():
        assert torch.equal(our_gradients[name], gradient), name
    assert list(our_states) == list(states)
    for key, value in states.items():
        assert torch.equal(our_states[key], value), key


def test_intermediate_outputs_and_conditioning(make_encoder, features):
    ctc = CTC(7, 8)
    outputs = []
    for prefix in ("", "ld_"):
        encoder = make_encoder(
            f"{prefix}conformer",
            interctc_layer_idx=[1, 3],
            interctc_use_conditioning=True,
        ).eval()
        encoder.conditioning_layer = torch.nn.Linear(7, 8)
        torch.nn.init.constant_(encoder.conditioning_layer.weight, 0.3)
        torch.nn.init.zeros_(encoder.conditioning_layer.bias)
        (output, intermediate), _, _ = encoder(*features, ctc=ctc)
        outputs.append([output, *(x for _, x in intermediate)])
        assert [layer for layer, _ in intermediate] == [1, 3]
    assert all(map(torch.equal, *outputs))


def test_init_param_loads_espnets_checkpoint(
    make_encoder, encoder_name, features, tmp_path
):
    theirs = make_encoder(encoder_name, seed=2).eval()
    model = torch.nn.ModuleDict({"encoder": theirs})
    torch.save(model.state_dict(), tmp_path / "espnet.pth")
    ours = make_encoder(f"ld_{encoder_name}").eval()
    assert not torch.equal(ours(*features)[0], theirs(*features)[0])
    load_pretrained_model(
        f"{tmp_path}/espnet.pth:encoder:encoder",
        torch.nn.ModuleDict({"encoder": ours}),
        ignore_init_mismatch=False,
    )
    assert torch.equal(ours(*features)[0], theirs(*features)[0])


def test_loads_back_into_espnet(make_encoder, encoder_name, features):
    ours = make_encoder(f"ld_{encoder_name}", seed=2).eval()
    theirs = make_encoder(encoder_name).eval()
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(*features)[0], theirs(*features)[0])


def test_options_are_espnets_and_ours(encoder_name, make_encoder):
    theirs = inspect.signature(encoder_choices.get_class(encoder_name)).parameters
    ours = inspect.signature(encoder_choices.get_class(f"ld_{encoder_name}")).parameters
    new = dict(
        depth_sampler="bernoulli",
        keep_prob=0.5,
        min_depth=1,
        layer_choice="random",
        exits=(),
        keep_final_norm=False,
    )
    assert set(ours) == set(theirs) | set(new)
    for name, default in new.items():
        assert ours[name].default == default
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default


@pytest.mark.parametrize("name", ["conformer", "transformer", "e_branchformer"])
def test_refuses_espnets_layer_drop_rate(make_encoder, name):
    with pytest.raises(UserError, match="layer_drop_rate.*keep_prob"):
        make_encoder(f"ld_{name}", layer_drop_rate=0.5)
    make_encoder(f"ld_{name}", layer_drop_rate=0.0)


def test_refuses_an_unknown_sampler(make_encoder):
    with pytest.raises(UserError, match="depth_sampler 'beta'"):
        make_encoder("ld_conformer", depth_sampler="beta")


def test_wrong_types_are_refused_as_espnet_refuses_them(make_encoder):
    with pytest.raises(Exception, match="output_size|attention_heads|num_blocks"):
        make_encoder("ld_conformer", num_blocks="12")


class TestExits:
    def test_are_the_outputs_of_their_depths(
        self, make_encoder, encoder_name, features
    ):
        encoder = make_encoder(
            f"ld_{encoder_name}", 6, layer_choice="prefix", exits=2
        ).eval()
        assert encoder.exits == [2, 4]
        with encoder.collected((1, 2, 4, 6)) as outputs:
            full = encoder(*features)[0]
        assert list(outputs) == [1, 2, 4]  # 6 is the encoder's own output
        for depth, output in outputs.items():
            encoder.set_depth(depth)
            assert torch.equal(output, encoder(*features)[0]), depth
        encoder.set_depth(None)
        assert torch.equal(full, encoder(*features)[0])

    def test_are_just_those_below_the_depth_that_runs(self, make_encoder, features):
        encoder = make_encoder("ld_conformer", 6, layer_choice="prefix", exits=2)
        for depth, reached in ((1, []), (2, []), (3, [2]), (4, [2]), (6, [2, 4])):
            with encoder.running(range(depth)), encoder.collected((2, 4)) as outputs:
                encoder(*features)
            assert list(outputs) == reached

    def test_hand_down_a_share_of_the_gradient(
        self, make_encoder, encoder_name, features
    ):
        encoder = make_encoder(
            f"ld_{encoder_name}", 4, layer_choice="prefix", exits=2
        ).eval()
        below = {
            name
            for name, _ in encoder.named_parameters()
            if name.startswith(("embed.", "encoders.0.", "encoders.1."))
        }

        def gradients(share, of_exit=False):
            encoder.zero_grad()
            with encoder.collected((2,), share) as outputs:
                output, _, _ = encoder(*features)
            (outputs[2] if of_exit else output).pow(3).sum().backward()
            found = {name: p.grad for name, p in encoder.named_parameters()}
            return {k: v.clone() for k, v in found.items() if v is not None}

        whole, half, none = map(gradients, (1.0, 0.5, 0.0))
        assert any(whole[name].abs().max() > 0 for name in below & set(whole))
        for name, gradient in whole.items():
            if name in below:
                torch.testing.assert_close(half[name], gradient / 2)
                assert not none[name].any()
            else:
                assert torch.equal(half[name], gradient)
                assert torch.equal(none[name], gradient)
        own = gradients(1.0, of_exit=True)
        for name, gradient in gradients(0.0, of_exit=True).items():
            assert torch.equal(gradient, own[name])

    def test_may_be_listed(self, make_encoder):
        options = dict(layer_choice="prefix")
        assert make_encoder("ld_conformer", exits=[3, 1], **options).exits == [1, 3]
        assert make_encoder("ld_conformer", exits=4, **options).exits == []
        assert make_encoder("ld_conformer", exits=None, **options).exits == []

    @pytest.mark.parametrize(
        "options, message",
        [
            (dict(exits=[2]), "layer_choice: random.*set layer_choice: prefix"),
            (dict(exits=2, layer_choice="even"), "layer_choice: even"),
            (dict(exits=[4], layer_choice="prefix"), "4 is no depth below the 4"),
            (dict(exits=[0], layer_choice="prefix"), "0 is no depth"),
            (dict(exits=["a"], layer_choice="prefix"), "exits: \\['a'\\] is no"),
            (dict(exits=0, layer_choice="prefix"), "above 0"),
            (
                dict(exits=2, layer_choice="prefix", interctc_layer_idx=[2]),
                "keep one of them",
            ),
        ],
    )
    def test_refuses_exits_that_can_not_be(self, make_encoder, options, message):
        with pytest.raises(UserError, match=message):
            make_encoder("ld_conformer", **options)


@pytest.mark.parametrize(
    "options, layers",
    [
        (dict(depth_sampler="uniform"), (0, 3)),
        (dict(depth_sampler="uniform", layer_choice="even"), (0, 3)),
        (dict(depth_sampler="uniform", layer_choice="prefix"), (0, 1)),
        (dict(depth_sampler="full"), (0, 3)),
        (dict(depth_sampler="full", interctc_layer_idx=[2]), (0, 1)),
    ],
)
def test_a_depth_means_the_layers_that_were_trained(make_encoder, options, layers):
    encoder = make_encoder("ld_conformer", **options)
    assert encoder.choose_layers(2) == layers


def test_intermediate_ctc_without_the_final_norm_is_no_exit(make_encoder):
    """What ESPnet's E-Branchformer gives its intermediate CTC."""
    options = dict(depth_sampler="full", interctc_layer_idx=[2])
    assert make_encoder("ld_e_branchformer", **options).choose_layers(2) == (0, 3)


def test_a_depth_sampler_may_give_weights(make_encoder):
    encoder = make_encoder("ld_conformer", depth_sampler={4: 1.0, 1: 3.0})
    depths = set()
    for _ in range(50):
        depths.add(len(encoder.active_layers))
        torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]).step()
    assert depths == {1, 4}
    with pytest.raises(UserError, match="above the 4 layers"):
        make_encoder("ld_conformer", depth_sampler={5: 1.0})
