import numpy as np
import pytest
import soundfile

from dldkit.data.datadir import read_table
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
