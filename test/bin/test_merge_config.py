import pytest
import yaml

from dldkit.bin.merge_config import main


@pytest.fixture
def write(tmp_path):
    def write_config(name, text):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write_config


def test_later_files_win_key_by_key(write, capsys):
    base = write("a.yaml", "encoder: x\nencoder_conf: {size: 4, layers: [1, 2]}\n")
    overlay = write("b.yaml", "encoder_conf:\n  layers: [3]\n  lr: 1e-3\n")
    main([base, overlay, "encoder_conf.size=8", "model=dld"])
    assert yaml.safe_load(capsys.readouterr().out) == {
        "encoder": "x",
        "encoder_conf": {"size": 8, "layers": [3], "lr": 0.001},
        "model": "dld",
    }


def test_select_prints_values(write, capsys):
    config = write("a.yaml", "model_conf: {weight: 0.5}\nencoder_conf: {size: 4}\n")
    main([config, "--select", "encoder_conf.size", "model_conf", "frontend"])
    assert capsys.readouterr().out == "4\n{'weight': 0.5}\nNone\n"


def test_marked_values_have_to_be_given(write, capsys):
    config = write("a.yaml", "model_conf:\n  reference: ???\n")
    main([config, "model_conf.reference=exp/static"])
    assert "reference: exp/static" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main([config])
    assert stop.value.code == 1
    assert "model_conf.reference" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n"])
def test_what_is_no_config_is_refused_by_name(write, capsys, text):
    with pytest.raises(SystemExit):
        main([write("a.yaml", "a: {b: 1}\n"), write("bad.yaml", text)])
    assert "error:" in (err := capsys.readouterr().err) and "bad.yaml" in err


def test_a_missing_file_is_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        main(["nowhere.yaml"])
    assert "nowhere.yaml does not exist" in capsys.readouterr().err
