"""Models of ESPnet's SSL task."""

import pytest
import torch
import yaml
from espnet2.bin import pack
from hidden_states import LAYERS, assert_gives

from dldkit.errors import UserError
from dldkit.sfm.teacher.opening import open_teacher, teacher_info


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


@pytest.mark.parametrize(
    "espnet_teacher",
    [{}, dict(norm_mode="group_norm"), dict(normalize_audio=True)],
    ids=["layer_norm", "group_norm", "normalize_audio"],
    indirect=True,
)
def test_an_espnet_model_hears_each_utterance_alone(espnet_teacher, waveforms):
    model, directory = espnet_teacher
    (speech, lengths), layers = waveforms, [0, 2, 3]
    teacher = open_teacher(directory, layers)
    batch = torch.cat([speech, 3 * speech[:1]]), torch.tensor([*lengths, lengths[0]])
    states, frames = teacher(*batch)
    assert frames.tolist() == [27, 18, 27]
    for place, (samples, n) in enumerate(zip(batch[1], frames)):
        with torch.no_grad():
            output, blocks, _ = model.inference_encode(
                batch[0][place, None, :samples], samples[None]
            )
        assert torch.allclose(states[1][place, :n], blocks[1][0], atol=1e-5)
        assert torch.allclose(states[2][place, :n], output[0], atol=1e-5)


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
