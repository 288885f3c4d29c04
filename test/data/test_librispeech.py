"""LibriSpeech's three recipes share one preparation, and one download."""

import hashlib
import http.server
import importlib.util
import io
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile

from dldkit.data.corpus import fetch, unpack
from dldkit.data.datadir import read_table, utterances
from dldkit.data.librispeech import DEV, TEST, TRAIN, find_librispeech
from dldkit.errors import UserError

RECIPES = Path(__file__).resolve().parents[2] / "egs2"


def make(root: Path, splits) -> Path:
    """Two utterances for each split."""
    for number, split in enumerate(splits):
        folder = root / "LibriSpeech" / split / str(number) / "5"
        folder.mkdir(parents=True)
        lines = []
        for utt in (f"{number}-5-0000", f"{number}-5-0001"):
            noise = np.random.default_rng(len(lines)).normal(0, 0.1, 4000)
            soundfile.write(folder / f"{utt}.flac", noise, 16000)
            lines.append(f"{utt} WORDS OF {utt}")
        (folder / f"{number}-5.trans.txt").write_text("\n".join(lines) + "\n")
    return root / "LibriSpeech"


def load(recipe: str):
    """Import the local/data.py of a recipe."""
    path = RECIPES / recipe / "local" / "data.py"
    spec = importlib.util.spec_from_file_location(recipe.replace("/", "_"), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["asr1", "ssl1"])
def test_960_hours_are_all_three_training_splits(kind, tmp_path, monkeypatch):
    make(tmp_path, [*TRAIN, *DEV, *TEST])
    monkeypatch.setenv("LIBRISPEECH", str(tmp_path))
    module = load(f"librispeech/{kind}")
    module.main(["--data_dir", str(tmp_path / "data"), "--nj", "1"])
    sets = {path.name: len(utterances(path)) for path in (tmp_path / "data").iterdir()}
    tests = (
        {}
        if kind == "ssl1"
        else dict.fromkeys("dev_clean dev_other test_clean test_other".split(), 2)
    )
    assert sets == {"train_960": 6, "dev": 4, **tests}
    text = read_table(tmp_path / "data" / "train_960" / "text")
    assert text == {utt: f"WORDS OF {utt}" for utt in text}
    speakers = read_table(tmp_path / "data" / "train_960" / "utt2spk")
    assert set(speakers.values()) == {"0-5", "1-5", "2-5"}


@pytest.mark.parametrize(
    "recipe, chosen",
    [
        ("librispeech_100/asr1", ", choose others with --splits"),
        ("librispeech/ssl1", ", choose others with --splits"),
        ("librispeech/asr1", ""),  # which has no such option
    ],
)
def test_missing_splits_are_named(recipe, chosen, tmp_path, monkeypatch, capsys):
    make(tmp_path, TRAIN)
    monkeypatch.setenv("LIBRISPEECH", str(tmp_path))
    with pytest.raises(SystemExit):
        load(recipe).main([])
    said = capsys.readouterr().err
    assert "lacks dev-clean dev-other" in said
    advice = f"complete the corpus{chosen}, or unset LIBRISPEECH to download it\n"
    assert said.endswith(advice)


class Server(http.server.ThreadingHTTPServer):
    """Serves bytes by path, with ranges, as the corpora's servers do."""

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.ranges = files, []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        self.server.ranges.append((self.path, start))
        self.send_response(206 if start < len(content) else 416)
        self.send_header("Content-Range", f"bytes */{len(content)}")
        self.send_header("Content-Length", str(max(0, len(content) - start)))
        self.end_headers()
        self.wfile.write(content[start:])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """LibriSpeech's dev-clean as an archive, with its sum."""
    monkeypatch.delenv("LIBRISPEECH", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    corpus = make(tmp_path / "source", ["dev-clean"])
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        tar.add(corpus, "LibriSpeech")
    content = archive.getvalue()
    md5 = hashlib.md5(content).hexdigest()
    sums = f"{md5}  dev-clean.tar.gz\n{'0' * 32}  other.tar.gz\n".encode()
    files = {"/12/dev-clean.tar.gz": content, "/12/md5sum.txt": sums}
    server = Server(files)
    yield server
    server.shutdown()


def test_a_download_goes_on_is_checked_and_happens_once(server, tmp_path):
    target, name = tmp_path / "downloads", "/12/dev-clean.tar.gz"
    target.mkdir()
    half = len(server.files[name]) // 2
    (target / "dev-clean.tar.gz").write_bytes(server.files[name][:half])
    found = find_librispeech(["dev-clean"], str(target), f"{server.url}/12")
    assert server.ranges[1] == (name, half)
    assert found == target / "LibriSpeech"
    source = tmp_path / "source" / "LibriSpeech"
    for path in source.rglob("*.*"):
        assert (found / path.relative_to(source)).read_bytes() == path.read_bytes()
    server.ranges.clear()
    find_librispeech(["dev-clean"], str(target), f"{server.url}/12")
    assert server.ranges == []


def test_what_a_later_stage_needs_is_downloaded_too(server, tmp_path, monkeypatch):
    """A copy that is named need not have it."""
    target, url = tmp_path / "downloads", f"{server.url}/12"
    monkeypatch.setenv("LIBRISPEECH", "downloads")  # says what an empty one does
    found = find_librispeech([], str(target), url, besides=["dev-clean"])
    assert (found / "dev-clean").is_dir()
    (tmp_path / "copy" / "LibriSpeech").mkdir(parents=True)
    monkeypatch.setenv("LIBRISPEECH", str(tmp_path / "copy"))
    found = find_librispeech([], str(target), url, besides=["dev-clean"])
    assert not (found / "dev-clean").exists()


def test_a_spoilt_download_is_removed_and_named(server, tmp_path):
    target, name = tmp_path / "downloads", "/12/dev-clean.tar.gz"
    target.mkdir()
    spoilt = bytearray(server.files[name][:100])
    spoilt[50] ^= 1
    (target / "dev-clean.tar.gz").write_bytes(spoilt)
    with pytest.raises(UserError, match="has the MD5 sum .* it was removed"):
        find_librispeech(["dev-clean"], str(target), f"{server.url}/12")
    assert not (target / "dev-clean.tar.gz").exists()
    find_librispeech(["dev-clean"], str(target), f"{server.url}/12")


def test_no_way_to_the_corpus_says_what_to_set(server, tmp_path):
    with pytest.raises(UserError, match="can not be downloaded .*set LIBRISPEECH"):
        find_librispeech(["dev-clean"], str(tmp_path), f"{server.url}/99")


def test_an_archive_is_unpacked_once_and_again_after_a_kill(server, tmp_path):
    archive, made = tmp_path / "a.tar.gz", tmp_path / "LibriSpeech"
    fetch(f"{server.url}/12/dev-clean.tar.gz", archive)
    made.mkdir()
    (made / "half of a file").touch()  # which a kill left
    unpack(archive, made)
    assert not (made / "half of a file").exists()
    (made / "kept").touch()
    unpack(archive, made)
    assert (made / "kept").exists()


def test_a_broken_archive_of_an4_is_named(server, recipe, tmp_path, monkeypatch):
    monkeypatch.delenv("AN4", raising=False)
    server.files["/an4.tar.gz"] = server.files["/12/dev-clean.tar.gz"][:500]
    module = recipe("an4")
    with pytest.raises(UserError, match="can not be unpacked .*remove it .*set AN4"):
        module.find_an4(str(tmp_path / "downloads"), f"{server.url}/an4.tar.gz")
