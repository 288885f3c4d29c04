import copy
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from espnet2.torch_utils.set_all_random_seed import set_all_random_seed
from transformers import HubertConfig, HubertModel

from dldkit.depth.layers import GatedModuleList, find_gates
from dldkit.depth.sampler import DepthSampler
from dldkit.errors import UserError


@pytest.fixture
def called():
    """Return a function that runs an encoder and lists the layers it really calls."""

    def slots(encoder, *inputs) -> list[int]:
        order = []
        hooks = [
            layer.register_forward_hook(lambda *_, slot=slot: order.append(slot))
            for slot, layer in encoder.encoders.named_children()
        ]
        encoder(*inputs)
        for hook in hooks:
            hook.remove()
        return [int(slot) for slot in order]

    return slots


def end_step() -> None:
    """Let an optimiser make a step, as it does after each batch."""
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]).step()


def steps(encoder, features, number: int) -> list[tuple[int, ...]]:
    """Return the layers of some training steps."""
    drawn = []
    for _ in range(number):
        encoder(*features)
        drawn.append(encoder.active_layers)
        end_step()
    return drawn


def start_epoch(encoder, epoch: int, seed: int = 7) -> None:
    """Do what ESPnet's trainer does before the steps of an epoch."""
    set_all_random_seed(seed + epoch)
    encoder.train()


class TestSetDepth:
    def test_every_depth_calls_that_many_layers(
        self, make_encoder, encoder_name, features, called
    ):
        encoder = make_encoder(f"ld_{encoder_name}", 12).eval()
        for depth in range(1, 13):
            encoder.set_depth(depth)
            slots = called(encoder, *features)
            assert len(slots) == depth
            assert tuple(slots) == encoder.active_layers

    def test_six_of_twelve(self, make_encoder, features, called):
        encoder = make_encoder("ld_conformer", 12).eval()
        encoder.set_depth(6)
        assert called(encoder, *features) == [0, 2, 4, 7, 9, 11]
        encoder.set_depth(6, selector="prefix")
        assert called(encoder, *features) == [0, 1, 2, 3, 4, 5]

    def test_layers(self, make_encoder, features, called):
        encoder = make_encoder("ld_conformer", 8).eval()
        encoder.set_depth(layers=[7, 0, 3])
        assert called(encoder, *features) == [0, 3, 7]

    def test_none_runs_all(self, make_encoder, features, called):
        encoder = make_encoder("ld_conformer").eval()
        everything = encoder(*features)[0]
        encoder.set_depth(2)
        assert not torch.equal(encoder(*features)[0], everything)
        encoder.set_depth(None)
        assert called(encoder, *features) == [0, 1, 2, 3]
        assert torch.equal(encoder(*features)[0], everything)

    @pytest.mark.parametrize("depth", [0, -1, 5])
    def test_refuses_a_depth_that_is_not_there(self, make_encoder, depth):
        encoder = make_encoder("ld_conformer").eval()
        with pytest.raises(UserError, match=f"depth {depth} .* 4 layers.* 1 to 4"):
            encoder.set_depth(depth)
        assert encoder.active_layers == (0, 1, 2, 3)

    @pytest.mark.parametrize("layers", [[], [4], [-1], [1, 1]])
    def test_refuses_layers_that_are_not_there(self, make_encoder, layers):
        encoder = make_encoder("ld_conformer").eval()
        with pytest.raises(UserError) as refusal:
            encoder.set_depth(layers=layers)
        assert f"layers {layers} are impossible" in str(refusal.value)
        assert "0 to 3" in str(refusal.value)

    def test_output_is_that_of_espnets_encoder_of_this_depth(
        self, make_encoder, encoder_name, features
    ):
        encoder = make_encoder(f"ld_{encoder_name}", 6).eval()
        layers = (0, 2, 5)
        encoder.set_depth(layers=layers)
        shallow = make_encoder(encoder_name, 3, seed=1).eval()
        weights = {}
        for key, value in encoder.state_dict().items():
            if key.startswith("encoders."):
                _, slot, rest = key.split(".", 2)
                if int(slot) not in layers:
                    continue
                key = f"encoders.{layers.index(int(slot))}.{rest}"
            weights[key] = value
        shallow.load_state_dict(weights)
        expected, lengths, _ = shallow(*features)
        output, output_lengths, _ = encoder(*features)
        assert torch.equal(output, expected)
        assert torch.equal(output_lengths, lengths)


class TestTraining:
    @pytest.mark.parametrize("sampler", ["bernoulli", "uniform"])
    def test_just_the_drawn_layers_are_called_and_learn(
        self, make_encoder, encoder_name, features, called, sampler
    ):
        encoder = make_encoder(f"ld_{encoder_name}", 6, depth_sampler=sampler).train()
        numbers = set()
        for _ in range(8):
            encoder.zero_grad()
            slots = called(encoder, *features)
            assert tuple(slots) == encoder.active_layers
            numbers.add(len(slots))
            encoder(*features)[0].square().sum().backward()
            for slot, layer in enumerate(encoder.encoders._modules.values()):
                learns = any(p.grad is not None for p in layer.parameters())
                assert learns == (slot in encoder.active_layers)
            end_step()
        assert len(numbers) > 1

    def test_layers_are_drawn_once_per_optimiser_step(
        self, make_encoder, features, called
    ):
        """Not once per forward: gradients of a step may be accumulated."""
        encoder = make_encoder("ld_conformer", 8).train()
        drawn = []
        for _ in range(6):
            forwards = [called(encoder, *features) for _ in range(3)]
            assert forwards == forwards[:1] * 3
            drawn.append(tuple(forwards[0]))
            end_step()
        assert len(set(drawn)) > 1

    def test_running_decides_in_training_and_evaluation(
        self, make_encoder, features, called
    ):
        encoder = make_encoder("ld_conformer", 6).train()
        for mode in (True, False):
            encoder.train(mode)
            before = encoder.active_layers
            with encoder.running([4, 1]):
                assert called(encoder, *features) == [1, 4]
                with encoder.running([5]):  # one request within another
                    assert called(encoder, *features) == [5]
                assert called(encoder, *features) == [1, 4]
            assert encoder.active_layers == before
        with pytest.raises(UserError, match="layers .6. are impossible"):
            encoder.running([6])
        with pytest.raises(ZeroDivisionError):
            with encoder.running([0]):
                1 / 0
        assert encoder.active_layers == tuple(range(6))

    def test_running_is_of_one_encoder_and_one_thread(self, make_encoder):
        encoder, other = (make_encoder("ld_conformer").eval() for _ in range(2))
        with encoder.running([0]), ThreadPoolExecutor(1) as pool:
            assert other.active_layers == (0, 1, 2, 3)
            elsewhere = pool.submit(lambda: encoder.active_layers).result()
        assert elsewhere == (0, 1, 2, 3)

    def test_full_runs_all(self, make_encoder, features, called):
        encoder = make_encoder("ld_conformer", depth_sampler="full").train()
        assert [called(encoder, *features) for _ in range(3)] == [[0, 1, 2, 3]] * 3

    def test_evaluation_between_steps_runs_the_selected_layers(
        self, make_encoder, features, called
    ):
        encoder = make_encoder("ld_conformer", keep_prob=0.2).train()
        encoder(*features)
        assert called(encoder.eval(), *features) == [0, 1, 2, 3]
        assert encoder.active_layers == (0, 1, 2, 3)

    def test_draws_from_the_selected_layers(self, make_encoder, features):
        encoder = make_encoder("ld_conformer", 6, depth_sampler="uniform")
        encoder.set_depth(layers=[1, 4])
        drawn = steps(encoder.train(), features, 20)
        assert set(drawn) == {(1,), (4,), (1, 4)}

    def test_refuses_an_impossible_min_depth_at_once(self, make_encoder):
        with pytest.raises(UserError, match="min_depth 5 .* 4 layers"):
            make_encoder("ld_conformer", min_depth=5)


class TestSeveralDraws:
    """Of one step: all of them hold until the optimiser made it."""

    def test_the_first_is_that_of_the_step(self, make_encoder):
        gates = make_encoder("ld_conformer", 12, depth_sampler="uniform").gates
        first = gates.layers_of_step()
        draws = gates.draws_of_step(5)
        assert draws[0] == first == gates.layers_of_step()
        assert len(set(draws)) > 1
        assert gates.draws_of_step(5) == draws
        end_step()
        assert gates.draws_of_step(5) != draws

    def test_a_sandwich_is_full_smallest_and_draws(self, make_encoder):
        gates = make_encoder(
            "ld_conformer", 12, depth_sampler="uniform", min_depth=2
        ).gates
        seen = set()
        for _ in range(20):
            full, smallest, *draws = gates.sandwich_of_step(2)
            assert full == tuple(range(12))
            assert len(smallest) == 2
            assert len(draws) <= 2
            assert gates.sandwich_of_step(2) == [full, smallest, *draws]
            seen.add(smallest)
            end_step()
        assert len(seen) > 5  # the smallest is random as well

    def test_what_is_there_twice_runs_once(self, make_encoder):
        weights = {4: 1}
        gates = make_encoder(
            "ld_conformer", depth_sampler=weights, layer_choice="prefix"
        ).gates
        assert gates.sandwich_of_step(3) == [(0, 1, 2, 3)]

    def test_the_smallest_is_one_that_may_be_drawn(self, make_encoder):
        weights = {4: 1, 3: 1, 2: 0}
        gates = make_encoder(
            "ld_conformer", depth_sampler=weights, layer_choice="prefix"
        ).gates
        for _ in range(5):
            assert gates.sandwich_of_step(1)[:2] == [(0, 1, 2, 3), (0, 1, 2)]
            end_step()


class TestVisited:
    def test_sees_the_output_of_each_layer_that_runs(
        self, make_encoder, encoder_name, features
    ):
        encoder = make_encoder(f"ld_{encoder_name}").eval()
        encoder.set_depth(layers=(0, 2, 3))
        outputs, hooked = {}, {}
        for slot, layer in encoder.encoders.named_children():
            layer.register_forward_hook(
                lambda _, __, output, slot=slot: hooked.update({int(slot): output})
            )

        def visit(slot, output):
            outputs[slot] = output
            return output

        with encoder.gates.visited(visit):
            expected = encoder(*features)[0]
        assert list(outputs) == [0, 2, 3]
        assert all(outputs[slot] is hooked[slot] for slot in hooked)
        assert torch.equal(encoder(*features)[0], expected)
        assert list(outputs) == [0, 2, 3]  # afterwards, nothing is visited

    def test_may_change_what_goes_on(self, make_encoder, features):
        encoder = make_encoder("ld_conformer").eval()
        with encoder.gates.visited(
            lambda slot, output: torch.utils._pytree.tree_map(
                torch.zeros_like if slot == 3 else lambda x: x, output
            )
        ):
            assert not encoder(*features)[0].any()


class TestSeed:
    def test_an_epoch_can_be_repeated(self, make_encoder, features):
        """A resumed run draws what the unbroken run would have drawn."""
        unbroken = make_encoder("ld_conformer", 8)
        epochs = []
        for epoch in (1, 2, 3):
            start_epoch(unbroken, epoch)
            epochs.append(steps(unbroken, features, 6))
        assert epochs[0] != epochs[1] != epochs[2]
        for epoch in (1, 2, 3):
            resumed = make_encoder("ld_conformer", 8, seed=9)
            start_epoch(resumed, epoch)
            assert steps(resumed, features, 6) == epochs[epoch - 1]

    def test_another_seed_draws_other_layers(self, make_encoder, features):
        encoder = make_encoder("ld_conformer", 8)
        start_epoch(encoder, 1, seed=0)
        drawn = steps(encoder, features, 6)
        start_epoch(encoder, 1, seed=100)
        assert steps(encoder, features, 6) != drawn

    def test_other_random_numbers_do_not_matter(self, make_encoder, features):
        encoder = make_encoder("ld_conformer", 8)
        start_epoch(encoder, 1)
        drawn = steps(encoder, features, 6)
        again = make_encoder("ld_conformer", 8, dropout_rate=0.0)
        start_epoch(again, 1)
        others = []
        for _ in range(6):
            torch.rand(5)
            np.random.rand(5)
            random.random()
            others += steps(again, features, 1)
        assert others == drawn

    def test_does_not_touch_other_random_numbers(self, make_encoder, features):
        encoder = make_encoder("ld_conformer", 8)
        start_epoch(encoder, 1)
        states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1]
        encoder.encoders.layers_of_step()
        assert random.getstate() == states[0]
        assert torch.equal(torch.get_rng_state(), states[1])
        assert np.array_equal(np.random.get_state()[1], states[2])

    def test_validation_within_an_epoch_does_not_restart_it(
        self, make_encoder, features
    ):
        encoder = make_encoder("ld_conformer", 8)
        start_epoch(encoder, 1)
        drawn = steps(encoder, features, 8)
        again = make_encoder("ld_conformer", 8)
        start_epoch(again, 1)
        first = steps(again, features, 4)
        again.eval()(*features)
        again.train()
        assert first + steps(again, features, 4) == drawn

    def test_works_without_a_call_of_train(self, make_encoder, features):
        torch.manual_seed(5)
        encoder = make_encoder("ld_conformer", 8)  # modules are born in training mode
        assert len(set(steps(encoder, features, 8))) > 1


class TestKeepFinalNorm:
    @pytest.mark.parametrize("name", ["conformer", "branchformer", "e_branchformer"])
    def test_skipped_layers_still_normalise(self, make_encoder, features, called, name):
        encoder = make_encoder(f"ld_{name}", keep_final_norm=True).eval()
        for slot, layer in enumerate(encoder.encoders._modules.values()):
            torch.manual_seed(slot)
            torch.nn.init.normal_(layer.norm_final.weight)
            torch.nn.init.normal_(layer.norm_final.bias)
        encoder.set_depth(layers=[1, 3])
        assert called(encoder, *features) == [1, 3]

        x, lengths = features
        mask = (torch.arange(60) < lengths[:, None])[:, None]
        (x, positions), mask = encoder.embed(x, mask)
        for slot, layer in enumerate(encoder.encoders._modules.values()):
            if slot in (1, 3):
                (x, _), _ = layer((x, positions), mask)
            else:
                norm = layer.norm_final
                mean = x.mean(-1, keepdim=True)
                variance = ((x - mean) ** 2).mean(-1, keepdim=True)
                x = (x - mean) / (variance + norm.eps).sqrt()
                x = x * norm.weight + norm.bias
        expected = encoder.after_norm(x)
        assert torch.allclose(encoder(*features)[0], expected, atol=1e-5)

        plain = make_encoder(f"ld_{name}").eval()
        plain.load_state_dict(encoder.state_dict())
        plain.set_depth(layers=[1, 3])
        assert not torch.allclose(plain(*features)[0], expected, atol=1e-2)

    def test_first_layers_are_no_beginning_of_more(self, make_encoder):
        for kept in (True, False):
            encoder = make_encoder("ld_conformer", keep_final_norm=kept)
            assert encoder.is_passed_by((0, 1), (0, 1, 2, 3)) != kept
            assert encoder.is_passed_by((0, 1), (0, 1))

    def test_works_without_positional_embedding(self, make_encoder, features):
        encoder = make_encoder(
            "ld_conformer",
            keep_final_norm=True,
            pos_enc_layer_type="abs_pos",
            selfattention_layer_type="selfattn",
        ).eval()
        for layer in encoder.encoders._modules.values():
            torch.nn.init.constant_(layer.norm_final.bias, 3.0)
        encoder.set_depth(layers=[0])
        x, lengths = features
        x, mask = encoder.embed(x, (torch.arange(60) < lengths[:, None])[:, None])
        layers = list(encoder.encoders._modules.values())
        x, _ = layers[0](x, mask)
        for layer in layers[1:]:
            x = layer.norm_final(x)
        assert torch.equal(encoder(*features)[0], encoder.after_norm(x))

    def test_refused_where_layers_have_no_final_norm(self, make_encoder):
        with pytest.raises(UserError, match="keep_final_norm.*Transformer"):
            make_encoder("ld_transformer", keep_final_norm=True)


@pytest.fixture
def hubert():
    """Return a function that builds a plain HuBERT, and the same with gated layers."""

    def models(num_layers: int, sampler=None, **options):
        config = HubertConfig(
            hidden_size=16,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            intermediate_size=32,
            conv_dim=[8] * 7,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=2,
            layerdrop=0.0,
            mask_time_prob=0.0,
            **options,
        )
        torch.manual_seed(0)
        plain = HubertModel(config)
        gated = copy.deepcopy(plain)
        gated.encoder.layers = GatedModuleList(gated.encoder.layers, sampler)
        return plain, gated

    return models


STABLE = dict(do_stable_layer_norm=True, feat_extract_norm="layer")


class TestGatedModuleList:
    """In transformers' encoders."""

    speech = torch.randn(2, 4000, generator=torch.Generator().manual_seed(2))
    mask = torch.arange(4000) < torch.tensor([[4000], [2500]])

    def test_changes_neither_keys_nor_function(self, hubert):
        plain, gated = hubert(3)
        assert list(gated.state_dict()) == list(plain.state_dict())
        gated.load_state_dict(plain.state_dict())
        assert [n for n, _ in gated.named_parameters()] == [
            n for n, _ in plain.named_parameters()
        ]
        assert len(gated.encoder.layers) == 3
        output = gated.eval()(self.speech).last_hidden_state
        assert torch.equal(output, plain.eval()(self.speech).last_hidden_state)

    def test_prints_its_layers_whatever_runs(self, hubert):
        _, gated = hubert(3, DepthSampler("uniform"))
        gated.encoder.layers.select((0,))
        printed = repr(gated.train().encoder.layers)
        assert printed.startswith("GatedModuleList(")
        assert "(0-2): 3 x HubertEncoderLayer" in printed

    @pytest.mark.parametrize("options", [{}, STABLE])
    @pytest.mark.parametrize("layers", [(0,), (0, 1, 2), (1, 3, 4)])
    def test_output_is_that_of_a_plain_model_of_this_depth(
        self, hubert, layers, options
    ):
        _, gated = hubert(5, **options)
        slots = list(gated.encoder.layers.children())
        gated.encoder.layers.select(layers)
        shallow, _ = hubert(len(layers), **options)
        rest = {k: v for k, v in gated.state_dict().items() if ".layers." not in k}
        assert not shallow.load_state_dict(rest, strict=False).unexpected_keys
        for layer, slot in zip(shallow.encoder.layers, layers, strict=True):
            layer.load_state_dict(slots[slot].state_dict())
        for mask in (None, self.mask):
            expected = shallow.eval()(self.speech, attention_mask=mask)
            output = gated.eval()(self.speech, attention_mask=mask)
            assert torch.equal(output.last_hidden_state, expected.last_hidden_state)

    def test_a_layer_that_is_off_is_not_called_and_does_not_learn(self, hubert):
        _, gated = hubert(4, DepthSampler("uniform"))
        layers, slots = gated.encoder.layers, list(gated.encoder.layers.children())
        calls = []
        for slot, layer in enumerate(slots):
            layer.register_forward_hook(lambda *_, slot=slot: calls.append(slot))
        layers.select((0, 1, 3))
        drawn = set()
        gated.train()
        for _ in range(20):
            end_step()
            calls.clear()
            gated.zero_grad()
            gated(self.speech).last_hidden_state.square().sum().backward()
            assert tuple(calls) == layers.active
            drawn.add(layers.active)
            for slot, layer in enumerate(slots):
                learns = any(p.grad is not None for p in layer.parameters())
                assert learns == (slot in layers.active)
        assert {len(active) for active in drawn} == {1, 2, 3}
        assert not any(2 in active for active in drawn)
        calls.clear()
        gated.eval()(self.speech)
        assert calls == [0, 1, 3]

    def test_refuses_an_impossible_min_depth_at_once(self, hubert):
        with pytest.raises(UserError, match="min_depth 5 .* 4 layers"):
            hubert(4, DepthSampler("uniform", min_depth=5))


class TestFindGates:
    def test_finds_them_at_any_place(self, make_encoder, hubert):
        encoder, (_, gated) = make_encoder("ld_conformer"), hubert(2)
        for model, layers in (
            (encoder, encoder.encoders),
            (gated, gated.encoder.layers),
        ):
            assert find_gates(model) is layers
            assert find_gates(torch.nn.ModuleDict({"a": model})) is layers

    def test_none_in_a_plain_model(self, make_encoder, hubert):
        assert find_gates(make_encoder("conformer")) is None
        assert find_gates(hubert(2)[0]) is None
