import logging
from zipfile import ZipFile

import pytest
import torch
import yaml
from espnet2.bin import pack

from dldkit.asr.loading import find_checkpoint, load_asr_model
from dldkit.errors import UserError


@pytest.fixture
def packed(static, tmp_path, monkeypatch):
    """`static` as a zip, packed from its own directory as recipes do."""
    monkeypatch.chdir(static)
    zip_file = tmp_path / "static.zip"
    options = ["--asr_train_config", "config.yaml"]
    options += ["--asr_model_file", "valid.loss_ctc.ave.pth"]
    pack.main(["asr", "--outpath", str(zip_file), *options])
    monkeypatch.chdir(tmp_path)
    return zip_file


def test_loads_a_directory_a_checkpoint_and_a_zip(static, packed):
    stored = torch.load(static / "valid.loss_ctc.ave.pth", weights_only=True)
    for path in (static, static / "valid.loss_ctc.ave.pth", packed, str(static)):
        model, args = load_asr_model(path)
        assert not model.training
        assert args.encoder == "conformer"
        for key, value in model.state_dict().items():
            assert torch.equal(value, stored[key]), key


def test_a_packed_zip_that_changed_is_read_anew(packed, static, monkeypatch):
    load_asr_model(packed)
    monkeypatch.chdir(static)
    options = ["--asr_train_config", "config.yaml", "--asr_model_file", "2epoch.pth"]
    pack.main(["asr", "--outpath", str(packed), *options])
    stored = torch.load(static / "2epoch.pth", weights_only=True)
    model, _ = load_asr_model(packed)
    weight = "ctc.ctc_lo.weight"
    assert torch.equal(model.state_dict()[weight], stored[weight])


def test_prefers_the_average_to_the_best(tmp_path):
    for name in ("3epoch.pth", "checkpoint.pth", "valid.loss.best.pth"):
        (tmp_path / name).touch()
    assert find_checkpoint(tmp_path).name == "valid.loss.best.pth"
    (tmp_path / "valid.loss.ave_2best.pth").touch()
    (tmp_path / "valid.loss.ave.pth").symlink_to("valid.loss.ave_2best.pth")
    assert find_checkpoint(tmp_path).name == "valid.loss.ave.pth"


def test_refuses_to_guess(tmp_path):
    with pytest.raises(UserError, match=f"no trained model .* in {tmp_path}"):
        find_checkpoint(tmp_path)
    for name in ("valid.acc.ave.pth", "valid.loss.ave.pth"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="several .*valid.acc.ave.pth, .*valid.loss.av"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["missing", "missing.pth", "missing.zip"])
def test_refuses_what_is_not_there(tmp_path, name):
    with pytest.raises(UserError, match=f"no .*{tmp_path}/missing"):
        load_asr_model(tmp_path / name)


def test_refuses_a_zip_that_holds_no_model(packed, tmp_path):
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(UserError, match="text.zip is no packed model: .*not a zip"):
        load_asr_model(tmp_path / "text.zip")
    with ZipFile(packed) as whole, ZipFile(tmp_path / "tts.zip", "w") as other:
        for name in whole.namelist():
            content = whole.read(name)
            if name == "meta.yaml":
                content = content.replace(b"asr_", b"tts_")
            other.writestr(name, content)
    with pytest.raises(UserError, match="tts.zip holds no model of ESPnet's ASR"):
        load_asr_model(tmp_path / "tts.zip")


def test_refuses_a_checkpoint_without_its_config(static, tmp_path):
    checkpoint = tmp_path / "model.pth"
    checkpoint.write_bytes((static / "3epoch.pth").read_bytes())
    with pytest.raises(UserError, match=f"no {tmp_path}/config.yaml"):
        load_asr_model(checkpoint)


def test_refuses_a_checkpoint_that_fits_nothing(static, tmp_path):
    """ESPnet would go on with the weights as they were drawn."""
    (tmp_path / "config.yaml").write_text((static / "config.yaml").read_text())
    checkpoint = tmp_path / "valid.loss.best.pth"
    torch.save({"some.other.weight": torch.zeros(3)}, checkpoint)
    with pytest.raises(UserError, match=f"{checkpoint} lacks .*ctc.ctc_lo.bias"):
        load_asr_model(tmp_path)


def test_refuses_a_checkpoint_that_has_more_layers(static, tmp_path):
    config = yaml.safe_load((static / "config.yaml").read_text())
    config["encoder_conf"]["num_blocks"] = 3
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "model.pth").write_bytes((static / "3epoch.pth").read_bytes())
    with pytest.raises(UserError, match=r"has \d+ encoder weights .*encoders.3."):
        load_asr_model(tmp_path / "model.pth")


def test_refuses_a_checkpoint_that_lacks_a_layer(static, tmp_path):
    (tmp_path / "config.yaml").write_text((static / "config.yaml").read_text())
    states = torch.load(static / "3epoch.pth", weights_only=True)
    torch.save(states, tmp_path / "all.pth")
    load_asr_model(tmp_path / "all.pth")
    states = {k: v for k, v in states.items() if "encoders.3." not in k}
    torch.save(states, tmp_path / "some.pth")
    with pytest.raises(UserError, match=r"some.pth lacks \d+ .*encoder.encoders.3."):
        load_asr_model(tmp_path / "some.pth")


@pytest.mark.parametrize("name", ["text.pth", "checkpoint.pth"])
def test_refuses_what_is_no_model(static, tmp_path, name):
    """ESPnet's checkpoint.pth also holds the optimiser."""
    (tmp_path / "config.yaml").write_text((static / "config.yaml").read_text())
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "checkpoint.pth").write_bytes((static / "checkpoint.pth").read_bytes())
    with pytest.raises(UserError, match=f"{name} is no model .*valid.loss_ctc.ave.pth"):
        load_asr_model(tmp_path / name)


def test_refuses_weights_of_another_size(static, tmp_path):
    (tmp_path / "config.yaml").write_text(
        (static / "config.yaml")
        .read_text()
        .replace("linear_units: 16", "linear_units: 8")
    )
    checkpoint = tmp_path / "valid.loss.best.pth"
    checkpoint.write_bytes((static / "3epoch.pth").read_bytes())
    with pytest.raises(
        UserError, match="(?s)does not fit .*config.yaml.*size mismatch"
    ):
        load_asr_model(tmp_path)


def test_says_nothing_that_is_no_news(static, caplog):
    with caplog.at_level("INFO"):
        load_asr_model(static)
        logging.info("afterwards")
    assert [record.message for record in caplog.records] == ["afterwards"]
