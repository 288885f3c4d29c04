import struct

import numpy as np
import pytest
import soundfile
from layouts import as_ffmpeg_streams

from dldkit.data.audio import (
    BadAudio,
    convert,
    declared_length,
    read_audio,
    read_channels,
    write_audio,
)
from dldkit.data.corpus import describe
from dldkit.data.datadir import read_table


@pytest.fixture(scope="module")
def recording(an4) -> str:
    """A real recording: NIST SPHERE, 16 kHz."""
    return read_table(an4 / "test" / "wav.scp")["fcaw-cen8-fcaw-b"]


def peak_frequency(samples: np.ndarray, fs: int) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return np.argmax(spectrum) * fs / len(samples)


def tone(frequency: float, fs: int, seconds: float = 1.0) -> np.ndarray:
    time = np.arange(round(seconds * fs)) / fs
    return (0.5 * np.sin(2 * np.pi * frequency * time)).astype(np.float32)


def part_of(recording: str, start: float, end: float) -> np.ndarray:
    return read_channels(recording, start, end)[0].mean(1)


def test_reads_sphere_as_its_raw_bytes_say(recording):
    samples, fs = read_audio(recording)
    with open(recording, "rb") as raw:
        truth = np.frombuffer(raw.read()[1024:], dtype="<i2")
    assert fs == 16000 and samples.dtype == np.float32
    np.testing.assert_array_equal(samples * 32768, truth)


def test_reads_a_segment(recording):
    whole, fs = read_audio(recording)
    part = part_of(recording, 0.5, 1.25)
    np.testing.assert_array_equal(part, whole[fs // 2 : fs + fs // 4])


def test_segment_may_end_late_by_rounding_only(recording):
    whole, fs = read_audio(recording)
    end = len(whole) / fs
    part = part_of(recording, end - 0.5, end + 0.01)
    np.testing.assert_array_equal(part, whole[-fs // 2 :])
    for start, stop in (
        (0, end + 1),
        (end + 0.01, end + 0.02),
        (1, 1),
        (2, 1),
        (-1, 1),
    ):
        with pytest.raises(BadAudio, match="segment"):
            part_of(recording, start, stop)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_written_16_bit_audio_is_bit_exact(recording, tmp_path, suffix):
    samples, fs = read_audio(recording)
    extremes = np.array([-1, 32767 / 32768], dtype=np.float32)
    samples = np.concatenate([samples, extremes])
    write_audio(tmp_path / f"a.{suffix}", samples, fs)
    again, rate = read_audio(str(tmp_path / f"a.{suffix}"))
    assert rate == fs
    np.testing.assert_array_equal(again, samples)


def test_writing_clips(tmp_path):
    write_audio(tmp_path / "a.wav", np.array([-3.0, 3.0], dtype=np.float32), 8000)
    integers, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert integers.tolist() == [-32768, 32767]


@pytest.mark.parametrize(
    "suffix", ["wav", "flac", "sph", "aiff", "au", "w64", "rf64", "ogg", "opus"]
)
@pytest.mark.parametrize("keep", [0.3, 0.999])
def test_truncated_audio_is_bad(recording, tmp_path, suffix, keep):
    samples, fs = read_audio(recording)
    path = tmp_path / f"a.{suffix}"
    kinds = dict(sph=("NIST", "PCM_16"), ogg=("OGG", "VORBIS"), opus=("OGG", "OPUS"))
    form, subtype = kinds.get(suffix, (suffix.upper(), "PCM_16"))
    soundfile.write(path, samples, fs, subtype, format=form)
    for whole in (str(path), f"cat {path} |"):
        assert len(read_audio(whole)[0]) == len(samples)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(BadAudio, match="truncated|unreadable"):
        read_audio(str(path))


@pytest.mark.parametrize("endian", ["LITTLE", "BIG"])
@pytest.mark.parametrize("subtype", ["PCM_24", "FLOAT", "ALAW"])
def test_truncated_wav_with_a_chunk_of_odd_size(recording, tmp_path, endian, subtype):
    samples, fs = read_audio(recording)
    path = tmp_path / "a.wav"
    soundfile.write(path, np.stack([samples] * 2, 1), fs, subtype, endian)
    content = path.read_bytes()
    order = endian.lower()
    note = b"note" + (5).to_bytes(4, order) + b"hello\0"
    data = content.index(b"data")
    whole = content[:data] + note + content[data:]
    path.write_bytes(whole)
    assert len(read_audio(str(path))[0]) == len(samples)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadAudio, match=f"truncated: .* of {len(samples)} samples"):
        read_audio(str(path))


def test_streamed_wav_of_unknown_size_is_good(recording, tmp_path):
    samples, fs = read_audio(recording)
    path = tmp_path / "a.wav"
    write_audio(path, samples, fs)
    content = bytearray(path.read_bytes())
    content[4:8] = content[40:44] = b"\xff" * 4
    path.write_bytes(content)
    np.testing.assert_array_equal(read_audio(str(path))[0], samples)


@pytest.mark.parametrize("suffix", ["aiff", "au"])
def test_what_was_streamed_has_no_size_to_compare(recording, tmp_path, suffix):
    samples, fs = read_audio(recording)
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, samples, fs, "PCM_16")
    content = bytearray(path.read_bytes())
    place = dict(aiff=4, au=8)[suffix]
    content[place : place + 4] = b"\xff" * 4
    path.write_bytes(content)
    np.testing.assert_array_equal(read_audio(str(path))[0], samples)


def as_written_to_a_pipe(flac: bytes) -> bytes:
    """Return a FLAC without its length: the last 36 of 64 bits of its description."""
    (description,) = struct.unpack_from(">Q", flac, 18)
    return flac[:18] + struct.pack(">Q", description >> 36 << 36) + flac[26:]


def test_a_flac_without_its_length_is_read_to_its_end(recording, tmp_path):
    samples, fs = read_audio(recording)
    path = tmp_path / "a.flac"
    write_audio(path, samples, fs)
    content = as_written_to_a_pipe(path.read_bytes())
    path.write_bytes(content)
    assert soundfile.info(path).frames == 2**63 - 1
    assert declared_length(path) == (len(samples), fs, 1)
    assert describe(path).num_samples == len(samples)
    for name in (str(path), f"cat {path} |"):
        np.testing.assert_array_equal(read_audio(name)[0], samples)
        part = part_of(name, 0.5, 1.25)
        np.testing.assert_array_equal(part, samples[fs // 2 : fs + fs // 4])
    path.write_bytes(content[:-100])
    with pytest.raises(BadAudio, match="unreadable: .*lost sync"):
        read_audio(str(path))
    path.write_bytes(b"fLaC\x80" + content[5:42])  # the description is the last block
    with pytest.raises(BadAudio, match="no samples"):
        read_audio(str(path))


@pytest.mark.parametrize("failure", [ValueError("too big"), MemoryError("too big")])
def test_no_file_loses_the_others(recording, monkeypatch, failure):
    def failing(*args, **kwargs):
        raise failure

    monkeypatch.setattr(soundfile.SoundFile, "read", failing)
    with pytest.raises(BadAudio, match="unreadable: too big"):
        read_audio(recording)


def length(path) -> int:
    """The samples that are read, and promised by the header."""
    samples = len(read_audio(str(path))[0])
    assert declared_length(path)[0] == samples
    return samples


@pytest.fixture(params=[16000, 48000])
def mp3s(request, recording, tmp_path):
    """Two seconds as CBR and VBR, each with its length and without.

    The VBR is first louder than later, so that its bitrate can not tell the length.
    """
    rate, files = request.param, {}
    speech = convert(read_audio(recording)[0], 16000, rate)[: 2 * rate]
    for mode in ("CONSTANT", "VARIABLE"):
        how = dict(format="MP3", bitrate_mode=mode, compression_level=0.4)
        path = tmp_path / f"{mode}.mp3"
        soundfile.write(path, speech * np.linspace(2, 0, len(speech)), rate, **how)
        content = path.read_bytes()
        first = content.find(content[:2], 4)
        assert content[:first].count(b"Info") + content[:first].count(b"Xing") == 1
        files[path] = content[first:]
    return files


def test_an_mp3_s_length_is_counted_where_it_is_not_said(mp3s, tmp_path):
    for path, stream in mp3s.items():
        whole, fs = read_audio(str(path))
        for number, content in enumerate(
            (
                stream,
                as_ffmpeg_streams(path.read_bytes()),
                stream + b"TAG" + bytes(125),
                stream + b"APETAGEX" + b"\xff\xfb" * 999,
            )
        ):
            bare = tmp_path / f"{path.stem}{number}.mp3"
            bare.write_bytes(content)
            # the encoder's delay and the end of the last frame are there, too
            assert 0 < (more := length(bare) - len(whole)) < 3 * 1152
            samples = read_audio(f"cat {bare} |")[0]
            np.testing.assert_array_equal(samples, read_audio(str(bare))[0])
            distances = [abs(samples[n:][:fs] - whole[:fs]).sum() for n in range(more)]
            delay = np.argmin(distances)
            np.testing.assert_allclose(
                samples[delay:][: len(whole)], whole, rtol=0, atol=1e-3
            )


def test_a_truncated_mp3_is_bad(mp3s, tmp_path):
    for path, stream in mp3s.items():
        said = path.read_bytes()
        for content in (said[: len(said) // 2], stream[:-20]):
            path.write_bytes(content)
            with pytest.raises(BadAudio, match="truncated"):
                read_audio(str(path))


@pytest.mark.parametrize(
    "content, reason",
    [
        (None, "no such file"),
        (b"", "unreadable"),
        (b"this is no audio" * 99, "unreadable"),
        (np.zeros((0,)), "no samples"),
        (np.full(800, np.nan), "not finite"),
    ],
)
def test_bad_audio_has_its_reason(tmp_path, content, reason):
    path = tmp_path / "a.wav"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        soundfile.write(path, content, 8000, subtype="FLOAT")
    with pytest.raises(BadAudio, match=reason):
        read_audio(str(path))


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_channels_are_mixed_or_kept_apart(recording, tmp_path, name):
    speech, fs = read_audio(recording)
    other = np.roll(speech, 1000)
    path = str(tmp_path / name)
    soundfile.write(path, np.stack([speech, other], 1), fs, subtype="PCM_16")
    integers = [soundfile.read(path, dtype="int16")[0][:, i] for i in (0, 1)]
    first, second = (values.astype(np.float32) / 32768 for values in integers)
    both = np.stack([first, second], 1)
    np.testing.assert_array_equal(read_channels(path)[0], both)
    mixed = read_audio(path)[0]
    np.testing.assert_allclose(mixed, (first + second) / 2, atol=1e-7)


@pytest.mark.parametrize("fs, target", [(8000, 16000), (44100, 16000), (16000, 8000)])
def test_resampling_keeps_duration_and_pitch(fs, target):
    converted = convert(tone(1000, fs), fs, target)
    assert abs(len(converted) - target) <= 1
    assert abs(peak_frequency(converted, target) - 1000) < 2
    np.testing.assert_allclose(
        converted[200:-200], tone(1000, target)[200 : len(converted) - 200], atol=0.02
    )


@pytest.mark.parametrize("speed", [0.9, 1.1])
@pytest.mark.parametrize("fs, target", [(8000, 8000), (16000, 8000)])
def test_speed_changes_duration_and_pitch(fs, target, speed):
    converted = convert(tone(1000, fs), fs, target, speed)
    assert abs(len(converted) - target / speed) <= 2
    assert abs(peak_frequency(converted, target) - 1000 * speed) < 2


def test_nothing_to_convert_changes_nothing(recording):
    samples, fs = read_audio(recording)
    assert convert(samples, fs, fs) is samples
