"""Packed models: what is in the zip, and that a zip which does not load is not kept."""

import shutil
import zipfile
from pathlib import Path

import pytest
import sentencepiece
import yaml

from dldkit import pack
from dldkit.asr.calibration import write_depth_profile
from dldkit.errors import UserError

pytestmark = pytest.mark.integration


@pytest.fixture
def model(student, tmp_path, monkeypatch):
    """A checkpoint whose config names files as seen from the recipe's directory."""
    monkeypatch.chdir(tmp_path)
    exp = Path("exp/asr_dld")
    shutil.copytree(student, exp, symlinks=True)
    config = yaml.safe_load((exp / "config.yaml").read_text())
    Path("data").mkdir()
    tokens = Path("data/tokens.txt")
    if isinstance(config["token_list"], list):
        tokens.write_text("".join(f"{token}\n" for token in config["token_list"]))
    else:
        shutil.move(exp / config["token_list"], tokens)
    # ESPnet reads a BPE model when the first text is made, not when it is loaded
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["eight nine one two three four five six"] * 9),
        model_prefix="data/bpe",
        vocab_size=25,
        hard_vocab_limit=False,
    )
    config.update(token_list=str(tokens), bpemodel="data/bpe.model", token_type="bpe")
    (exp / "config.yaml").write_text(yaml.safe_dump(config))
    return exp / "valid.loss_ctc.ave.pth"


def test_a_pack_is_made_once_and_again_when_something_changed(model, corpus):
    outpath = Path("a directory/model.zip")
    pack.pack_asr(model, outpath, corpus.dev)
    archive = zipfile.ZipFile(outpath)
    names = {"meta.yaml", "config.yaml", "tokens.txt", "bpe.model", model.name}
    assert names <= set(archive.namelist())
    assert yaml.safe_load(archive.read("config.yaml"))["token_list"] == "./tokens.txt"
    made = outpath.stat().st_mtime_ns

    model.touch()
    pack.pack_asr(model, outpath, corpus.dev)
    assert outpath.stat().st_mtime_ns == made
    model.with_name("RESULTS.md").write_text("better\n")
    pack.pack_asr(model, outpath, corpus.dev)
    assert zipfile.ZipFile(outpath).read("RESULTS.md") == b"better\n"
    assert [path.name for path in outpath.parent.glob("[!.]*")] == ["model.zip"]


def test_the_profile_of_a_copy_whose_links_became_files(model, corpus):
    """Decoding finds it under another name, and so does who unpacks the zip."""
    write_depth_profile(model, corpus.train, [2, 4], num_utts=4)
    copy = Path("copy")
    shutil.copytree(model.parent, copy)
    (profile,) = copy.glob("*.profile.pth")
    assert profile.name != "valid.loss_ctc.ave.profile.pth"
    pack.pack_asr(copy / model.name, "packed/model.zip", corpus.dev)
    archive = zipfile.ZipFile("packed/model.zip")
    found = archive.read("valid.loss_ctc.ave.profile.pth")
    assert found == profile.read_bytes()


def test_a_zip_that_does_not_load_elsewhere_is_not_kept(model, corpus, monkeypatch):
    # as if a file that the config names had been forgotten
    monkeypatch.setattr(pack, "named_files", lambda config: {})
    with pytest.raises(UserError, match="can not be used elsewhere: .*data.bpe.model"):
        pack.pack_asr(model, "packed/model.zip", corpus.dev)
    assert not list(Path().rglob("*.zip"))


def test_a_zip_that_recognises_otherwise_is_not_kept(model, corpus, monkeypatch):
    monkeypatch.setattr(pack, "_elsewhere", lambda *_: '["eleven", -1.0]')
    with pytest.raises(UserError, match='"eleven" .-1.000. instead of'):
        pack.pack_asr(model, "packed/model.zip", corpus.dev)
    assert not list(Path().rglob("*.zip"))


def test_a_config_that_is_none_is_refused(tmp_path):
    model = tmp_path / "valid.loss.best.pth"
    model.touch()
    model.with_name("config.yaml").write_text("a: [1\n")
    with pytest.raises(UserError, match="config.yaml is no YAML file"):
        pack.pack_ssl(model, tmp_path / "packed" / "model.zip")


def test_what_is_missing_is_named(model, corpus):
    with pytest.raises(UserError, match="nope.pth does not exist: train"):
        pack.pack_asr(model.with_name("nope.pth"), "packed/model.zip", corpus.dev)
