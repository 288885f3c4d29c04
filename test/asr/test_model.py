import copy
import dataclasses

import numpy as np
import pytest
import torch
from espnet2.torch_utils.set_all_random_seed import set_all_random_seed

from dldkit.asr.loading import load_asr_model
from dldkit.asr.reference import LiveReference
from dldkit.errors import UserError

STILL = dict(specaug=None, encoder_conf=dict(dropout_rate=0.0, depth_sampler="full"))
DECODER = dict(
    decoder="transformer",
    decoder_conf=dict(attention_heads=2, linear_units=16, num_blocks=1),
)


@pytest.fixture
def student_of(build):
    """Return a function that builds an untrained student of a reference."""

    def model(reference=None, model_conf={}, **changes):
        return build(
            encoder="ld_conformer",
            model="dld",
            model_conf={"reference": reference and str(reference), **model_conf},
            **changes,
        )

    return model


@pytest.fixture
def reference_of():
    """Return a function that runs a reference by itself: log-posteriors, lengths."""

    @torch.no_grad()
    def posteriors(directory, batch):
        model, _ = load_asr_model(directory)
        encoded, lengths = model.encode(batch["speech"], batch["speech_lengths"])
        return model.ctc.log_softmax(encoded), lengths

    return posteriors


def ctc_logits(model, batch):
    """Run a training step; return its results and the student's CTC logits."""
    logits = []
    hook = model.ctc.ctc_lo.register_forward_hook(
        lambda *x: logits.append(x[2].reshape(-1, *x[2].shape[-3:])[-1])
    )
    loss, stats, weight = model(**batch)
    hook.remove()
    return loss, stats, logits


def kl(teacher, student, lengths):
    """KL per utterance, in numpy, of log-posteriors and logits."""
    p = teacher.double().numpy()
    q = student.detach().double().log_softmax(-1).numpy()
    frames = (np.exp(p) * (p - q)).sum(-1)
    return np.array([row[:length].sum() for row, length in zip(frames, lengths)])


def logits_lengths(model, batch):
    """Valid frames of the student."""
    with torch.no_grad():
        return model.encode(batch["speech"], batch["speech_lengths"])[1].tolist()


class TestLoss:
    @pytest.mark.parametrize("weight", [1.0, 0.25])
    def test_is_ctc_plus_weighted_kl(
        self, student_of, static, batch, reference_of, weight
    ):
        student = student_of(static, dict(kd_weight=weight), **STILL).train()
        utterances = batch("a", "c", "f")
        loss, stats, logits = ctc_logits(student, utterances)
        lengths = logits_lengths(student, utterances)
        expected = kl(reference_of(static, utterances)[0], logits[0], lengths).mean()
        assert stats["loss_kd"].item() == pytest.approx(expected, rel=1e-4)
        total = stats["loss_ctc"].item() + weight * expected
        assert loss.item() == pytest.approx(total, rel=1e-4)
        assert stats["loss"].item() == pytest.approx(loss.item())

    def test_terms_add_up(self, student_of, static, batch):
        student = student_of(static, **STILL).train()
        torch.manual_seed(0)
        loss, stats, _ = student(**batch("a", "c"))
        kl = stats["loss_kd"].item()
        student.pulls.append(dataclasses.replace(student.pulls[0], weight=0.5))
        torch.manual_seed(0)
        more, stats, _ = student(**batch("a", "c"))
        assert stats["loss_kd"].item() == pytest.approx(2 * kl, rel=1e-4)
        assert (more - loss).item() == pytest.approx(0.5 * kl, rel=1e-3)

    def test_options_reach_the_loss(self, student_of, static):
        options = dict(kd_temperature=2.0, kd_direction="reverse", kd_reduction="frame")
        (pull,) = student_of(static, options).pulls
        loss = pull.divergence
        assert loss.temperature == 2.0
        assert loss.direction == "reverse"
        assert loss.reduction == "frame"

    def test_kl_pulls_the_student_to_the_reference(self, student_of, static, batch):
        student = student_of(static, dict(kd_weight=1.0), **STILL).train()
        utterances = ("a", "c", "f")
        optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
        losses = []
        for _ in range(12):
            loss, stats, _ = student(**batch(*utterances))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(stats["loss_kd"].item())
        assert losses[-1] < 0.5 * losses[0]

    def test_gradient_of_both_terms_reaches_the_encoder(
        self, student_of, static, batch
    ):
        gradients = []
        for weight in (0.0, 1.0, 2.0):
            student = student_of(static, dict(kd_weight=weight), **STILL).train()
            student(**batch("a", "c"))[0].backward()
            gradients.append(student.encoder.embed.out.weight.grad)
        kd = gradients[1] - gradients[0]
        assert kd.abs().max() > 1e-3
        assert torch.allclose(gradients[2] - gradients[0], 2 * kd, atol=1e-4)

    def test_works_beside_interctc(self, student_of, static, batch, reference_of):
        changes = copy.deepcopy(STILL)
        changes["encoder_conf"]["interctc_layer_idx"] = [2]
        student = student_of(static, dict(interctc_weight=0.5), **changes).train()
        utterances = batch("a", "c", "f")
        loss, stats, logits = ctc_logits(student, utterances)
        final, middle = logits[0], logits[1]
        assert not torch.equal(final, middle)
        lengths = logits_lengths(student, utterances)
        expected = kl(reference_of(static, utterances)[0], final, lengths).mean()
        assert stats["loss_kd"].item() == pytest.approx(expected, rel=1e-4)
        ctc = (stats["loss_ctc"] + stats["loss_interctc_layer2"]).item() / 2
        assert loss.item() == pytest.approx(ctc + expected, rel=1e-4)

    def test_works_beside_an_attention_decoder(
        self, student_of, static, batch, reference_of
    ):
        student = student_of(static, dict(ctc_weight=0.3), **DECODER, **STILL).train()
        utterances = batch("a", "c", "f")
        loss, stats, logits = ctc_logits(student, utterances)
        lengths = logits_lengths(student, utterances)
        expected = kl(reference_of(static, utterances)[0], logits[0], lengths).mean()
        assert stats["loss_kd"].item() == pytest.approx(expected, rel=1e-4)
        espnet = 0.3 * stats["loss_ctc"].item() + 0.7 * stats["loss_att"].item()
        assert loss.item() == pytest.approx(espnet + expected, rel=1e-4)
        loss.backward()
        assert student.decoder.embed[0].weight.grad is not None

    def test_a_reference_with_a_decoder(self, student_of, build, batch, tmp_path):
        build(directory=tmp_path / "ref", model_conf=dict(ctc_weight=0.3), **DECODER)
        loss, stats, _ = student_of(tmp_path / "ref")(**batch("a", "c"))
        assert stats["loss_kd"] > 0

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_under_autocast(self, student_of, static, batch, dtype):
        student = student_of(static, **STILL).train()
        expected = student(**batch("a", "c"))[1]["loss_kd"]
        with torch.autocast("cpu", dtype=dtype):
            loss, stats, _ = student(**batch("a", "c"))
        loss.backward()
        assert stats["loss_kd"].dtype == torch.float32
        assert stats["loss_kd"].item() == pytest.approx(expected.item(), rel=0.05)
        gradients = [p.grad for p in student.parameters() if p.grad is not None]
        assert all(torch.isfinite(g).all() for g in gradients)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_reference_follows_to_the_gpu(self, student_of, static, batch):
        expected = student_of(static, **STILL)(**batch("a", "c"))[1]["loss_kd"]
        student = student_of(static, **STILL).cuda()
        with torch.autocast("cuda", dtype=torch.float16):
            loss, stats, _ = student(**batch("a", "c", device="cuda"))
        loss.backward()
        assert stats["loss_kd"].item() == pytest.approx(expected.item(), rel=0.05)


class TestStats:
    def test_carry_the_losses_and_the_depth(self, student_of, static, batch):
        student = student_of(static, encoder_conf=dict(depth_sampler="uniform"))
        optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
        depths = set()
        for _ in range(8):
            _, stats, weight = student.train()(**batch("a", "c"))
            assert stats["depth"].item() == len(student.encoder.active_layers)
            assert set(stats) >= {"loss", "loss_ctc", "loss_kd", "depth"}
            depths.add(stats["depth"].item())
            assert weight.item() == 2
            optimizer.step()
        assert len(depths) > 1
        student.eval()
        student.encoder.set_depth(3)
        with torch.no_grad():
            assert student(**batch("a", "c"))[1]["depth"].item() == 3

    def test_without_a_reference_there_is_no_kl(self, student_of, batch):
        student = student_of(None, **STILL)
        loss, stats, _ = student(**batch("a", "c"))
        assert "loss_kd" not in stats
        assert loss.item() == stats["loss_ctc"].item()

    def test_works_with_an_encoder_of_fixed_depth(self, build, static, batch):
        model = build(model="dld", model_conf=dict(reference=str(static)))
        stats = model(**batch("a", "c"))[1]
        assert "depth" not in stats and stats["loss_kd"] > 0


class TestValidation:
    """Validation computes the loss at several depths."""

    @torch.no_grad()
    def losses(self, model, batch, layers):
        """CTC's loss per utterance of a model that only has these layers."""
        shallow = copy.deepcopy(model)
        shallow.encoder.set_depth(layers=layers)
        encoded, lengths = shallow.encode(batch["speech"], batch["speech_lengths"])
        return torch.nn.functional.ctc_loss(
            shallow.ctc.ctc_lo(encoded).log_softmax(-1).transpose(0, 1),
            batch["text"],
            lengths,
            batch["text_lengths"],
            reduction="sum",
        ).item() / len(lengths)

    def test_losses_are_those_of_the_depths(self, student_of, static, batch):
        student = student_of(static, dict(valid_depths=[4, 3, 1])).eval()
        with torch.no_grad():
            stats = student(**batch("a", "c", "f"))[1]
        choices = {4: (0, 1, 2, 3), 3: (0, 2, 3), 1: (0,)}
        expected = {
            depth: self.losses(student, batch("a", "c", "f"), layers)
            for depth, layers in choices.items()
        }
        assert len(set(expected.values())) == 3
        for depth, loss in expected.items():
            assert stats[f"loss_ctc_depth{depth}"].item() == pytest.approx(loss, 1e-4)
        mean = np.mean(list(expected.values()))
        assert stats["loss_ctc_depths"].item() == pytest.approx(mean, rel=1e-4)
        full = stats["loss_ctc"].item()
        assert stats["loss_ctc_depth4"].item() == pytest.approx(full, rel=1e-5)

    def names(self, stats):
        return {name for name in stats if name.startswith("loss_ctc_depth")}

    def test_default_is_full_and_half(self, student_of, batch):
        names = {"loss_ctc_depth4", "loss_ctc_depth2", "loss_ctc_depths"}
        student = student_of()
        assert not self.names(student.train()(**batch("a"))[1])
        assert self.names(student.eval()(**batch("a"))[1]) == names

    def test_static_models_have_one_depth(self, student_of, build, batch):
        assert not self.names(student_of(None, **STILL).eval()(**batch("a"))[1])
        fixed = build(model="dld")
        assert not self.names(fixed.eval()(**batch("a"))[1])

    def test_depths_of_early_exit_are_its_exits(self, student_of, batch):
        encoder = dict(interctc_layer_idx=[2], **STILL["encoder_conf"])
        model = dict(interctc_weight=0.5)
        student = student_of(None, model, specaug=None, encoder_conf=encoder).eval()
        with torch.no_grad():
            stats = student(**batch("a", "c"))[1]
        exit_ = stats["loss_interctc_layer2"].item()
        assert stats["loss_ctc_depth2"].item() == pytest.approx(exit_, rel=1e-4)

    def test_refuses_depths_that_are_not_there(self, student_of, build):
        with pytest.raises(UserError, match="depth 5 .* 4 layers"):
            student_of(None, dict(valid_depths=[5]))
        with pytest.raises(UserError, match="ConformerEncoder has no run-time depth"):
            build(model="dld", model_conf=dict(valid_depths=[2]))

    def test_best_model_may_be_that_of_their_mean(self, corpus, python, tmp_path):
        """Every depth has a curve, and the n-best models follow the mean."""
        criterion = [["valid", "loss_ctc_depths", "min"]]
        python(
            *("-m", "dldkit.bin.asr_train"),
            *corpus.training(
                tmp_path / "exp",
                encoder="ld_conformer",
                model="dld",
                model_conf=dict(valid_depths=[4, 2, 1]),
                best_model_criterion=criterion,
                keep_nbest_models=1,
                use_matplotlib=True,
            ),
        )
        states = torch.load(tmp_path / "exp" / "checkpoint.pth", weights_only=False)
        epochs = states["reporter"]["stats"]
        means = {}
        for epoch, stats in epochs.items():
            valid = stats["valid"]
            depths = [valid[f"loss_ctc_depth{depth}"] for depth in (4, 2, 1)]
            means[epoch] = float(valid["loss_ctc_depths"])
            assert means[epoch] == pytest.approx(np.mean(depths), rel=1e-4)
        best = (tmp_path / "exp" / "valid.loss_ctc_depths.best.pth").resolve()
        assert best.name == f"{min(means, key=means.get)}epoch.pth"
        assert (tmp_path / "exp" / "images" / "loss_ctc_depth2.png").is_file()


class TestReferenceStaysOutside:
    def test_weights_are_those_of_espnets_model(self, student_of, build, static, batch):
        student = student_of(static).train()
        student(**batch("a", "c"))[0].backward()
        espnet = build(encoder="conformer")
        assert list(student.state_dict()) == list(espnet.state_dict())
        names = [name for name, _ in espnet.named_parameters()]
        assert [name for name, _ in student.named_parameters()] == names
        reference = student.open_reference().model
        assert reference not in student.modules()
        inside = {id(x) for x in [*student.parameters(), *student.buffers()]}
        outside = {id(x) for x in [*reference.parameters(), *reference.buffers()]}
        assert not inside & outside

    def test_is_frozen_and_in_eval_mode(self, student_of, static, batch):
        student = student_of(static).train()
        reference = student.open_reference().model
        before = copy.deepcopy(reference.state_dict())
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        for _ in range(2):
            student.train()
            student(**batch("a", "c"))[0].backward()
            optimizer.step()
            for part in (reference.encoder, reference.ctc):
                assert not any(module.training for module in part.modules())
            student.eval()
        assert not any(p.requires_grad for p in reference.parameters())
        assert all(p.grad is None for p in reference.parameters())
        for key, value in reference.state_dict().items():
            assert torch.equal(value, before[key]), key

    def test_opening_it_leaves_the_student_as_it_was(self, student_of, static):
        student = student_of(static).train()
        student.encoder.encoders[0].eval()
        before = copy.deepcopy(student.state_dict())
        student.open_reference()
        assert student.training and student.encoder.training
        for key, value in student.state_dict().items():
            assert torch.equal(value, before[key]), key

    def test_opening_it_does_not_disturb_the_random_numbers(
        self, student_of, static, batch
    ):
        """A resumed run opens it in another epoch than the unbroken run."""
        losses = []
        for opened_before in (True, False):
            student = student_of(static, encoder_conf=dict(dropout_rate=0.3))
            if opened_before:
                student.open_reference()
            set_all_random_seed(5)
            student.train()
            losses.append([student(**batch("a", "c"))[0].item() for _ in range(3)])
        assert losses[0] == losses[1]

    def test_sees_clean_features(
        self, student_of, static, batch, reference_of, monkeypatch
    ):
        specaug = dict(
            apply_time_warp=False,
            freq_mask_width_range=[8, 16],
            time_mask_width_range=[10, 20],
            num_time_mask=4,
        )
        student = student_of(static, specaug="specaug", specaug_conf=specaug).train()
        seen, fed = [], []
        call = LiveReference.__call__

        def spy(self, *args, **stored):
            seen.append(call(self, *args, **stored))
            return seen[-1]

        monkeypatch.setattr(LiveReference, "__call__", spy)
        student.encoder.register_forward_pre_hook(lambda _, x: fed.append(x[0]))
        utterances = batch("a", "c")
        for _ in range(2):
            student(**batch("a", "c"))
        expected, lengths = reference_of(static, utterances)
        for posteriors in seen:
            assert torch.equal(posteriors.log_probs, expected)
            assert torch.equal(posteriors.lengths, lengths)
            assert not posteriors.log_probs.requires_grad
        clean = student.eval()._extract_feats(
            utterances["speech"], utterances["speech_lengths"]
        )
        clean = student.normalize(*clean)[0]
        assert not torch.equal(fed[0], clean)  # the student's are masked ...
        assert not torch.equal(fed[0], fed[-1])  # ... differently in each step

    def test_sees_features_as_they_were_given(self, build, tmp_path, reference_of):
        """ESPnet's normalisation works in place."""
        features = dict(frontend=None, input_size=20, specaug=None)
        build(1, tmp_path / "ref", normalize=None, **features)
        student = build(
            encoder="ld_conformer",
            model="dld",
            model_conf=dict(reference=str(tmp_path / "ref")),
            encoder_conf=dict(dropout_rate=0.0, depth_sampler="full"),
            **features,
        )
        batch = dict(
            speech=5 + torch.randn(2, 60, 20),
            speech_lengths=torch.tensor([60, 45]),
            text=torch.tensor([[2, 3], [4, 5]]),
            text_lengths=torch.tensor([2, 2]),
        )
        given = batch["speech"].clone()
        expected, lengths = reference_of(
            tmp_path / "ref", dict(batch, speech=given.clone())
        )
        _, stats, logits = ctc_logits(student, batch)
        expected = kl(expected, logits[0], lengths).mean()
        assert stats["loss_kd"].item() == pytest.approx(expected, rel=1e-4)

    def test_is_not_needed_to_build_encode_and_collect_features(
        self, student_of, batch, tmp_path
    ):
        student = student_of(tmp_path / "gone").eval()
        speech = {k: v for k, v in batch("a", "c").items() if "speech" in k}
        with torch.no_grad():
            student.encode(**speech)
        student.collect_feats(**batch("a", "c"))
        with pytest.raises(UserError, match=f"{tmp_path}/gone"):
            student(**batch("a", "c"))

    def test_nothing_is_kept_after_a_step(self, student_of, static, batch):
        student = student_of(static)
        student(**batch("a", "c"))[0].backward()
        for module in student.modules():
            if isinstance(getattr(module, "attn", None), torch.Tensor):
                module.attn = None  # ESPnet keeps it for its plots
        copy.deepcopy(student)  # tensors of a graph could not be copied


class TestRefusals:
    def test_time_warp(self, student_of, static, batch):
        warp = dict(specaug="specaug", specaug_conf=dict(apply_time_warp=True))
        with pytest.raises(UserError, match="apply_time_warp: false"):
            student_of(static, **warp)
        student_of(None, **warp)(**batch("a", "c"))

    def test_no_ctc(self, student_of, static):
        with pytest.raises(UserError, match="ctc_weight"):
            student_of(static, dict(ctc_weight=0.0), **DECODER)

    @pytest.mark.parametrize(
        "option", [dict(kd_direction="both"), dict(kd_temperature=0.0)]
    )
    def test_loss_options(self, student_of, static, option):
        with pytest.raises(UserError, match=next(iter(option))):
            student_of(static, option)
