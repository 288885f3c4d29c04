"""Teachers of every family."""

import pytest
import torch
import yaml
from espnet2.tasks.ssl import SSLTask
from espnet2.utils.yaml_no_alias_safe_dump import yaml_no_alias_safe_dump
from transformers.models.whisper.modeling_whisper import WhisperEncoder

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
def espnet_teacher(request, tmp_path):
    """An untrained model of ESPnet's SSL task, and its experiment directory.

    Its frontend has the options that the test's parameter names.
    """
    file = tmp_path / "ssl.yaml"
    frontend = {**SSL_CONFIG["frontend_conf"], **getattr(request, "param", {})}
    file.write_text(yaml.safe_dump({**SSL_CONFIG, "frontend_conf": frontend}))
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


@pytest.fixture(params=["wave", "whisper", "espnet"])
def any_teacher(request, wave_teacher, whisper_teacher):
    """The directory of a teacher whose config asks for LayerDrop and masking."""
    if request.param == "espnet":
        return request.getfixturevalue("espnet_teacher")[1]
    if request.param == "whisper":
        return whisper_teacher(WhisperEncoder)[1]
    masks = dict(mask_time_prob=0.9, mask_time_length=2, mask_feature_prob=0.9)
    return wave_teacher("hubert", layerdrop=1.0, hidden_dropout=0.5, **masks)[1]
