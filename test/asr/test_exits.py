"""Models that train several depths in one step."""

import copy

import numpy as np
import pytest
import torch
from espnet2.torch_utils.set_all_random_seed import set_all_random_seed

from dldkit.asr.collection import collect_posteriors
from dldkit.asr.exits import ExitWeights
from dldkit.asr.loading import load_asr_model
from dldkit.asr.model import DLDModel
from dldkit.errors import UserError

STILL = dict(dropout_rate=0.0, positional_dropout_rate=0.0, attention_dropout_rate=0.0)
NESTED = dict(**STILL, depth_sampler="uniform", layer_choice="prefix")
EXITS = {**NESTED, "depth_sampler": "full", "exits": 1}
MASKS = dict(
    specaug="specaug",
    specaug_conf=dict(
        apply_time_warp=False,
        freq_mask_width_range=[4, 10],
        time_mask_width_range=[5, 15],
    ),
)


@pytest.fixture
def model_of(build):
    """Return a function that builds an untrained model with exits."""

    def model(encoder_conf=EXITS, reference=None, specaug=None, **changes):
        model_conf = {"reference": reference and str(reference)}
        model_conf |= changes.pop("model_conf", {})
        return build(
            encoder=changes.pop("encoder", "ld_conformer"),
            model="dld",
            model_conf=model_conf,
            encoder_conf=encoder_conf,
            specaug=specaug,
            **changes,
        ).train()

    return model


def at_depth(model, depth, batch, head=None):
    """CTC log-posteriors (Batch, Time, Vocab) of a model cut to its first layers."""
    for module in model.modules():
        if isinstance(getattr(module, "attn", None), torch.Tensor):
            module.attn = None  # ESPnet keeps it; it can not be copied
    cut = copy.deepcopy(model)
    for gates in [cut.encoder.encoders]:
        while len(gates) > depth:
            del gates[-1]
        gates.open()
    encoded, lengths = super(DLDModel, cut).encode(
        batch["speech"], batch["speech_lengths"]
    )
    head = head or cut.ctc.ctc_lo
    return head(encoded).log_softmax(-1), lengths


def ctc(log_probs, lengths, batch):
    """Mean over utterances, as ESPnet has it."""
    total = torch.nn.functional.ctc_loss(
        log_probs.transpose(0, 1),
        batch["text"].clamp(min=0),
        lengths,
        batch["text_lengths"],
        reduction="sum",
    )
    return total.item() / len(lengths)


def kl(teacher, student, lengths):
    """Mean over utterances of the sum over frames, in numpy."""
    p, q = (x.detach().double().numpy() for x in (teacher, student))
    frames = (np.exp(p) * (p - q)).sum(-1)
    sums = [row[:length].sum() for row, length in zip(frames, lengths)]
    return np.mean(sums)


@torch.no_grad()
def posteriors(directory, batch):
    model, _ = load_asr_model(directory)
    encoded, _ = model.encode(batch["speech"], batch["speech_lengths"])
    return model.ctc.log_softmax(encoded)


def deterministic(model):
    """BatchNorm by running statistics, so that two forwards agree."""
    if model.reference_path not in (None, "self"):
        model.open_reference()  # which runs the student once
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.eval()
    return model


class TestLosses:
    @pytest.mark.parametrize(
        "weights, expected",
        [
            ("equal", [1 / 4] * 4),
            ("rising", [0.1, 0.2, 0.3, 0.4]),
            ([0.0, 1.0, 1.0, 2.0], [0.0, 0.25, 0.25, 0.5]),
        ],
    )
    def test_are_means_over_exits_and_end(
        self, model_of, static, batch, encoder_name, encoder_sizes, weights, expected
    ):
        encoder = f"ld_{encoder_name}"
        conf = dict(exit_weights=weights, kd_weight=0.5)
        model = model_of(
            {**EXITS, **encoder_sizes}, static, encoder=encoder, model_conf=conf
        )
        deterministic(model)
        utterances = batch("a", "c", "f")
        loss, stats, _ = model(**batch("a", "c", "f"))
        teacher = posteriors(static, utterances)
        ctcs, kls = [], []
        with torch.no_grad():
            for depth in (1, 2, 3, 4):
                log_probs, lengths = at_depth(model, depth, utterances)
                ctcs.append(ctc(log_probs, lengths, utterances))
                kls.append(kl(teacher, log_probs, lengths))
        assert len({round(x, 3) for x in kls}) == 4  # the exits differ
        kd = np.dot(expected, kls)
        assert loss.item() == pytest.approx(np.dot(expected, ctcs) + 0.5 * kd, 1e-4)
        assert stats["loss_kd"].item() == pytest.approx(kd, rel=1e-4)
        assert stats["loss_ctc"].item() == pytest.approx(ctcs[-1], rel=1e-4)
        assert stats["loss"].item() == pytest.approx(loss.item())

    def test_just_exits_that_are_reached_count(self, model_of, static, batch):
        model = deterministic(model_of({**NESTED, "exits": 1}, static))
        utterances = batch("a", "c")
        with model.encoder.running((0, 1)):
            loss, stats, _ = model(**batch("a", "c"))
        teacher, total = posteriors(static, utterances), 0.0
        with torch.no_grad():
            for depth in (1, 2):
                log_probs, lengths = at_depth(model, depth, utterances)
                total += ctc(log_probs, lengths, utterances) / 2
                total += kl(teacher, log_probs, lengths) / 2
        assert loss.item() == pytest.approx(total, rel=1e-4)
        assert stats["depth"].item() == 2
        loss.backward()
        learnt = [
            slot
            for slot, layer in enumerate(model.encoder.encoders.children())
            if any(p.grad is not None for p in layer.parameters())
        ]
        assert learnt == [0, 1]

    def test_without_a_reference_it_is_early_exit(self, model_of, batch):
        model = deterministic(model_of())
        loss, stats, _ = model(**batch("a", "c"))
        assert "loss_kd" not in stats
        total = 0.0
        with torch.no_grad():
            for depth in (1, 2, 3, 4):
                found = at_depth(model, depth, batch("a", "c"))
                total += ctc(*found, batch("a", "c")) / 4
        assert loss.item() == pytest.approx(total, rel=1e-4)

    def test_layers_of_an_exit_may_be_its_own(
        self, model_of, batch, encoder_name, encoder_sizes
    ):
        """Without the deeper layers' gradient, they learn from the exit alone."""
        options, found = {**EXITS, **encoder_sizes, "exits": [1]}, {}
        for name, conf in (
            ("own", dict(exit_gradient=0.0)),
            ("alone", dict(exit_weights=[1.0, 0.0])),
            ("shared", {}),
            ("half", dict(exit_gradient=0.5)),
        ):
            set_all_random_seed(0)
            encoder = f"ld_{encoder_name}"
            model = model_of(options, encoder=encoder, model_conf=conf)
            deterministic(model)(**batch("a", "c"))[0].backward()
            layer, *_ = model.encoder.encoders.children()
            gradients = [p.grad.flatten() for p in layer.parameters()]
            found[name] = torch.cat(gradients)
        close = dict(rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found["own"], found["alone"] / 2, **close)
        both = (found["own"] + found["shared"]) / 2
        torch.testing.assert_close(found["half"], both, **close)
        difference = (found["own"] - found["shared"]).abs()
        assert (difference > 1e-4).float().mean() > 0.5

    def test_work_beside_an_attention_decoder(self, model_of, static, batch):
        decoder = dict(
            decoder="transformer",
            decoder_conf=dict(attention_heads=2, linear_units=16, num_blocks=1),
        )
        conf = dict(ctc_weight=0.3)
        model = deterministic(model_of(EXITS, static, model_conf=conf, **decoder))
        for module in model.decoder.modules():
            module.eval()
        loss, stats, _ = model(**batch("a", "c"))
        total = stats["loss_kd"].item() + 0.7 * stats["loss_att"].item()
        with torch.no_grad():
            for depth in (1, 2, 3, 4):
                found = at_depth(model, depth, batch("a", "c"))
                total += 0.3 * ctc(*found, batch("a", "c")) / 4
        assert loss.item() == pytest.approx(total, rel=1e-4)
        loss.backward()
        assert model.decoder.embed[0].weight.grad is not None

    def test_cached_posteriors_give_the_same(
        self, model_of, static, batch, corpus, tmp_path
    ):
        cache = tmp_path / "cache"
        collect_posteriors(static, [corpus.train, corpus.dev], cache)
        losses = []
        for source, stored in ((static, None), (cache, cache)):
            model = deterministic(model_of(EXITS, source))
            loss = model(**batch("a", "c", cache=stored))[0]
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-3)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_under_autocast(
        self, model_of, static, batch, encoder_name, encoder_sizes, dtype
    ):
        encoder = f"ld_{encoder_name}"
        model = model_of({**EXITS, **encoder_sizes}, static, encoder=encoder)
        expected = model(**batch("a", "c"))[1]
        with torch.autocast("cpu", dtype=dtype):
            loss, stats, _ = model(**batch("a", "c"))
        loss.backward()
        for name in ("loss_kd", "loss_ctc"):
            assert stats[name].dtype == torch.float32
            assert stats[name].item() == pytest.approx(expected[name].item(), rel=0.05)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(torch.isfinite(g).all() for g in gradients)


class TestUntrainedDepths:
    @pytest.mark.parametrize(
        "sampler, warned",
        [("full", [1, 3]), ("exits", [1, 3]), ({4: 1, 3: 1}, [1]), ("uniform", [])],
    )
    def test_are_warned_of_once(self, model_of, caplog, sampler, warned):
        options = {**EXITS, "depth_sampler": sampler, "exits": 2}
        encoder = model_of(options, model_conf=dict(valid_depths=[4])).encoder
        for depth in (4, 3, 2, 1, 3, 1):
            encoder.set_depth(depth)
        messages = [r.message for r in caplog.records if "not trained" in r.message]
        found = [int(message.split()[1]) for message in messages]
        assert sorted(found) == warned
        if warned:
            trained = [depth for depth in (1, 2, 3, 4) if depth not in warned]
            assert f"choose one of {trained}" in caplog.text


class TestHeads:
    def test_each_exit_has_one_of_its_own(self, model_of, batch):
        model = deterministic(model_of(model_conf=dict(shared_head=False)))
        heads = model.ctc.ctc_lo
        assert sorted(heads.exits) == ["1", "2", "3"]
        loss, _, _ = model(**batch("a", "c"))
        own = torch.nn.Linear(8, heads.out_features)
        own.load_state_dict({k: heads.state_dict()[k] for k in ("weight", "bias")})
        by_depth = {**{int(d): head for d, head in heads.exits.items()}, 4: own}
        total = 0.0
        with torch.no_grad():
            for depth, head in by_depth.items():
                found = at_depth(model, depth, batch("a", "c"), head)
                total += ctc(*found, batch("a", "c")) / 4
        assert loss.item() == pytest.approx(total, rel=1e-4)
        loss.backward()
        assert all(head.weight.grad.any() for head in [heads, *heads.exits.values()])

    @torch.no_grad()
    def test_the_depth_that_runs_says_which_answers(self, model_of, batch):
        options = {**EXITS, "exits": [1, 3]}
        model = model_of(options, model_conf=dict(shared_head=False)).eval()
        speech = {k: v for k, v in batch("a").items() if "speech" in k}
        heads = model.ctc.ctc_lo.exits
        # depth 2 has no head: the next one above it answers
        for depth, head in ((1, heads["1"]), (2, heads["3"]), (3, heads["3"])):
            model.encoder.set_depth(depth)
            encoded, _ = model.encode(**speech)
            expected = head(encoded).log_softmax(-1)
            assert torch.equal(model.ctc.log_softmax(encoded), expected), depth
            assert torch.equal(model.ctc.argmax(encoded), expected.argmax(-1))

    def test_a_trained_model_keeps_them(self, corpus, python, tmp_path):
        exp = tmp_path / "exp"
        python(
            *("-m", "dldkit.bin.asr_train"),
            *corpus.training(
                exp,
                encoder="ld_conformer",
                model="dld",
                model_conf=dict(shared_head=False),
                encoder_conf=EXITS,
            ),
        )
        model, _ = load_asr_model(exp)
        assert sorted(model.ctc.ctc_lo.exits) == ["1", "2", "3"]


class TestSelf:
    """The full depth of the same step is the reference."""

    def test_pulls_the_exits_to_the_deepest(self, model_of, batch):
        model = deterministic(model_of(reference="self"))
        loss, stats, _ = model(**batch("a", "c", "f"))
        ctcs, kls = [], []
        utterances = batch("a", "c", "f")
        with torch.no_grad():
            teacher, lengths = at_depth(model, 4, utterances)
            for depth in (1, 2, 3, 4):
                log_probs, _ = at_depth(model, depth, utterances)
                ctcs.append(ctc(log_probs, lengths, utterances))
                kls.append(kl(teacher, log_probs, lengths))
        assert kls[-1] == 0.0 < kls[0]
        assert stats["loss_kd"].item() == pytest.approx(np.mean(kls), rel=1e-4)
        total = np.mean(ctcs) + np.mean(kls)
        assert loss.item() == pytest.approx(total, rel=1e-4)

    def test_is_not_pulled_itself(self, model_of, batch):
        """The last layer's gradient is that of its own CTC loss alone."""
        gradients = []
        for weight in (0.0, 5.0):
            conf = dict(kd_weight=weight)
            model = deterministic(model_of(reference="self", model_conf=conf))
            model(**batch("a", "c"))[0].backward()
            layer = list(model.encoder.encoders.children())[-1]
            gradients.append([p.grad for p in layer.parameters()])
            first = next(iter(model.encoder.encoders.children()))
            gradients[-1].append(first.feed_forward.w_1.weight.grad)
        (*last, first), (*pulled_last, pulled_first) = gradients
        for gradient, pulled in zip(last, pulled_last, strict=True):
            # a bias before BatchNorm has a gradient of rounding errors alone
            assert torch.allclose(gradient, pulled, atol=1e-6)
        assert not torch.allclose(first, pulled_first)

    def test_random_subsets_run_the_full_depth_as_well(self, model_of, batch):
        options = dict(**STILL, depth_sampler="uniform")
        model = deterministic(model_of(options, "self"))
        depths = depths_of_forwards(model)
        _, stats, _ = model(**batch("a", "c"))
        assert depths[0] == 4 and len(depths) in (2, 3) and min(depths) == 1
        assert stats["depth"].item() == pytest.approx(np.mean(depths))

    def test_needs_no_files_and_allows_time_warp(self, model_of, batch):
        warp = dict(specaug="specaug", specaug_conf=dict(apply_time_warp=True))
        model_of(reference="self", **warp)(**batch("a", "c"))

    def test_needs_smaller_depths(self, model_of):
        with pytest.raises(UserError, match="reference: self needs smaller depths"):
            model_of(dict(depth_sampler="full"), "self")

    @torch.no_grad()
    def test_validation_has_no_kl(self, model_of, batch):
        assert "loss_kd" not in model_of(reference="self").eval()(**batch("a"))[1]


def depths_of_forwards(model):
    """Return a list that gets the depth of each forward of the encoder."""
    depths = []
    model.encoder.register_forward_hook(
        lambda *_: depths.append(len(model.encoder.active_layers))
    )
    return depths


class TestSandwich:
    def test_of_nested_depths_is_one_forward(self, model_of, static, batch):
        model = deterministic(model_of(NESTED, static, model_conf=dict(sandwich=1)))
        depths = depths_of_forwards(model)
        loss, stats, _ = model(**batch("a", "c"))
        assert depths == [4]
        drawn = {len(layers) for layers in model.encoder.gates.sandwich_of_step(1)}
        assert drawn >= {4, 1}
        teacher, total = posteriors(static, batch("a", "c")), 0.0
        with torch.no_grad():
            for depth in drawn:
                log_probs, lengths = at_depth(model, depth, batch("a", "c"))
                total += ctc(log_probs, lengths, batch("a", "c")) / len(drawn)
                total += kl(teacher, log_probs, lengths) / len(drawn)
        assert loss.item() == pytest.approx(total, rel=1e-4)

    def test_of_other_choices_is_the_mean_of_forwards(self, model_of, static, batch):
        options = {**NESTED, "layer_choice": "even"}
        model = deterministic(model_of(options, static, model_conf=dict(sandwich=2)))
        loss, stats, _ = model(**batch("a", "c"))
        choices = model.encoder.gates.sandwich_of_step(2)
        assert choices[:2] == [(0, 1, 2, 3), (0,)]
        parts = []
        for layers in choices:
            single = deterministic(model_of(options, static))
            single.load_state_dict(model.state_dict())
            with single.encoder.running(layers):
                parts.append(single(**batch("a", "c"))[0].item())
        assert loss.item() == pytest.approx(np.mean(parts), rel=1e-4)
        numbers = [len(layers) for layers in choices]
        assert stats["depth"].item() == pytest.approx(np.mean(numbers))
        assert stats["layers_run"].item() == sum(numbers)

    def test_statistics_are_those_of_the_full_depth(self, model_of, batch):
        options = {**NESTED, "layer_choice": "even"}
        states = []
        for sandwich, layers in ((2, None), (None, (0, 1, 2, 3))):
            model = model_of(options, model_conf=dict(sandwich=sandwich))
            if layers is None:
                model(**batch("a", "c"))
            else:
                with model.encoder.running(layers):
                    model(**batch("a", "c"))
            states.append(model.state_dict())
        running = [key for key in states[0] if "running" in key]
        assert running
        for key in running:
            assert torch.equal(states[0][key], states[1][key]), key

    @pytest.mark.parametrize("masks, same", [("shared", True), ("own", False)])
    def test_masks_of_a_step(self, model_of, batch, masks, same):
        options = {**NESTED, "layer_choice": "even"}
        conf = dict(sandwich=2, specaug_masks=masks)
        model, fed = model_of(options, model_conf=conf, **MASKS), []
        model.encoder.register_forward_pre_hook(lambda _, x: fed.append(x[0].clone()))
        set_all_random_seed(3)
        for _ in range(2):
            model(**batch("a", "c"))
        assert len(fed) >= 4
        number = len(fed) // 2
        for other in fed[1:number]:
            assert torch.equal(fed[0], other) == same
        assert not torch.equal(fed[0], fed[number])  # another step, other masks

    def test_needs_depths_to_draw(self, model_of):
        with pytest.raises(UserError, match="sandwich 1: .* depth_sampler is not full"):
            model_of(EXITS, model_conf=dict(sandwich=1))


class TestValidation:
    @torch.no_grad()
    def test_one_forward_for_all_first_layers(self, model_of, static, batch):
        conf = dict(valid_depths=[4, 3, 1])
        model = model_of({**NESTED, "exits": 2}, static, model_conf=conf)
        model = deterministic(model).eval()
        depths = depths_of_forwards(model)
        stats = model(**batch("a", "c", "f"))[1]
        assert depths == [4]
        for depth in (4, 3, 1):
            found = at_depth(model, depth, batch("a", "c", "f"))
            expected = ctc(*found, batch("a", "c", "f"))
            assert stats[f"loss_ctc_depth{depth}"].item() == pytest.approx(expected)

    @pytest.mark.parametrize("exits, half", [(1, 3), ([2], 2), ([4, 1], 1), ([5], 3)])
    def test_default_half_is_an_exit(self, model_of, exits, half):
        """The deepest one of the first half, if there is one."""
        drawn = dict(depth_sampler="exits", exits=exits, num_blocks=6)
        assert set(model_of({**NESTED, **drawn}).valid_layers) == {6, half}

    def test_a_single_layer(self, model_of, batch):
        model = model_of({**NESTED, "num_blocks": 1}).eval()
        assert "loss_ctc_depth1" in model(**batch("a"))[1]


class TestExitWeights:
    def test_sum_to_one_whatever_is_reached(self):
        for weights in ("equal", "rising", [1, 2, 3]):
            for depths in ([2, 4, 6], [2, 3], [1]):
                assert ExitWeights(weights, [2, 4])(depths).sum() == pytest.approx(1)

    @pytest.mark.parametrize(
        "weights, message",
        [
            ("falling", "'falling': choose equal, rising or a list"),
            ([1.0, 1.0], r"one from 0 for each of the exits \[2, 4\], and one"),
            ([1.0, 1.0, -1.0], "one from 0"),
        ],
    )
    def test_refuses(self, weights, message):
        with pytest.raises(UserError, match=message):
            ExitWeights(weights, [2, 4])


class TestRefusals:
    @pytest.mark.parametrize(
        "conf, message",
        [
            (dict(specaug_masks="none"), "'none': choose shared or own"),
            (dict(kd_blank="no"), "kd_blank 'no'"),
            (dict(exit_gradient=1.5), "exit_gradient 1.5: write a share from 0 to 1"),
            (dict(kd_weight=-1.0), "kd_weight -1.0 is impossible"),
            (dict(kd_weight="1e-1"), "kd_weight: '1e-1' is no float"),
            (dict(sandwich=True), "sandwich: True is no Optional"),
            (dict(shared_head="no"), "shared_head: 'no' is no bool"),
            (dict(specaug_masks="own"), "own is for steps of several forwards"),
        ],
    )
    def test_options(self, model_of, conf, message):
        with pytest.raises(UserError, match=message):
            model_of(model_conf=conf)

    @pytest.mark.parametrize("conf", [dict(shared_head=False), dict(exit_weights=[1])])
    def test_options_of_exits_without_any(self, model_of, conf):
        with pytest.raises(UserError, match="are for an encoder that has exits"):
            model_of(NESTED, model_conf=conf)

    def test_own_masks_where_one_forward_has_all_depths(self, model_of):
        conf = dict(sandwich=1, specaug_masks="own")
        with pytest.raises(UserError, match="layer_choice: random or even"):
            model_of(NESTED, model_conf=conf)

    def test_own_time_warps_of_a_model_that_pulls_itself(self, model_of):
        options = {**NESTED, "layer_choice": "even"}
        warped = dict(specaug="specaug", specaug_conf=dict(apply_time_warp=True))
        model_of(options, "self", **warped)
        conf = dict(reference="self", specaug_masks="own")
        with pytest.raises(UserError, match="time warp"):
            model_of(options, model_conf=conf, **warped)

    @pytest.mark.parametrize("exits", [(), 2])
    def test_final_norms_of_skipped_layers(self, model_of, exits):
        options = {**NESTED, "exits": exits, "keep_final_norm": True}
        with pytest.raises(UserError, match="keep_final_norm.*layer_choice: prefix"):
            model_of(options)
