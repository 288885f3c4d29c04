"""The digits recipe: always with espeak-ng, with real recordings where $FSDD is set."""

import hashlib
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from dldkit.data import fsdd
from dldkit.data.datadir import read_table, utterances
from dldkit.data.digits import WORDS

pytestmark = pytest.mark.integration

REPO = Path(__file__).resolve().parents[2]
SIZES = dict(train=60, dev=12, test_seen=15, test_unseen=9)
UNSEEN = {"fsdd": "theo", "espeak": "eve"}


@pytest.fixture(scope="module")
def digits(recipe):
    return recipe("digits")


@pytest.fixture(scope="module", params=["espeak", "fsdd"])
def source(request):
    if request.param == "fsdd" and not os.environ.get("FSDD"):
        pytest.skip("FSDD is not set")
    return request.param


def arguments(root: Path, options: tuple[str, ...]) -> list[str]:
    sizes = [f"--num_{name}={size}" for name, size in SIZES.items()]
    places = [f"--data_dir={root}/data", f"--download_dir={root}/downloads"]
    return [*places, *sizes, *options]


def make(digits, root: Path, *options: str) -> Path:
    digits.main(arguments(root, options))
    return root / "data"


def make_in_new_process(digits, root: Path, *options: str) -> Path:
    command = [sys.executable, digits.__file__, *arguments(root, options)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(REPO)})
    return root / "data"


@pytest.fixture
def reuse(corpus, source) -> tuple[str, str]:
    """Options that take the recordings of `corpus` again."""
    return f"--source={source}", f"--download_dir={corpus.parent}/downloads"


@pytest.fixture(scope="module")
def corpus(digits, source, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp(source)
    return make_in_new_process(digits, root, f"--source={source}")


def recordings_of(directory: Path) -> set[str]:
    return {
        recording
        for used in read_table(directory / "utt2recordings").values()
        for recording in used.split()
    }


def test_sets_are_complete_and_consistent(corpus, source):
    line = {"fsdd": "FSDD, real recordings", "espeak": "synthesised speech"}[source]
    for name, size in SIZES.items():
        assert len(utterances(corpus / name)) == size
        assert line in (corpus / name / "corpus_source").read_text()


def test_no_recording_is_shared(corpus):
    used = {name: recordings_of(corpus / name) for name in SIZES}
    for name in SIZES:
        for other in set(SIZES) - {name}:
            assert not used[name] & used[other], (name, other)


def test_one_speaker_is_unseen(corpus, source):
    speakers = {n: set(read_table(corpus / n / "utt2spk").values()) for n in SIZES}
    assert speakers["test_unseen"] == {UNSEEN[source]}
    assert len(speakers["train"]) == 5 and UNSEEN[source] not in speakers["train"]
    assert speakers["dev"] == speakers["test_seen"] == speakers["train"]
    for name in ("train", "dev", "test_seen"):
        assert {r.split("_")[1] for r in recordings_of(corpus / name)} == speakers[name]


NOISY = {
    "train_noisy": 120,
    "dev_noisy": 12,
    **{f"test_seen_{snr}db": 15 for snr in (20, 10, 5)},
    **{f"test_unseen_{snr}db": 9 for snr in (20, 10, 5)},
}


def audio_of(directory: Path) -> dict[str, np.ndarray]:
    wavs = read_table(directory / "wav.scp")
    return {utt[-5:]: soundfile.read(path)[0] for utt, path in wavs.items()}


def test_noisy_sets_share_no_recording_either(corpus):
    for name, size in NOISY.items():
        assert len(utterances(corpus / name)) == size
        assert "babble" in (corpus / name / "corpus_source").read_text()
        clean = name.rpartition("_")[0]
        assert recordings_of(corpus / name) <= recordings_of(corpus / clean) or (
            clean in ("train", "dev")
        )
        for other in set(SIZES) - {clean}:
            assert not recordings_of(corpus / name) & recordings_of(corpus / other)


def test_noisy_tests_say_the_same_at_each_level(corpus):
    """What differs from the clean set's audio grows with the level of the babble."""
    for name in ("test_seen", "test_unseen"):
        clean, text = audio_of(corpus / name), read_table(corpus / name / "text")
        distances = []
        for snr in (20, 10, 5):
            noisy = f"{name}_{snr}db"
            said = read_table(corpus / noisy / "text")
            assert list(said.values()) == list(text.values())
            similar = []
            for utt, audio in audio_of(corpus / noisy).items():
                assert len(audio) == len(clean[utt])
                assert np.abs(audio).max() == pytest.approx(0.5, abs=1e-3)
                similar.append(np.corrcoef(audio, clean[utt])[0, 1])
            distances.append(1 - np.mean(similar))
        assert 0.01 < distances[0] < distances[1] < distances[2]


def test_half_of_noisy_training_is_clean(corpus):
    loudest = [
        np.abs(audio).max() for audio in audio_of(corpus / "train_noisy").values()
    ]
    assert len(loudest) == 120
    spoilt = np.isclose(loudest, 0.5, atol=1e-3).sum()
    assert 40 < spoilt < 80


def test_text_says_what_was_strung_together(corpus):
    counts = set()
    for name in SIZES:
        text = read_table(corpus / name / "text")
        speakers = read_table(corpus / name / "utt2spk")
        for utt, used in read_table(corpus / name / "utt2recordings").items():
            parts = [recording.split("_") for recording in used.split()]
            assert text[utt].split() == [WORDS[int(part[0])] for part in parts]
            assert {part[1] for part in parts} == {speakers[utt]}
            counts.add(len(parts))
    assert counts == {3, 4, 5, 6, 7}


def test_audio_is_the_recordings_in_order(corpus, source):
    """Each recording is found in the audio, after the one before it."""
    folder = corpus.parent / "downloads" / "espeak_digits"
    if source == "fsdd":
        folder = Path(os.environ["FSDD"])
        folder = folder / "recordings" if (folder / "recordings").is_dir() else folder
    for name in SIZES:
        wavs = read_table(corpus / name / "wav.scp")
        used = read_table(corpus / name / "utt2recordings")
        for utt in list(used)[:5]:
            audio, fs = soundfile.read(wavs[utt])
            assert fs == 8000
            end = 0
            for recording in used[utt].split():
                digit, _ = soundfile.read(folder / f"{recording}.wav")
                window = audio[end : end + fs // 5 + len(digit)]
                errors = [
                    np.abs(window[start : start + len(digit)] - digit).mean()
                    for start in range(len(window) - len(digit) + 1)
                ]
                gap = int(np.argmin(errors))
                assert min(errors) < 1e-3 and gap >= 0.03 * fs
                end += gap + len(digit)
            assert 0.03 * fs <= len(audio) - end <= 0.2 * fs


def checksums(root: Path) -> dict[str, str]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(root)): hashlib.sha256(
            path.read_bytes().replace(str(root).encode(), b"")
        ).hexdigest()
        for path in files
    }


def test_same_seed_same_bytes(corpus, digits, source, reuse, tmp_path):
    again = make_in_new_process(digits, tmp_path / "again", f"--source={source}")
    assert checksums(again) == checksums(corpus)
    make(digits, tmp_path / "again", f"--source={source}")  # over itself
    assert checksums(again) == checksums(corpus)
    other = make(digits, tmp_path / "other", "--seed=1", *reuse)
    assert (other / "train/text").read_text() != (corpus / "train/text").read_text()
    # stage 3 goes by the tables, and a distillation's have no text
    wavs = [
        set(read_table(root / "train/wav.scp").values()) for root in (corpus, other)
    ]
    names = [
        {Path(wav).relative_to(root) for wav in found}
        for root, found in zip((corpus, other), wavs)
    ]
    assert not names[0] & names[1]


def test_audio_that_is_there_is_kept(corpus, digits, reuse):
    wavs = [Path(wav) for wav in read_table(corpus / "train/wav.scp").values()]
    before = [wav.stat().st_mtime_ns for wav in wavs]
    make(digits, corpus.parent, *reuse)
    assert [wav.stat().st_mtime_ns for wav in wavs] == before


def test_strings_of_other_recordings_are_made_anew(digits, tmp_path):
    before = read_table(make(digits, tmp_path, "--source=espeak") / "train" / "wav.scp")
    used = sorted(recordings_of(tmp_path / "data" / "train"))[0]
    wav = tmp_path / "downloads" / "espeak_digits" / f"{used}.wav"
    samples, fs = soundfile.read(wav)
    soundfile.write(wav, 0.5 * samples, fs, subtype="PCM_16")
    after = read_table(make(digits, tmp_path, "--source=espeak") / "train" / "wav.scp")
    assert before.keys() == after.keys()
    assert not set(before.values()) & set(after.values())


def test_two_preparations_at_once(digits, reuse, tmp_path):
    command = [sys.executable, digits.__file__, *arguments(tmp_path, reuse)]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    both = [subprocess.Popen(command, env=env) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    for name, size in SIZES.items():
        assert len(utterances(tmp_path / "data" / name)) == size


def test_a_smaller_set_is_the_beginning_of_a_larger(corpus, digits, reuse, tmp_path):
    small = make(digits, tmp_path, "--num_train=10", *reuse)
    train, whole = (read_table(root / "train/text") for root in (small, corpus))
    assert train.items() <= whole.items() and len(train) == 10
    for name in ("dev", "test_seen", "test_unseen"):
        assert read_table(small / name / "text") == read_table(corpus / name / "text")


def test_another_speaker_can_be_kept_out(digits, source, reuse, tmp_path, capsys):
    name = {"fsdd": "lucas", "espeak": "bob"}[source]
    root = make(digits, tmp_path, f"--unseen_speaker={name}", *reuse)
    assert set(read_table(root / "test_unseen/utt2spk").values()) == {name}
    with pytest.raises(SystemExit):
        make(digits, tmp_path, "--unseen_speaker=nobody", *reuse)
    assert "--unseen_speaker nobody: choose from" in capsys.readouterr().err


@pytest.mark.parametrize("source_option", ["auto", "fsdd"])
def test_a_wrong_fsdd_is_an_error_never_a_silent_fallback(
    digits, tmp_path, monkeypatch, capsys, source_option
):
    def error() -> str:
        with pytest.raises(SystemExit):
            make(digits, tmp_path, f"--source={source_option}")
        assert not (tmp_path / "data").exists()
        return capsys.readouterr().err.splitlines()[-1]

    monkeypatch.setenv("FSDD", str(tmp_path / "missing"))
    assert f"{tmp_path}/missing is not a directory" in error()
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "0_george_0.wav").touch()
    monkeypatch.setenv("FSDD", str(tmp_path / "part"))
    assert "lacks 2999 of FSDD's 3000 recordings, first: 0_george_1.wav" in error()


def test_without_network(digits, source, reuse, tmp_path, monkeypatch, capsys, caplog):
    if source != "espeak":
        pytest.skip("synthesised speech is what is left")
    monkeypatch.delenv("FSDD", raising=False)
    monkeypatch.setattr(fsdd, "URL", (tmp_path / "gone.tar.gz").as_uri())
    with pytest.raises(SystemExit):
        make(digits, tmp_path, "--source=fsdd")
    assert "set FSDD to a copy" in capsys.readouterr().err
    root = make(digits, tmp_path, *reuse, "--source=auto")
    assert "using synthesised speech instead" in caplog.text
    assert "synthesised" in (root / "train/corpus_source").read_text()


def test_download_is_checked_and_kept(digits, source, tmp_path, monkeypatch, capsys):
    """The archive comes from a file:// address; GitHub names its folder this way."""
    if source != "fsdd":
        pytest.skip("nothing to download")
    folder = Path(os.environ["FSDD"])
    folder = folder / "recordings" if (folder / "recordings").is_dir() else folder
    archive = tmp_path / "archive.tar.gz"
    monkeypatch.delenv("FSDD")
    monkeypatch.setattr(fsdd, "URL", archive.as_uri())

    def pack(spoil: bool) -> None:
        with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
            for path in sorted(folder.glob("*.wav")):
                wrong = spoil and path.name == "5_theo_7.wav"
                content = folder / "5_theo_8.wav" if wrong else path
                tar.add(content, f"free-spoken-digit-dataset-x/recordings/{path.name}")

    pack(spoil=True)
    with pytest.raises(SystemExit):
        make(digits, tmp_path)
    assert "not those of the pinned commit" in capsys.readouterr().err
    assert not list((tmp_path / "downloads").iterdir())
    pack(spoil=False)
    complete = archive.read_bytes()
    archive.write_bytes(complete[: len(complete) // 2])  # the line breaks down
    with pytest.raises(SystemExit):
        make(digits, tmp_path, "--source=fsdd")
    assert "can not be downloaded" in capsys.readouterr().err
    archive.write_bytes(complete)
    root = make(digits, tmp_path)
    assert "FSDD, real" in (root / "train/corpus_source").read_text()
    archive.unlink()
    make(digits, tmp_path, "--source=fsdd")  # no second download
