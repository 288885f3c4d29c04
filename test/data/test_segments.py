import subprocess
import sys

import numpy as np
import pytest
import soundfile

from dldkit.data.datadir import read_table, write_data_dir
from dldkit.data.format import Format, format_data
from dldkit.data.length import filter_data
from dldkit.data.segments import cut_data, segments_of
from dldkit.errors import UserError


@pytest.mark.parametrize("samples", [900, 1600, 31999, 32000, 32001, 250000])
def test_segments_are_equal_and_lose_little(samples):
    segments = segments_of(samples, 32000)
    sizes = {end - begin for begin, end in segments}
    assert len(sizes) == 1 and 0 < max(sizes) <= 32000
    assert max(sizes) % 1600 == 0 or len(segments) == 1
    assert 0 <= segments[0][0] and segments[-1][1] <= samples
    assert all(a[1] <= b[0] for a, b in zip(segments, segments[1:]))
    assert samples - sum(end - begin for begin, end in segments) < 1601 * len(segments)
    if samples > 32000:
        assert len(segments) == -(-samples // 32000)


def test_cut_data(tmp_path, caplog):
    rng = np.random.default_rng(0)
    source = tmp_path / "whole"
    source.mkdir()
    lengths = dict(a=70000, b=20000)
    audio = {u: rng.integers(-9999, 9999, n, np.int16) for u, n in lengths.items()}
    for utt, samples in audio.items():
        soundfile.write(source / f"{utt}.flac", samples, 16000)
    for name, line in (
        ("wav.scp", "{0} " + str(source) + "/{0}.flac"),
        ("utt2spk", "{0} {0}"),
        ("utt2num_samples", "{0} {1}"),
    ):
        lines = [line.format(*item) + "\n" for item in lengths.items()]
        (source / name).write_text("".join(lines))
    with caplog.at_level("INFO"):
        cut_data(str(source), str(tmp_path / "cut"), 2.0, 16000)
    assert "4 segments of 2 utterances, 96.0% of" in caplog.text
    table = read_table(tmp_path / "cut" / "wav.scp")
    assert list(table) == ["a-000", "a-001", "a-002", "b-000"]
    expected = {f"a-00{i}": audio["a"][i * 23333 :][:22400] for i in range(3)}
    expected["b-000"] = audio["b"][:19200]
    for utt, samples in expected.items():
        found, _ = soundfile.read(table[utt], dtype="int16")
        assert np.array_equal(found, samples), utt
    sizes = read_table(tmp_path / "cut" / "utt2num_samples")
    assert sizes == {utt: str(len(x)) for utt, x in expected.items()}
    with pytest.raises(UserError, match="max_seconds 0.01 is too short"):
        cut_data(str(source), str(tmp_path / "cut"), 0.01, 16000)
    with pytest.raises(UserError, match="max_seconds nan is too short"):
        cut_data(str(source), str(tmp_path / "cut"), float("nan"), 16000)


def test_other_audio_under_the_same_names_goes_through_to_the_segments(tmp_path):
    """All that is made from a formatted directory later looks at its tables alone."""
    rng = np.random.default_rng(0)
    found = []
    for name in ("one", "other", "one"):
        source, file = tmp_path / "data", tmp_path / f"{name}.wav"
        if not file.is_file():
            soundfile.write(file, rng.integers(-9999, 9999, 70000, np.int16), 16000)
        write_data_dir(source, wav_scp={"a": str(file)}, utt2spk={"a": "a"})
        org, kept, cut = (str(tmp_path / name) for name in ("org", "kept", "cut"))
        format_data(str(source), org, Format(fs=16000), text=False)
        filter_data(org, kept, 0.1, 9.0, 16000, text=False)
        cut_data(kept, cut, 2.0, 16000)
        (_, first), *_ = read_table(f"{cut}/wav.scp").items()
        samples, _ = soundfile.read(first, dtype="int16")
        expected, _ = soundfile.read(file, dtype="int16")
        assert np.array_equal(samples, expected[: len(samples)])
        found.append(((tmp_path / "cut" / "wav.scp").read_text(), len(samples)))
    assert found[0] == found[2] != found[1]


@pytest.mark.integration
def test_two_processes_cut_at_once(tmp_path):
    source = tmp_path / "whole"
    source.mkdir()
    rng = np.random.default_rng(0)
    utts = [f"u{i:02d}" for i in range(40)]
    for utt in utts:
        samples = rng.integers(-9999, 9999, 5000, np.int16)
        soundfile.write(source / f"{utt}.wav", samples, 16000)
    write_data_dir(
        source,
        wav_scp={utt: str(source / f"{utt}.wav") for utt in utts},
        utt2spk={utt: utt for utt in utts},
        utt2num_samples={utt: "5000" for utt in utts},
    )
    command = [sys.executable, "-m", "dldkit.bin.sfm_cut_data", str(source)]
    command += [str(tmp_path / "cut"), "--max_seconds", "2", "--fs", "16000"]
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert len(read_table(tmp_path / "cut" / "wav.scp")) == 40


@pytest.mark.parametrize(
    "lengths, message",
    [
        ("", "utt2num_samples lists no samples"),
        ("a 0\n", "utt2num_samples lists no samples"),
        ("a many\n", "utt2num_samples: 'many' of a is no length"),
    ],
)
def test_lengths_that_say_nothing_are_refused(tmp_path, lengths, message):
    (tmp_path / "wav.scp").write_text("a a.wav\n")
    (tmp_path / "utt2num_samples").write_text(lengths)
    with pytest.raises(UserError, match=message):
        cut_data(str(tmp_path), str(tmp_path / "cut"), 2.0, 16000)
