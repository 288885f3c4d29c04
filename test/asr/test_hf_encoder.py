"""Encoders of transformers, against transformers itself."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers
from espnet2.legacy.nets.pytorch_backend.transformer.subsampling import TooShortUttError
from espnet2.tasks.asr import encoder_choices
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import dldkit
from dldkit.asr.collection import collect_posteriors
from dldkit.bin import asr_inference
from dldkit.errors import UserError
from dldkit.report.cost import macs, parameters_in_use
from dldkit.report.scoring import not_decoded
from dldkit.sfm.wave import log_mel, normalize_speech

dldkit.register()

ROOT = Path(__file__).resolve().parents[2]
WAVE: dict[str, Any] = dict(
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=32,
    conv_dim=[8] * 7,
    num_conv_pos_embedding_groups=2,
    layerdrop=1.0,  # would skip all layers in training
    mask_time_prob=0.3,
    mask_time_length=2,
)
STABLE = dict(
    do_stable_layer_norm=True, feat_extract_norm="layer", feat_proj_layer_norm=True
)
WHISPER: dict[str, Any] = dict(
    d_model=16,
    encoder_layers=3,
    encoder_attention_heads=2,
    encoder_ffn_dim=32,
    decoder_layers=1,
    decoder_attention_heads=2,
    decoder_ffn_dim=32,
    max_source_positions=50,  # one second instead of thirty
    vocab_size=9,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=0,
    decoder_start_token_id=0,
    encoder_layerdrop=1.0,
    mask_time_prob=0.3,
    mask_time_length=2,
)
POSITIONS = dict(num_conv_pos_embeddings=16)
FAMILIES: dict[str, tuple[type, dict[str, Any]]] = dict(
    wavlm=(transformers.WavLMModel, WAVE | POSITIONS),
    wavlm_stable=(transformers.WavLMModel, WAVE | POSITIONS | STABLE),
    hubert=(transformers.HubertModel, WAVE | POSITIONS),
    wav2vec2=(transformers.Wav2Vec2Model, WAVE | POSITIONS),
    wav2vec2_stable=(transformers.Wav2Vec2Model, WAVE | POSITIONS | STABLE),
    data2vec=(
        transformers.Data2VecAudioModel,
        WAVE | dict(num_conv_pos_embeddings=2, conv_pos_kernel_size=5),
    ),
    whisper=(WhisperEncoder, WHISPER),
)
CNN = ("encoder.model.feature_extractor.", "encoder.model.conv")  # of a recogniser
FIVE = ["wavlm", "hubert", "wav2vec2", "data2vec", "whisper"]
NO_DROPOUT = dict.fromkeys(
    "hidden_dropout attention_dropout activation_dropout feat_proj_dropout".split(), 0.0
)
MASKED = dict(apply_spec_augment=True)


@pytest.fixture
def saved(tmp_path):
    """Return a function that saves a model of a family, and returns it and its path."""

    def save(family: str, cls=None, **options: Any) -> tuple[torch.nn.Module, Path]:
        base, sizes = FAMILIES[family]
        cls = cls or base
        torch.manual_seed(0)
        model = cls(cls.config_class(**{**sizes, **options})).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name or "rel_attn_embed" in name:  # else alike, or small
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        directory = tmp_path / family
        model.save_pretrained(directory)
        if family != "whisper":
            stable = family.endswith("stable")
            extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=stable)
            extractor.save_pretrained(directory)
        return model, directory

    return save


@pytest.fixture
def speech() -> tuple[torch.Tensor, torch.Tensor]:
    """Two utterances (Batch, Samples) of unequal lengths; zeros pad the second."""
    generator = torch.Generator().manual_seed(1)
    samples = 0.1 * torch.randn(2, 9000, generator=generator) + 0.05
    samples[1, 6010:] = 0
    return samples, torch.tensor([9000, 6010])


def make(model: Path | str, **options: Any):
    """Build the encoder as ESPnet does."""
    cls = encoder_choices.get_class("ld_hf")
    options = {"depth_sampler": "full", **options}
    return cls(input_size=1, model=str(model), **options).eval()


@torch.no_grad()
def output_of(
    model: torch.nn.Module, speech: torch.Tensor, lengths: torch.Tensor, **options: Any
) -> Any:
    """Return what transformers gives, fed as it wants to be."""
    if isinstance(model, WhisperEncoder):
        extract = transformers.WhisperFeatureExtractor(chunk_length=1)
        waves = [s[:n].numpy() for s, n in zip(speech, lengths)]
        mel = extract(waves, sampling_rate=16000, return_tensors="pt")
        return model(mel.input_features, **options)
    if getattr(model.config, "do_stable_layer_norm", False):
        speech = normalize_speech(speech, lengths)
    mask = None
    if int(lengths.min()) < speech.size(1):
        mask = (torch.arange(speech.size(1)) < lengths[:, None]).long()
    return model(speech, attention_mask=mask, **options)


def with_layers(model: torch.nn.Module, layers: tuple[int, ...]) -> torch.nn.Module:
    """Return transformers' model of just these layers, made by hand."""
    config = copy.deepcopy(model.config)
    is_whisper = isinstance(model, WhisperEncoder)
    setattr(config, "encoder_layers" if is_whisper else "num_hidden_layers", 0)
    states = {}
    prefix = "layers." if is_whisper else "encoder.layers."
    bias = "attention.rel_attn_embed.weight"
    for key, value in model.state_dict().items():
        if not key.startswith(prefix):
            states[key] = value
            continue
        slot, name = key[len(prefix) :].split(".", 1)
        if name == bias:  # of the first layer there is, whichever it is
            states[f"{prefix}0.{name}"] = value
        elif int(slot) in layers:
            states[f"{prefix}{layers.index(int(slot))}.{name}"] = value
    setattr(
        config, "encoder_layers" if is_whisper else "num_hidden_layers", len(layers)
    )
    made = type(model)(config).eval()
    made.load_state_dict(states)
    return made


class TestDepth:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("padded", [False, True])
    def test_full_depth_is_bit_identical_to_transformers(
        self, saved, speech, family, padded
    ):
        model, path = saved(family)
        samples, lengths = speech
        if not padded:
            lengths = torch.full((2,), 16000 if family == "whisper" else 9000)
            if family == "whisper":  # as long as it listens
                samples = samples.repeat(1, 2)[:, :16000]
        options = dict(whisper_pad=True) if family == "whisper" and padded else {}
        encoder = make(path, **options)
        output, frames, _ = encoder(samples, lengths)
        expected = output_of(model, samples, lengths).last_hidden_state
        longest = int(frames.max())
        assert output.shape == (2, longest, 16) == (2, longest, encoder.output_size())
        assert torch.equal(output, expected[:, :longest])
        if family == "whisper":
            assert frames.tolist() == [n // 320 for n in lengths.tolist()]
        else:
            known = model._get_feat_extract_output_lengths(lengths)
            assert frames.tolist() == known.tolist()
            assert expected.size(1) == longest

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("layers", [(0, 1), (0, 2), (1, 2), (2,)])
    def test_a_depth_is_a_model_of_its_layers(self, saved, speech, family, layers):
        model, path = saved(family)
        options = dict(whisper_pad=True) if family == "whisper" else {}
        encoder = make(path, **options)
        encoder.set_depth(layers=layers)
        output, frames, _ = encoder(*speech)
        made = output_of(with_layers(model, layers), *speech).last_hidden_state
        assert torch.equal(output, made[:, : int(frames.max())])
        assert not torch.allclose(output, make(path, **options)(*speech)[0])

    def test_a_depth_means_the_layers_that_were_trained(self, saved):
        _, path = saved("hubert")
        assert make(path).choose_layers(2) == (0, 2)
        assert make(path, layer_choice="prefix").choose_layers(2) == (0, 1)

    def test_wavlm_without_its_last_layer_returns_all_utterances(self, saved, speech):
        _, path = saved("wavlm")
        encoder = make(path)
        encoder.set_depth(layers=(0, 1))
        assert len(encoder(*speech)[0]) == 2

    def test_a_checkpoint_of_a_bigger_model_may_be_cut(self, saved, speech):
        model, path = saved("wavlm")
        encoder = make(path, num_blocks=2)
        assert len(encoder.gates) == 2
        expected = output_of(with_layers(model, (0, 1)), *speech).last_hidden_state
        assert torch.equal(encoder(*speech)[0], expected)
        with pytest.raises(UserError, match="num_blocks 4: the model has 3 layers"):
            make(path, num_blocks=4)

    def test_an_adapter_is_left_out(self, saved, speech):
        """It would follow the output, and halve its rate."""
        encoder = make(saved("wav2vec2", add_adapter=True)[1])
        output, frames, _ = encoder(*speech)
        assert frames.tolist() == [27, 18] and output.size(1) == 27
        assert not [n for n, _ in encoder.named_parameters() if "adapter" in n]

    def test_whisper_may_be_a_part_of_a_checkpoint(self, saved, speech):
        model, path = saved("whisper", transformers.WhisperModel)
        expected = output_of(model.encoder, *speech).last_hidden_state
        output = make(path, whisper_pad=True)(*speech)[0]
        assert torch.equal(output, expected[:, : output.size(1)])


class TestBatches:
    @pytest.mark.parametrize("family", ["wavlm_stable", "wav2vec2_stable", "whisper"])
    def test_an_utterance_gives_the_same_alone(self, saved, speech, family):
        encoder = make(saved(family)[1])
        samples, lengths = speech
        together, frames, _ = encoder(samples, lengths)
        for i, length in enumerate(lengths.tolist()):
            alone = encoder(samples[i : i + 1, :length], lengths[i : i + 1])[0]
            assert torch.allclose(together[i, : frames[i]], alone[0], atol=1e-5)

    def test_whisper_hears_what_its_extractor_gives(self, saved, speech):
        encoder = make(saved("whisper")[1])
        extract = transformers.WhisperFeatureExtractor(chunk_length=1)
        expected = extract(speech[0][0].numpy(), sampling_rate=16000)
        samples = torch.nn.functional.pad(speech[0][:1], (0, 7000))
        mel = log_mel(encoder.family.mel, samples)
        assert np.array_equal(mel[0].numpy(), expected.input_features[0])

    @pytest.mark.parametrize("family", ["hubert", "whisper"])
    def test_too_short_utterances_are_known_as_such(self, saved, speech, family):
        encoder = make(saved(family)[1])
        with pytest.raises(TooShortUttError, match="has 310 samples"):
            encoder(speech[0], torch.tensor([9000, 310]))

    def test_whisper_refuses_what_it_has_no_positions_for(self, saved):
        encoder = make(saved("whisper")[1])
        message = "number 1 of a batch has 16001 samples.*--max_wav_duration 1"
        with pytest.raises(UserError, match=message):
            encoder(torch.zeros(2, 16001), torch.tensor([9000, 16001]))

    @pytest.mark.parametrize(
        "options",
        [
            [],
            ["--batch_size", "1"],
            ["--exit_threshold", "1"],
            ["--beam_size", "2", "--ctc_weight", "1", "--batch_size", "1"],
        ],
    )
    def test_decoding_goes_on_after_what_is_too_long(
        self, saved, build_hf, tmp_path, options
    ):
        """In a batch with others, and alone; stopping early, and by beam search."""
        exp, data = tmp_path / "exp", tmp_path / "data"
        exits = dict(layer_choice="prefix", depth_sampler="full", exits=1)
        build_hf(saved("whisper")[1], exits, model="dld", directory=exp)
        data.mkdir()
        lines = []
        for utt, size in dict(a=9000, long=16001, short=300).items():
            soundfile.write(data / f"{utt}.wav", np.full(size, 0.1), 16000)
            lines.append(f"{utt} {data}/{utt}.wav\n")
        (data / "wav.scp").write_text("".join(lines))
        asr_inference.main(
            [*("--output_dir", str(tmp_path), "--num_workers", "0")]
            + [*("--asr_train_config", str(exp / "config.yaml"))]
            + [*("--asr_model_file", str(exp / "valid.loss_ctc.best.pth"))]
            + [*("--data_path_and_name_and_type", f"{data}/wav.scp,speech,sound")]
            + options
        )
        assert not_decoded(data, tmp_path / "1best_recog") == {
            "long": "too long for the encoder",
            "short": "too short for the encoder",
        }
        texts = (tmp_path / "1best_recog" / "text").read_text().splitlines()
        assert [text.split()[0] for text in texts] == ["a", "long", "short"]
        with pytest.raises(UserError, match="16001 samples"):  # they are for training
            collect_posteriors(exp, [data], tmp_path / "posteriors")


class TestExits:
    @pytest.mark.parametrize("layer_weights", ["last", "weighted_sum"])
    def test_hand_down_a_share_of_the_gradient(self, saved, speech, layer_weights):
        encoder = make(
            saved("hubert")[1],
            layer_choice="prefix",
            exits=1,
            layer_weights=layer_weights,
        )
        gradients = []
        for share in (1.0, 0.5):
            encoder.zero_grad()
            with encoder.collected((1,), share):
                encoder(*speech)[0].pow(3).sum().backward()
            gradients.append(
                [
                    [p.grad.clone() for p in layer.parameters()]
                    for layer in encoder.gates.children()
                ]
            )
        whole, half = gradients
        torch.testing.assert_close(half[0], [g / 2 for g in whole[0]])
        torch.testing.assert_close(half[1:], whole[1:])
        assert any(g.any() for g in whole[0])

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("layer_weights", ["last", "weighted_sum"])
    def test_are_the_outputs_of_their_depths(
        self, saved, speech, family, layer_weights
    ):
        encoder = make(
            saved(family)[1],
            layer_choice="prefix",
            exits=1,
            layer_weights=layer_weights,
        )
        assert encoder.exits == [1, 2]
        with encoder.collected((1, 2, 3)) as outputs:
            encoder(*speech)
        assert list(outputs) == [1, 2]
        for depth, output in outputs.items():
            encoder.set_depth(depth)
            assert torch.equal(output, encoder(*speech)[0])

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("layer_weights", ["last", "weighted_sum"])
    def test_utterances_may_leave(self, saved, speech, family, layer_weights):
        encoder = make(
            saved(family)[1],
            layer_choice="prefix",
            exits=1,
            layer_weights=layer_weights,
        )
        with encoder.collected((1, 2)) as expected:
            expected[3] = encoder(*speech)[0]
        frames = encoder(*speech)[1]
        seen = {}

        def leave(depth, output, lengths):
            seen[depth] = output, lengths
            return torch.tensor([True, False] if depth == 1 else [False] * len(output))

        with encoder.leaving((1, 2), leave):
            encoder(*speech)
        assert sorted(seen) == [1, 2, 3]
        for depth, (output, lengths) in seen.items():
            still = slice(0 if depth == 1 else 1, 2)
            assert torch.equal(lengths, frames[still])
            assert torch.allclose(output, expected[depth][still], atol=1e-6)

    def test_need_that_a_depth_means_the_first_layers(self, saved):
        with pytest.raises(UserError, match="layer_choice: even.*prefix"):
            make(saved("hubert")[1], exits=1, layer_choice="even")


class TestWeightedSum:
    @pytest.mark.parametrize("family", FIVE)
    @pytest.mark.parametrize("layers", [(0, 1, 2), (0, 2)])
    def test_is_the_mean_of_what_runs(self, saved, speech, family, layers):
        model, path = saved(family)
        options = dict(whisper_pad=True) if family == "whisper" else {}
        encoder = make(path, layer_weights="weighted_sum", **options)
        logits = torch.tensor([0.3, -0.2, 0.9, 0.1])
        encoder.layer_logits.data.copy_(logits)
        encoder.set_depth(layers=layers)
        output = encoder(*speech)[0]
        made = with_layers(model, layers)
        norm = getattr(made, "layer_norm", None)
        if norm is not None:  # Whisper's; its last hidden state is after it
            made.layer_norm = torch.nn.Identity()
        states = output_of(made, *speech, output_hidden_states=True).hidden_states
        shares = logits[[0, *(layer + 1 for layer in layers)]].softmax(0)
        assert len(states) == len(shares)
        expected = sum(share * state for share, state in zip(shares, states))
        expected = expected if norm is None else norm(expected)
        assert torch.allclose(output, expected[:, : output.size(1)], atol=1e-5)

    @pytest.mark.parametrize("family", ["hubert", "wavlm_stable", "whisper"])
    def test_of_the_last_layer_alone_is_last(self, saved, speech, family):
        path = saved(family)[1]
        encoder = make(path, layer_weights="weighted_sum")
        encoder.layer_logits.data[-1] = 50
        expected = make(path)(*speech)[0]
        assert torch.allclose(encoder(*speech)[0], expected, atol=1e-5)

    def test_is_learnt(self, saved, speech):
        encoder = make(saved("hubert")[1], layer_weights="weighted_sum").train()
        encoder(*speech)[0].square().sum().backward()
        assert encoder.layer_logits.grad.abs().min() > 0


class TestTraining:
    @pytest.mark.parametrize("family", FIVE)
    def test_the_librarys_layerdrop_and_masks_are_off(self, saved, speech, family):
        options = {} if family == "whisper" else NO_DROPOUT
        encoder = make(saved(family, **options)[1])
        expected = encoder(*speech)[0]
        assert torch.allclose(encoder.train()(*speech)[0], expected, atol=1e-6)

    @pytest.mark.parametrize("family", FIVE)
    def test_a_frozen_cnn_stays_as_it_is(self, saved, speech, family):
        encoder = make(saved(family)[1], layer_choice="prefix", freeze_cnn=True).train()
        encoder(*speech)[0].square().sum().backward()
        cnn = {
            parameter
            for module in encoder.family.cnn(encoder.model)
            for parameter in module.parameters()
        }
        assert cnn and all(p.grad is None for p in cnn)
        assert not any(p.requires_grad for p in cnn)
        assert not any(m.training for m in encoder.family.cnn(encoder.model))
        others = {
            name
            for name, p in encoder.named_parameters()
            if p not in cnn and p.grad is None
        }
        # positions are sines
        positions = {"model.embed_positions.weight"} if family == "whisper" else set()
        assert others == positions
        encoder = make(saved(family)[1], freeze_cnn=False).train()
        encoder(*speech)[0].square().sum().backward()
        assert all(
            p.grad is not None
            for module in encoder.family.cnn(encoder.model)
            for p in module.parameters()
        )

    def test_all_that_is_pretrained_waits_for_freeze_steps(self, saved, speech):
        path = saved("hubert")[1]
        in_graph = []

        def begin():
            encoder = make(
                path, freeze_steps=3, freeze_cnn=False, layer_weights="weighted_sum"
            ).train()
            encoder.model.feature_projection.register_forward_pre_hook(
                lambda module, args: in_graph.append(args[0].requires_grad)
            )
            return encoder, torch.optim.SGD(encoder.parameters(), 0.01)

        def step(encoder, optimizer) -> bool:
            optimizer.zero_grad()
            encoder(*speech)[0].square().sum().backward()
            optimizer.step()
            assert encoder.layer_logits.grad is not None
            grads = [p.grad is not None for p in encoder.model.parameters()]
            assert all(grads) or not any(grads)
            assert in_graph[-1] == all(grads)  # the CNN, which is costly
            return all(grads)

        encoder, optimizer = begin()
        assert [step(encoder, optimizer) for _ in range(2)] == [False, False]
        states = copy.deepcopy(encoder.state_dict())
        # a resumed run goes on where that one was
        encoder, optimizer = begin()
        encoder.load_state_dict(states)
        assert [step(encoder, optimizer) for _ in range(3)] == [False, True, True]
        # ESPnet's averaging adds integers up
        assert all(value.is_floating_point() for value in states.values())

    def test_accumulated_gradients_are_of_one_step(self, saved, speech):
        encoder = make(saved("hubert")[1], freeze_steps=1).train()
        for _ in range(3):
            encoder(*speech)
        assert encoder.state_dict()["steps_done"] == 0

    def test_weights_of_a_model_that_was_frozen_at_first_fit_others(self, saved):
        path = saved("hubert")[1]
        weights = make(path, freeze_steps=1).state_dict()
        assert "steps_done" in weights
        make(path).load_state_dict(weights)
        assert "steps_done" in weights  # of the caller

    @pytest.mark.parametrize("family", FIVE)
    def test_checkpointing_changes_nothing_but_memory(self, saved, speech, family):
        path = saved(family)[1]
        gradients, runs = [], []
        for checkpointing in (False, True):
            encoder = make(path, gradient_checkpointing=checkpointing).train()
            encoder.gates.select((0, 2))
            norms = [layer.final_layer_norm for layer in encoder.gates.children()]
            counts = [0, 0, 0]

            def count(slot, *_):
                counts[slot] += 1

            for slot, norm in enumerate(norms):
                norm.register_forward_pre_hook(lambda *_, slot=slot: count(slot))
            torch.manual_seed(4)
            encoder(*speech)[0].square().sum().backward()
            gradients.append({n: p.grad for n, p in encoder.named_parameters()})
            runs.append(counts)
        assert runs == [[1, 0, 1], [2, 0, 2]]  # again in the backward pass
        for name, gradient in gradients[0].items():
            other = gradients[1][name]
            assert (gradient is other is None) or torch.allclose(gradient, other)

    @pytest.mark.parametrize("family", FIVE)
    def test_masks_are_transformers_own(self, saved, speech, family):
        model, path = saved(family)
        encoder = make(path, apply_spec_augment=True)
        if family != "whisper":
            assert torch.equal(encoder.model.masked_spec_embed, model.masked_spec_embed)
        plain = make(path)(*speech)[0]
        assert torch.equal(encoder(*speech)[0], plain)  # none in evaluation
        encoder.family.masking.train()
        encoder.model.training = True  # of it alone, to leave dropout out
        np.random.seed(0)
        masked = encoder(*speech)[0]
        assert not torch.allclose(masked, plain)
        np.random.seed(0)
        assert torch.equal(encoder(*speech)[0], masked)
        short = speech[0][:, :700], torch.tensor([700, 650])
        encoder(*short)  # no room for a span, which transformers refuses

    def test_mask_time_prob_replaces_that_of_the_checkpoint(self, saved):
        path = saved("hubert")[1]
        options = dict(apply_spec_augment=True)
        assert make(path, **options).model.config.mask_time_prob == 0.3
        encoder = make(path, mask_time_prob=0.1, **options)
        assert encoder.model.config.mask_time_prob == 0.1
        with pytest.raises(UserError, match="without apply_spec_augment"):
            make(path, mask_time_prob=0.1)


@pytest.fixture
def build_hf(build):
    """Return a function that builds a model of speech recognition with the encoder."""

    def model(path: Path, encoder_conf=None, **changes: Any):
        espnets = "output_size attention_heads linear_units cnn_module_kernel"
        espnets += " macaron_style dropout_rate num_blocks"
        encoder_conf = {
            **dict.fromkeys(espnets.split()),
            "model": str(path),
            **(encoder_conf or {}),
        }
        options = dict(
            encoder="ld_hf",
            encoder_conf=encoder_conf,
            input_size=1,
            specaug=None,
            normalize=None,
            frontend_conf=dict(fs=16000),
        )
        return build(**{**options, **changes})

    return model


class TestModel:
    @pytest.mark.parametrize("family", FIVE)
    def test_trains_exits_and_all_weights(self, saved, build_hf, batch, family):
        exits = dict(layer_choice="prefix", depth_sampler="full", exits=1)
        model = build_hf(saved(family)[1], exits, model="dld").train()
        loss, stats, _ = model(**batch("a", "c"))
        loss.backward()
        assert stats["depth"] == 3
        untrained = {
            name
            for name, p in model.named_parameters()
            if p.grad is None or not p.grad.abs().max() > 0
        }
        frozen = {n for n, _ in model.named_parameters() if n.startswith(CNN)}
        assert frozen and frozen <= untrained
        positions = "encoder.model.embed_positions.weight"
        assert untrained - frozen <= {positions}

    def test_forwards_of_a_step_share_their_masks(self, saved, build_hf, batch):
        masked = dict(
            layer_choice="even",
            depth_sampler="uniform",
            apply_spec_augment=True,
        )
        path = saved("hubert")[1]
        self_taught = dict(reference="self")
        model = build_hf(path, masked, model="dld", model_conf=self_taught).train()
        seen = []
        model.encoder.family.masking.register_forward_hook(
            lambda module, args, output: seen.append((output == 0).all(-1))
        )
        model.encoder.model.masked_spec_embed.data.zero_()
        for module in model.encoder.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model(**batch("a", "c"))
        assert len(seen) >= 2 and seen[0].any()
        assert all(torch.equal(mask, seen[0]) for mask in seen)
        model(**batch("a", "c"))
        assert not torch.equal(seen[-1], seen[0])

    @pytest.mark.parametrize("family", ["wavlm_stable", "whisper"])
    def test_computes_the_cnn_of_the_reference_too(
        self, saved, build_hf, batch, tmp_path, monkeypatch, family
    ):
        path = saved(family)[1]
        build_hf(path, directory=tmp_path / "exp", seed=1)

        def student(**options):
            options |= dict(layer_choice="prefix", depth_sampler="full", exits=1)
            distilled = dict(reference=str(tmp_path / "exp"))
            return build_hf(path, options, model="dld", model_conf=distilled).train()

        model = student()
        runs = []
        cls = type(model.encoder.family)
        features = cls.features
        monkeypatch.setattr(
            cls, "features", lambda *args: runs.append(1) or features(*args)
        )

        def loss_of(model):
            runs.clear()
            torch.manual_seed(2)
            model.zero_grad()
            loss = model(**batch("a", "c"))[0]
            loss.backward()
            return loss, [p.grad for p in model.parameters() if p.grad is not None]

        loss, gradients = loss_of(model)
        assert len(runs) == 1
        model._share_cnn = ()
        alone, expected = loss_of(model)
        assert len(runs) == 2
        assert torch.equal(loss, alone)
        assert all(map(torch.equal, gradients, expected))
        others = [student(), student(freeze_cnn=False)]
        with torch.no_grad():
            next(others[0].encoder.family.cnn(others[0].encoder.model)[0].parameters())[
                0
            ] += 1e-3
        if family == "whisper":  # masks what its CNN takes
            others.append(student(apply_spec_augment=True))
        for other in others:
            loss_of(other)
            assert len(runs) == 2

    def test_is_built_again_without_the_model(self, saved, build_hf, batch, tmp_path):
        from dldkit.asr.loading import load_asr_model

        model, path = saved("wav2vec2_stable")  # which normalises speech
        built = build_hf(path, directory=tmp_path / "exp").eval()
        shutil.rmtree(path)
        loaded, args = load_asr_model(tmp_path / "exp")
        assert args.encoder_conf["num_blocks"] == 3
        assert args.encoder_conf["normalize"] is True
        speech = {k: v for k, v in batch("a", "c").items() if k.startswith("speech")}
        assert torch.equal(loaded.encode(**speech)[0], built.encode(**speech)[0])

    def test_costs_what_runs(self, saved, build_hf):
        model = build_hf(saved("wavlm")[1]).eval()
        samples = np.zeros(16000, np.float32)
        found = {}
        for layers in ((0, 1, 2), (0, 1), (1, 2)):
            model.encoder.set_depth(layers=layers)
            found[layers] = macs(model, samples), parameters_in_use(model)
        layer = list(model.encoder.gates.children())[1]
        size = sum(p.numel() for p in layer.parameters())
        bias = model.encoder.gates[0].attention.rel_attn_embed.weight.numel()
        full = sum(p.numel() for p in (*model.encoder.parameters(),))
        full += sum(p.numel() for p in model.ctc.parameters())
        assert found[0, 1, 2][1] == full
        assert found[0, 1][1] == full - size
        # the first layer is as big but for the bias, which is used all the same
        assert found[1, 2][1] == full - size and bias > 0
        assert found[0, 1][0] == found[1, 2][0] < found[0, 1, 2][0]

    def test_attention_is_counted(self, saved, build_hf):
        model = build_hf(saved("hubert")[1]).eval()
        frames = 49
        counts = []
        for layers in ((0, 1, 2), (0, 1)):
            model.encoder.set_depth(layers=layers)
            counts.append(macs(model, np.zeros(16000, np.float32)))
        linear = frames * (4 * 16 * 16 + 2 * 16 * 32)
        attention = 2 * frames * frames * 16
        assert counts[0] - counts[1] == linear + attention

    def test_needs_no_calibration(self, saved, build_hf, corpus, tmp_path, caplog):
        from dldkit.asr.calibration import write_depth_profile

        build_hf(saved("hubert")[1], directory=tmp_path / "exp")
        caplog.set_level("INFO")
        checkpoint = tmp_path / "exp" / "valid.loss_ctc.best.pth"
        write_depth_profile(checkpoint, corpus.train, [2])
        assert "no BatchNorm: it needs no depth profile" in caplog.text


class TestRefusals:
    def test_of_models(self, saved, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(UserError, match="nowhere is no directory.*the network"):
            make(tmp_path / "nowhere")
        transformers.BertConfig().save_pretrained(tmp_path / "bert")
        with pytest.raises(UserError, match="is a bert model: choose one of wavlm"):
            make(tmp_path / "bert")
        path = saved("hubert")[1]
        extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=8000)
        extractor.save_pretrained(path)
        with pytest.raises(UserError, match="takes speech of 8000 Hz"):
            make(path)

    @pytest.mark.parametrize(
        "options, message",
        [
            (dict(layer_weights="first"), "layer_weights 'first': write last or weigh"),
            (dict(layer_weights=["last"]), "layer_weights: .* is no str"),
            (dict(freeze_steps=-1), "freeze_steps -1: write a whole number from 0"),
            (dict(freeze_steps=1.5), "freeze_steps: 1.5 is no int"),
            (dict(freeze_steps="10"), "freeze_steps: '10' is no int"),
            (dict(num_blocks="two"), r"num_blocks: 'two' is no Optional\[int\]"),
            (dict(num_blocks=True), r"num_blocks: True is no Optional\[int\]"),
            (dict(num_blocks=0), "num_blocks 0: write a whole number from 1"),
            (dict(freeze_cnn="no"), "freeze_cnn: 'no' is no bool"),
            (dict(apply_spec_augment=1), "apply_spec_augment: 1 is no bool"),
            (dict(normalize="no"), r"normalize: 'no' is no Optional\[bool\]"),
            (dict(keep_prob="5e-1"), "keep_prob: '5e-1' is no float"),
            (dict(exits="2"), r"exits: '2' is no Union\[int, Sequence\[int\]\]"),
            (
                MASKED | dict(mask_time_prob="a"),
                r"mask_time_prob: 'a' is no Optional\[float\]",
            ),
            (MASKED | dict(mask_time_prob=2.0), "mask_time_prob 2.0: .* from 0 to 1"),
            (MASKED | dict(mask_time_prob=-1.0), "mask_time_prob -1.0: .* from 0 to 1"),
            (dict(mask_time_prob=0.5), "mask_time_prob 0.5 without apply_spec_augment"),
            (dict(whisper_pad=True), "is a hubert model: remove it"),
            (dict(depth_sampler="beta"), "depth_sampler 'beta'"),
        ],
    )
    def test_of_options(self, saved, options, message):
        with pytest.raises(UserError, match=message):
            make(saved("hubert")[1], **options)

    @pytest.mark.parametrize(
        "changes, message",
        [
            (dict(frontend_conf=dict(fs="8k")), "16000 Hz, and fs is 8000"),
            (dict(specaug="specaug"), "specaug: null .*apply_spec_augment"),
            (dict(normalize="utterance_mvn"), "normalize: null .*feats_normalize none"),
            (dict(input_size=80), "waveforms, not 80 features: set input_size: 1"),
            (dict(input_size=None), "waveforms, not .* features: set input_size: 1"),
        ],
    )
    def test_of_configs(self, saved, build_hf, changes, message):
        with pytest.raises(UserError, match=message):
            build_hf(saved("hubert")[1], **changes)


DECODE = """
import json, os, socket, sys

def blocked(*_, **__):
    raise OSError("there is no network")

socket.socket.connect = socket.getaddrinfo = socket.create_connection = blocked
import soundfile
from dldkit.asr.inference import Speech2Text
speech = soundfile.read(sys.argv[2], dtype="float32")[0]
recognise = Speech2Text.from_pretrained(sys.argv[1])
found = []
for depth in (3, 1):
    recognise.set_depth(depth)
    found.append(float(recognise(speech)[0][-1].score))
print(json.dumps(found))
"""


@pytest.mark.integration
@pytest.mark.parametrize(
    "family",
    ["wavlm", *(pytest.param(f, marks=pytest.mark.slow) for f in FIVE if f != "wavlm")],
)
def test_a_zip_decodes_where_nothing_else_is(
    saved, corpus, tmp_path, python, monkeypatch, family
):
    from dldkit.asr.inference import Speech2Text
    from dldkit.bin.asr_train import main
    from dldkit.pack import pack_asr

    sizes = dict(max_source_positions=100) if family == "whisper" else {}
    model, path = saved(family, **sizes)
    exp = tmp_path / "exp" / "asr_hf"
    espnets = "output_size attention_heads linear_units cnn_module_kernel"
    espnets += " macaron_style dropout_rate num_blocks"
    main(
        corpus.training(
            exp,
            encoder="ld_hf",
            encoder_conf={
                **dict.fromkeys(espnets.split()),
                "model": str(path),
                "layer_choice": "prefix",
                "depth_sampler": "uniform",
                "exits": 1,
            },
            model="dld",
            model_conf=dict(reference="self"),
            input_size=1,
            frontend_conf=dict(fs=16000),
            specaug=None,
            normalize=None,
            max_epoch=1,
        )
    )
    checkpoint = exp / "valid.loss_ctc.ave.pth"
    begun = {f"encoder.model.{k}": v for k, v in model.state_dict().items()}
    trained = torch.load(checkpoint)
    change = {k: (trained[k] - v).abs().max() for k, v in begun.items() if k in trained}
    cnn = {k for k in change if k.startswith(CNN)}
    assert cnn and not any(change[k] for k in cnn)
    (first,) = (k for k in change if ".layers.0." in k and "q_proj.weight" in k)
    assert 0 < change[first] < 0.1
    shutil.rmtree(path)
    pack_asr(checkpoint, tmp_path / "packed" / "model.zip", corpus.dev)
    recognise = Speech2Text(exp / "config.yaml", checkpoint)
    expected = []
    for depth in (3, 1):
        recognise.set_depth(depth)
        expected.append(float(recognise(corpus.speech("x"))[0][-1].score))
    stopped = recognise(corpus.speech("x"), exit_threshold=1.0)
    assert stopped[0][-1].depth == 1
    shutil.rmtree(exp)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HOME", str(elsewhere))
    archive, wav = tmp_path / "packed" / "model.zip", corpus.dev / "x.wav"
    process = python("-c", DECODE, archive, wav, cwd=elsewhere)
    found = json.loads(process.stdout.splitlines()[-1])
    assert found == pytest.approx(expected, rel=1e-4)
    assert expected[0] != pytest.approx(expected[1], rel=1e-3)


@pytest.mark.integration
def test_the_wavlm_setting_of_the_paper_trains(saved, corpus, tmp_path):
    """Two optimiser steps of each system; the reference is the static model."""
    from omegaconf import OmegaConf

    from dldkit.bin.asr_train import main
    from dldkit.config_files import merge_files

    model, path = saved("wavlm", num_hidden_layers=12)
    config = ROOT / "egs2/librispeech_100/asr1/conf/train_asr_wavlm.yaml"
    for system in ("static", "rd", "dld_paper", "anytime"):
        merged = merge_files([config, ROOT / "conf" / "systems" / f"{system}.yaml"])
        is_pulled = bool(OmegaConf.missing_keys(merged))
        if is_pulled:
            merged.model_conf.reference = str(tmp_path / "static")
        if system == "anytime":
            merged.init_param = []
        changes = dict(
            encoder_conf=dict(model=str(path)),
            frontend_conf=dict(fs=16000),  # what asr.sh gives
            token_type="word",
            batch_type="unsorted",
            batch_size=3,
            num_iters_per_epoch=2 * merged.accum_grad,
            max_epoch=1,
            num_workers=0,
        )
        trained = OmegaConf.to_container(OmegaConf.merge(merged, changes))
        main(replace(corpus, config=trained).training(tmp_path / system))

        states = torch.load(tmp_path / system / "checkpoint.pth", weights_only=False)
        assert states["optimizers"][0]["state"][0]["step"] == 2
        stats = states["reporter"]["stats"][1]["train"]
        assert np.isfinite(stats["loss"]) and ("loss_kd" in stats) == is_pulled
        assert 0 < stats["loss_kd"] if is_pulled else True
        assert 1 <= stats.get("depth", 12) <= 12
        begun = {f"encoder.model.{k}": v for k, v in model.state_dict().items()}
        kept = {k for k in begun if torch.equal(begun[k], states["model"][k])}
        cnn = {k for k in begun if "feature_extractor" in k}
        assert cnn and cnn <= kept
        # the rate has only begun to rise: weights near 1 are still what they were
        moved = {k for k in begun.keys() - kept if k.endswith("q_proj.weight")}
        assert moved


@pytest.mark.integration
def test_freeze_steps_are_those_of_this_training(saved, corpus, tmp_path):
    """Not those of the model that it begins with; a resumed one goes on counting."""
    from dldkit.bin.asr_train import main

    path = saved("hubert")[1]
    name = "encoder.model.encoder.layers.0.attention.q_proj.weight"

    def train(exp: str, epochs: int, begin: str) -> dict[str, torch.Tensor]:
        espnets = "output_size attention_heads linear_units cnn_module_kernel"
        espnets += " macaron_style dropout_rate num_blocks"
        encoder_conf = dict(model=str(path), freeze_steps=2, depth_sampler="full")
        main(
            corpus.training(
                tmp_path / exp,
                encoder="ld_hf",
                encoder_conf={**dict.fromkeys(espnets.split()), **encoder_conf},
                input_size=1,
                frontend_conf=dict(fs=16000),
                specaug=None,
                normalize=None,
                init_param=[begin] if begin else [],
                batch_type="unsorted",
                batch_size=3,
                num_iters_per_epoch=1,
                max_epoch=epochs,
            )
        )
        return torch.load(tmp_path / exp / f"{epochs}epoch.pth")

    begun = train("other", 3, "")
    other = str(tmp_path / "other" / "3epoch.pth")
    assert torch.equal(train("broken", 1, other)[name], begun[name])
    broken = train("broken", 3, other)
    assert not torch.equal(broken[name], begun[name])
    unbroken = train("unbroken", 3, other)
    assert all(torch.equal(broken[key], unbroken[key]) for key in unbroken)


def test_the_config_of_an_experiment_is_no_new_training(saved, build_hf, tmp_path):
    from argparse import Namespace

    from dldkit.tasks.asr import DLDASRTask

    options = dict(
        encoder="ld_hf",
        encoder_conf=dict(hf_config={}),
        model_conf={},
        init_param=[],
        resume=True,
        output_dir=str(tmp_path),
    )
    with pytest.raises(UserError, match="hf_config.*--init_param"):
        DLDASRTask.teacher_files(Namespace(**options))
    DLDASRTask.teacher_files(Namespace(**{**options, "init_param": ["x.pth"]}))
    (tmp_path / "checkpoint.pth").touch()
    DLDASRTask.teacher_files(Namespace(**options))
