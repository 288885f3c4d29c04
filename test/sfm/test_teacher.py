import os
import random
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
import yaml
from espnet2.bin import pack
from espnet2.tasks.ssl import SSLTask
from espnet2.utils.yaml_no_alias_safe_dump import yaml_no_alias_safe_dump
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from dldkit.errors import UserError
from dldkit.sfm.teacher import open_teacher, teacher_info
from dldkit.sfm.wave import cnn_features

FAMILIES = ["hubert", "wavlm", "wav2vec2"]
FAMILIES += [f"{family}_stable" for family in FAMILIES]
FAMILIES += ["unispeech_sat", "data2vec_audio"]
LAYERS = ([0, 1, 2, 3], [3], [2], [1, 0], [0])


def truth(model, directory, speech, lengths):
    """Hidden states as transformers itself gives them.

    Its GroupNorm would hear the padding, so that those utterances go in one by one.
    """
    norm = getattr(model.config, "feat_extract_norm", "layer")
    if norm == "group" and len(speech) > 1:
        alone = [
            truth(model, directory, s[None, :n], n[None])
            for s, n in zip(speech, lengths)
        ]
        return [
            torch.nn.utils.rnn.pad_sequence([s[0] for s in states], batch_first=True)
            for states in zip(*alone)
        ]
    extractor = transformers.AutoFeatureExtractor.from_pretrained(directory)
    inputs = extractor(
        [s[:n].numpy() for s, n in zip(speech, lengths)],
        sampling_rate=16000,
        padding=True,
        return_tensors="pt",
        return_attention_mask=True,
    )
    with torch.no_grad():
        states = list(model(**inputs, output_hidden_states=True).hidden_states)
    if getattr(model.config, "do_stable_layer_norm", False):
        states[-1] = model.encoder.layer_norm(states[-1])
    return states


def assert_gives(teacher, speech, lengths, states, frames, tolerance=1e-5):
    """Compare the valid frames of a teacher's layers with hidden states."""
    outputs, output_lengths = teacher(speech, lengths)
    assert output_lengths.tolist() == frames
    assert len(outputs) == len(teacher.layers)
    for layer, output in zip(teacher.layers, outputs):
        assert output.dtype == torch.float32
        assert output.shape == (len(frames), max(frames), teacher.info.hidden_size)
        for i, n in enumerate(frames):
            expected = states[layer][i, :n]
            assert torch.allclose(output[i, :n], expected, atol=tolerance), layer


@pytest.mark.parametrize("family", FAMILIES)
def test_wave_models_agree_with_transformers(family, wave_teacher, waveforms):
    model, directory = wave_teacher(family)
    speech, lengths = waveforms
    for n, frames in ((2, [27, 18]), (1, [27])):  # with padding, and without
        states = truth(model, directory, speech[:n], lengths[:n])
        for layers in LAYERS:
            teacher = open_teacher(directory, layers)
            assert_gives(teacher, speech[:n], lengths[:n], states, frames, 5e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_above_the_deepest_are_deleted(family, wave_teacher, waveforms):
    _, directory = wave_teacher(family)
    teacher = open_teacher(directory, [1, 2])
    assert len(teacher.model.encoder.layers) == 2
    assert teacher.info.num_layers == 3


def test_shared_cnn_features_give_the_same(wave_teacher, waveforms):
    _, directory = wave_teacher()
    teacher = open_teacher(directory, [1, 3])
    outputs, _ = teacher(*waveforms)
    features = cnn_features(teacher.model, *waveforms)
    shared, _ = teacher(torch.zeros_like(waveforms[0]), waveforms[1], features=features)
    assert all(torch.equal(a, b) for a, b in zip(outputs, shared))


@pytest.mark.parametrize(
    "cls", [WhisperEncoder, transformers.WhisperForConditionalGeneration]
)
def test_whisper_agrees_with_transformers(cls, whisper_teacher, waveforms):
    model, directory = whisper_teacher(cls)
    encoder = model if cls is WhisperEncoder else model.model.encoder
    speech, lengths = waveforms
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(directory)
    mel = extractor(
        [s[:n].numpy() for s, n in zip(speech, lengths)],
        sampling_rate=16000,
        return_tensors="pt",
    )
    states = []
    for layer in encoder.layers:
        layer.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    with torch.no_grad():
        states.append(encoder(**mel).last_hidden_state)
    for layers in LAYERS:
        teacher = open_teacher(directory, layers)
        assert_gives(teacher, speech, lengths, states, [28, 18])
        assert len(teacher.model.layers) == max(1, *layers)


def test_whisper_needs_no_preprocessor_config(whisper_teacher, waveforms):
    _, directory = whisper_teacher(WhisperEncoder, seconds=30)
    (expected,), _ = open_teacher(directory, [3])(*waveforms)
    (directory / "preprocessor_config.json").unlink()
    (output,), _ = open_teacher(directory, [3])(*waveforms)
    assert torch.equal(output, expected)


def test_whisper_does_not_hear_what_lies_in_the_padding(whisper_teacher, waveforms):
    teacher = open_teacher(whisper_teacher(WhisperEncoder)[1], [3])
    (expected,), _ = teacher(*waveforms)
    speech = waveforms[0].clone()
    speech[1, 6010:] = 1.0
    assert torch.equal(teacher(speech, waveforms[1])[0][0][1, :18], expected[1, :18])


@pytest.mark.skipif("TEACHER" not in os.environ, reason="needs Whisper's weights")
def test_pretrained_whisper(waveforms):
    path = os.environ["TEACHER"]
    stored = safetensors.torch.load_file(Path(path) / "model.safetensors")
    info = teacher_info(path)
    teacher = open_teacher(path, [2, info.num_layers])
    loaded = teacher.model.state_dict()
    assert all(torch.equal(loaded[k], v.float()) for k, v in stored.items())
    (middle, last), lengths = teacher(*waveforms)
    assert lengths.tolist() == [28, 18]
    assert middle.shape == last.shape == (2, 28, info.hidden_size)
    # what the batch holds besides makes no difference
    (alone, _), _ = teacher(waveforms[0][1:, :6010], waveforms[1][1:])
    assert torch.allclose(alone[0], middle[1, :18], atol=1e-4)


SSL_CONFIG = dict(
    token_list=["<blank>", "<unk>"],
    frontend="wav2vec_cnn",
    frontend_conf=dict(
        norm_mode="layer_norm",
        conv_mode="standard",
        bias=False,
        shapes=[[8, 10, 5], *[[8, 3, 2]] * 4, *[[8, 2, 2]] * 2],
        fs="16k",
    ),
    specaug="specaug",
    specaug_conf=dict(time_mask_width_range=[0, 9]),
    normalize="utterance_mvn",
    preencoder="linear",
    preencoder_conf=dict(output_size=16),
    encoder="transformer",
    encoder_conf=dict(
        output_size=16,
        attention_heads=2,
        linear_units=32,
        num_blocks=3,
        input_layer=None,
    ),
    loss=[dict(name="hubert", conf=dict(num_classes=5, final_dim=4))],
    util=[dict(name="mask", conf=dict(mask_prob=0.8))],
    model="espnet",
)


@pytest.fixture
def espnet_teacher(tmp_path):
    """An untrained model of ESPnet's SSL task, and its experiment directory."""
    file = tmp_path / "ssl.yaml"
    file.write_text(yaml.safe_dump(SSL_CONFIG))
    directory = tmp_path / "exp" / "ssl"
    directory.mkdir(parents=True)
    command = ["--config", str(file), "--output_dir", str(directory)]
    args = SSLTask.get_parser().parse_args(command)
    torch.manual_seed(0)
    model = SSLTask.build_model(args).eval()
    with open(directory / "config.yaml", "w") as config:
        yaml_no_alias_safe_dump(vars(args), config)
    torch.save(model.state_dict(), directory / "valid.loss.ave.pth")
    return model, directory


def test_espnet_models_agree_with_espnet(espnet_teacher, waveforms):
    model, directory = espnet_teacher
    with torch.no_grad():
        output, blocks, _ = model.inference_encode(*waveforms)
        features, lengths = model.frontend(*waveforms)
        entry, _ = model.preencoder(*model.normalize(features, lengths))
    states = [entry, *blocks[:-1], output]
    assert not torch.allclose(blocks[-1], output)
    for layers in LAYERS:
        teacher = open_teacher(directory, layers)
        assert_gives(teacher, *waveforms, states, [27, 18])
        assert len(teacher.model.encoder.encoders) == max(1, *layers)
    info = teacher_info(directory)
    assert (info.hidden_size, info.num_layers, info.sampling_rate) == (16, 3, 16000)


def test_espnet_checkpoint_and_zip(espnet_teacher, waveforms, monkeypatch):
    _, directory = espnet_teacher
    (expected,), _ = open_teacher(directory, [2])(*waveforms)
    monkeypatch.chdir(directory)
    options = ["--ssl_train_config", "config.yaml"]
    options += ["--ssl_model_file", "valid.loss.ave.pth"]
    pack.main(["ssl", "--outpath", "packed.zip", *options])
    for path in (directory / "valid.loss.ave.pth", directory / "packed.zip"):
        assert teacher_info(path) == teacher_info(directory)
        (output,), _ = open_teacher(path, [2])(*waveforms)
        assert torch.equal(output, expected)


@pytest.fixture(params=["wave", "whisper", "espnet"])
def any_teacher(request, wave_teacher, whisper_teacher):
    """The directory of a teacher whose config asks for LayerDrop and masking."""
    if request.param == "espnet":
        return request.getfixturevalue("espnet_teacher")[1]
    if request.param == "whisper":
        return whisper_teacher(WhisperEncoder)[1]
    masks = dict(mask_time_prob=0.9, mask_time_length=2, mask_feature_prob=0.9)
    return wave_teacher("hubert", layerdrop=1.0, hidden_dropout=0.5, **masks)[1]


def test_a_teacher_is_frozen(any_teacher, waveforms):
    teacher = open_teacher(any_teacher, [1, 3])
    before = {k: v.clone() for k, v in teacher.model.state_dict().items()}
    outputs, lengths = teacher(*waveforms)
    again, _ = teacher(*waveforms)
    assert all(torch.equal(a, b) for a, b in zip(outputs, again))
    assert not any(output.requires_grad for output in outputs)
    # as the target of a loss
    guess = torch.zeros_like(outputs[0], requires_grad=True)
    torch.nn.functional.mse_loss(guess, outputs[0]).backward()
    assert not any(module.training for module in teacher.model.modules())
    for name, parameter in teacher.model.named_parameters():
        assert not parameter.requires_grad and parameter.grad is None, name
    for name, values in teacher.model.state_dict().items():
        assert torch.equal(values, before[name]), name


def test_layer_drop_and_masking_are_off(wave_teacher, waveforms):
    masks = dict(mask_time_prob=0.9, mask_time_length=2, mask_feature_prob=0.9)
    options = dict(layerdrop=1.0, hidden_dropout=0.5, **masks)
    model, directory = wave_teacher("wavlm", **options)
    config = model.config
    config.mask_time_prob = config.mask_feature_prob = config.layerdrop = 0.0
    states = truth(model, directory, *waveforms)
    assert_gives(open_teacher(directory, [1, 3]), *waveforms, states, [27, 18])


def test_random_numbers_are_those_of_a_run_without_teacher(any_teacher, waveforms):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    def seed():
        random.seed(3), np.random.seed(3), torch.manual_seed(3)

    seed()
    expected = draw()
    seed()
    open_teacher(any_teacher, [2])(*waveforms)
    assert draw() == expected


def test_the_description_needs_no_weights(any_teacher):
    info = teacher_info(any_teacher)
    for file in [*any_teacher.glob("*.safetensors"), *any_teacher.glob("*.pth")]:
        file.unlink()
    assert teacher_info(any_teacher) == info
    assert (info.hidden_size, info.num_layers, info.sampling_rate) == (16, 3, 16000)
    assert info.normalize is False and info.layers is None


def test_describes_normalisation_as_the_preprocessor_does(wave_teacher):
    _, directory = wave_teacher("hubert_stable")
    assert teacher_info(directory).normalize


@pytest.mark.parametrize("family", ["hubert", "hubert_stable", "data2vec_audio"])
def test_normalises_as_its_family_without_a_preprocessor_config(
    family, wave_teacher, caplog
):
    """Those whose CNN has layer norms take normalised speech."""
    _, directory = wave_teacher(family)
    (directory / "preprocessor_config.json").unlink()
    assert teacher_info(directory).normalize == (family != "hubert")
    assert "has no preprocessor_config.json: takes" in caplog.text


def test_half_precision_on_disk_is_computed_in_float32(wave_teacher, waveforms):
    model, directory = wave_teacher()
    model.half().save_pretrained(directory)
    states = truth(model.float(), directory, *waveforms)
    assert_gives(open_teacher(directory, [2, 3]), *waveforms, states, [27, 18])


@pytest.mark.parametrize(
    "cls", [transformers.HubertForCTC, transformers.HubertForSequenceClassification]
)
def test_fine_tuned_models_are_teachers_too(cls, wave_teacher, waveforms):
    model, directory = wave_teacher("hubert", cls=cls, vocab_size=7)
    states = truth(model.hubert, directory, *waveforms)
    assert_gives(open_teacher(directory, [2, 3]), *waveforms, states, [27, 18])


def without(directory, *words):
    """Take weights away whose name contains one of the words."""
    file = directory / "model.safetensors"
    states = safetensors.torch.load_file(file)
    kept = {k: v for k, v in states.items() if not any(word in k for word in words)}
    assert len(kept) < len(states)
    safetensors.torch.save_file(kept, file, {"format": "pt"})


def test_the_mask_embedding_may_be_missing(wave_teacher, waveforms):
    _, directory = wave_teacher("hubert", mask_time_prob=0.5)
    (expected,), _ = open_teacher(directory, [3])(*waveforms)
    without(directory, "masked_spec_embed")
    (output,), _ = open_teacher(directory, [3])(*waveforms)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("word", ["layers.2.attention.k_proj.weight", "pos_conv_embed"])
def test_refuses_missing_weights(word, wave_teacher):
    _, directory = wave_teacher()
    without(directory, word)
    with pytest.raises(UserError, match=f"lacks .* weights .*{word}"):
        open_teacher(directory, [1])


def test_refuses_a_whisper_encoder_that_claims_to_be_the_model(whisper_teacher):
    _, directory = whisper_teacher(WhisperEncoder)
    config = directory / "config.json"
    config.write_text(config.read_text().replace("WhisperEncoder", "WhisperModel"))
    with pytest.raises(UserError, match="lacks .* of the weights"):
        open_teacher(directory, [1])


def test_refuses_weights_of_another_shape(wave_teacher):
    _, directory = wave_teacher()
    config = directory / "config.json"
    old = '"intermediate_size": 32'
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, '"intermediate_size": 48'))
    with pytest.raises(UserError, match="can not be loaded"):
        open_teacher(directory, [1])


@pytest.mark.parametrize("layers", [[], [4], [-1, 2]])
def test_refuses_layers_that_are_not_there(layers, any_teacher):
    with pytest.raises(UserError, match=r"layers 0 \(input\) to 3 \(output\)"):
        open_teacher(any_teacher, layers)


@pytest.mark.parametrize("name", ["nothing/here", "missing.pth", "directory"])
def test_refuses_what_is_no_teacher(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "directory").mkdir()
    with pytest.raises(UserError, match=f"no teacher.* {name}"):
        teacher_info(name)


def test_refuses_other_models(tmp_path):
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a bert model: choose one of hubert, wavlm"):
        teacher_info(tmp_path)


def test_refuses_speech_of_no_frame(wave_teacher, whisper_teacher, waveforms):
    speech, lengths = waveforms
    for directory in (wave_teacher()[1], whisper_teacher(WhisperEncoder)[1]):
        teacher = open_teacher(directory, [1])
        lengths[1] = 319
        with pytest.raises(UserError, match="utterance b has 319 samples: too few"):
            teacher(speech, lengths, ["a", "b"])


def test_whisper_refuses_more_than_30_seconds(whisper_teacher):
    teacher = open_teacher(whisper_teacher(WhisperEncoder, seconds=30)[1], [1])
    speech, lengths = torch.zeros(2, 480001), torch.tensor([480000, 480001])
    with pytest.raises(UserError, match="utterance b has 480001 .*lower max_seconds"):
        teacher(speech, lengths, ["a", "b"])
    (output,), frames = teacher(speech[:1], lengths[:1])
    assert frames.tolist() == [1500] and output.size(1) == 1500


def test_refuses_an_espnet_model_of_another_task(tmp_path):
    config = dict(encoder="conformer", encoder_conf={}, frontend_conf=dict(fs="16k"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="no SSL model of ESPnet"):
        teacher_info(tmp_path)


def test_refuses_an_espnet_checkpoint_that_does_not_fit(espnet_teacher):
    model, directory = espnet_teacher
    file = directory / "valid.loss.ave.pth"
    states = model.state_dict()
    del states["encoder.encoders.1.norm1.weight"]
    torch.save(states, file)
    with pytest.raises(UserError, match="lacks 1 .*encoders.1.norm1.weight"):
        open_teacher(directory, [1])
    states["encoder.encoders.1.norm1.weight"] = torch.zeros(5)
    torch.save(states, file)
    with pytest.raises(UserError, match="does not fit"):
        open_teacher(directory, [1])
    file.with_suffix(".zip").write_text("no zip")
    with pytest.raises(UserError, match="no SSL model of ESPnet"):
        teacher_info(file.with_suffix(".zip"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_follows_the_speech_to_the_gpu_in_half_precision(any_teacher, waveforms):
    teacher = open_teacher(any_teacher, [1, 3])
    expected, lengths = teacher(*waveforms)
    with torch.autocast("cuda", torch.bfloat16):
        outputs, output_lengths = teacher(waveforms[0].cuda(), waveforms[1])
    assert output_lengths.tolist() == lengths.tolist()
    for output, exact in zip(outputs, expected):
        assert output.is_cuda and output.dtype == torch.float32
        for i, n in enumerate(lengths.tolist()):
            difference = (output[i, :n].cpu() - exact[i, :n]).abs().max()
            assert 0 < difference < 0.1 * exact.abs().max()
