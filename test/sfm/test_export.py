import json
import re

import numpy as np
import pytest
import torch
from espnet2.asr.frontend.huggingface import HuggingFaceFrontend
from transformers import AutoModel, HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from dldkit.bin.sfm_export import main
from dldkit.depth.layers import GatedModuleList
from dldkit.errors import UserError
from dldkit.sfm.export import export, export_student


def make_student(**config) -> HubertModel:
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_attention_heads=2, intermediate_size=32)
    positions = dict(num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2)
    cnn = dict(conv_dim=(8,) * 7)
    student = HubertModel(
        HubertConfig(num_hidden_layers=5, **sizes, **positions, **cnn, **config)
    ).eval()
    with torch.no_grad():
        for weight in student.parameters():  # none zero or one, as biases and norms are
            weight.add_(0.1 * torch.randn_like(weight))
    return student


@torch.no_grad()
def hidden_states(student: HubertModel, speech: torch.Tensor, normalize: bool):
    """The student's own and its output, of waveforms (Batch, Samples) as trained on."""
    if normalize:
        mean, variance = speech.mean(1, True), speech.var(1, keepdim=True, correction=0)
        speech = (speech - mean) / (variance + 1e-7).sqrt()
    output = student(speech, output_hidden_states=True)
    return (*output.hidden_states, output.last_hidden_state)


def only(student: HubertModel, layers: list[int]) -> HubertModel:
    """The student with its other layers taken out."""
    kept = [student.encoder.layers[i] for i in layers]
    student.encoder.layers = torch.nn.ModuleList(kept)
    return student


@pytest.fixture
def speech(corpus):
    """Utterances (Batch, Samples) of equal length, louder or softer than each other."""
    utterances = [corpus.speech(utt)[:5000] for utt in "abc"]
    return torch.from_numpy(np.stack(utterances)) * torch.tensor([[1.0], [0.1], [3.0]])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "variant",
    [dict(), dict(feat_extract_norm="layer", do_stable_layer_norm=True)],
    ids=["base", "large"],
)
def test_three_toolkits_see_the_hidden_states_of_the_student(
    speech, tmp_path, normalize, variant
):
    from s3prl.hub import hf_hubert_custom

    student = make_student(**variant)
    expected = hidden_states(student, speech, normalize)
    assert len(expected) == 7
    export_student(student, normalize, range(5), tmp_path / "hf")

    model = AutoModel.from_pretrained(tmp_path / "hf")
    assert type(model) is HubertModel and not model.training
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(tmp_path / "hf")
    prepared = extractor(list(speech.numpy()), sampling_rate=16000, return_tensors="pt")
    assert ("attention_mask" in prepared) == (variant != {})
    frontend = HuggingFaceFrontend(str(tmp_path / "hf")).eval()
    upstream = hf_hubert_custom(str(tmp_path / "hf")).eval()
    with torch.no_grad():
        found = model(**prepared, output_hidden_states=True)
        espnet, frames = frontend(speech, torch.tensor([5000] * 3))
        s3prl = upstream(list(speech))["hidden_states"]
    torch.testing.assert_close(found.hidden_states, expected[:-1])
    torch.testing.assert_close(found.last_hidden_state, expected[-1])
    torch.testing.assert_close(tuple(s3prl), expected[:-1])
    torch.testing.assert_close(espnet, expected[-1])
    assert frames.tolist() == [expected[-1].size(1)] * 3
    # and the waveform's scale did matter
    other = hidden_states(student, speech, not normalize)[-1]
    assert (other - expected[-1]).abs().max() > 1e-2


@pytest.mark.parametrize("layers", [[0, 2, 4], [1, 2], [4]])
def test_a_depth_is_the_student_with_its_other_slots_off(speech, tmp_path, layers):
    student = make_student()
    student.encoder.layers = GatedModuleList(student.encoder.layers)
    export_student(student, False, layers, tmp_path / "hf")
    model = AutoModel.from_pretrained(tmp_path / "hf")
    assert model.config.num_hidden_layers == len(layers) == len(model.encoder.layers)
    assert model.config.student_layers == layers
    found = hidden_states(model, speech, False)
    student.encoder.layers.select(layers)
    torch.testing.assert_close(found, hidden_states(student, speech, False))
    torch.testing.assert_close(
        found, hidden_states(only(make_student(), layers), speech, False)
    )


def test_nothing_random_is_on_when_it_is_trained_further(tmp_path):
    student = make_student(layerdrop=0.9, mask_time_prob=0.5, mask_feature_prob=0.5)
    export_student(student, False, range(5), tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["HubertModel"]
    for name in ("layerdrop", "mask_time_prob", "mask_feature_prob"):
        assert config[name] == 0, name
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }


def test_a_killed_export_leaves_no_model_and_a_new_one_replaces_the_old(
    tmp_path, monkeypatch
):
    class Killed(BaseException):
        pass

    def killed(*args, **kwargs):
        raise Killed

    export_student(make_student(), False, range(5), tmp_path / "hf")
    before = (tmp_path / "hf" / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Wav2Vec2FeatureExtractor, "save_pretrained", killed)
        export_student(make_student(), True, [0], tmp_path / "hf")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Wav2Vec2FeatureExtractor, "save_pretrained", killed)
        export_student(make_student(), True, [0], tmp_path / "new")
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "new").exists()

    export_student(make_student(), True, [0, 1], tmp_path / "hf")
    assert AutoModel.from_pretrained(tmp_path / "hf").config.num_hidden_layers == 2
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(tmp_path / "hf")
    assert extractor.do_normalize
    assert [path.name for path in tmp_path.glob("hf*")] == ["hf"]


@pytest.mark.parametrize("content", ["model", "notes", "file"])
def test_refuses_a_directory_that_is_no_export(tmp_path, content):
    output_dir = tmp_path / "hf"
    if content == "model":  # the teacher, say
        make_student().save_pretrained(output_dir)
    elif content == "notes":
        output_dir.mkdir()
        (output_dir / "notes.txt").write_text("precious")
    else:
        output_dir.write_text("precious")
    with pytest.raises(UserError, match=f"{output_dir} holds something else"):
        export_student(make_student(), False, range(5), output_dir)
    assert output_dir.exists()
    assert not (output_dir / "preprocessor_config.json").exists()


def test_an_empty_directory_will_do(tmp_path):
    (tmp_path / "hf").mkdir()
    export_student(make_student(), False, [0], tmp_path / "hf")
    assert (tmp_path / "hf" / "model.safetensors").is_file()


@pytest.fixture
def trained(wave_teacher, student_conf, save_training):
    """A checkpoint of the distillation task, its config beside it, and its student."""
    _, teacher = wave_teacher("hubert_stable")  # which normalises the waveform
    checkpoint, model = save_training(student_conf, teacher)
    return checkpoint, model.student


@pytest.mark.parametrize(
    "options, layers",
    [
        ([], [0, 1, 2, 3]),
        (["--depth", "2"], [0, 3]),
        (["--depth", "2", "--selector", "prefix"], [0, 1]),
        (["--layers", "1,3"], [1, 3]),
    ],
)
def test_the_command_exports_what_was_trained(
    trained, speech, tmp_path, options, layers
):
    checkpoint, student = trained
    hf = tmp_path / "hf"
    main(["--model_file", str(checkpoint), "--output_dir", str(hf), *options])
    model = AutoModel.from_pretrained(hf)
    assert model.config.student_layers == layers
    assert Wav2Vec2FeatureExtractor.from_pretrained(hf).do_normalize
    student.encoder.layers.select(layers)
    torch.testing.assert_close(
        hidden_states(model, speech, True), hidden_states(student, speech, True)
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (["--depth", "5"], "depth 5 is impossible: .* choose 1 to 4"),
        (["--depth", "0"], "argument --depth: '0': write an integer above 0"),
        (["--layers", "1,4"], "layers .* impossible: .* 0 to 3"),
        (["--config", "none.yaml"], "no none.yaml"),
        (["--model_file", "none.pth"], "no "),
    ],
)
def test_the_command_refuses(trained, tmp_path, capsys, options, message):
    required = ["--model_file", str(trained[0]), "--output_dir", str(tmp_path / "hf")]
    with pytest.raises(SystemExit):
        main([*required, *options])
    assert re.search(f"error: {message}", capsys.readouterr().err, re.MULTILINE)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("change", ["lacks", "has"])
def test_refuses_a_checkpoint_of_another_config(trained, tmp_path, change):
    """ESPnet would go on with weights as they were drawn, or drop what is too much."""
    states = torch.load(trained[0], weights_only=True)
    if change == "lacks":
        del states["student.encoder.layers.3.final_layer_norm.weight"]
    else:
        states["student.encoder.layers.4.final_layer_norm.weight"] = torch.ones(12)
    torch.save(states, trained[0])
    with pytest.raises(UserError, match=f"{trained[0]} {change}.*another config"):
        export(trained[0], tmp_path / "hf")
