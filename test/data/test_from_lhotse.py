"""lhotse's manifests as data directories, and Kaldi's directories at stage 3."""

import os
import stat
import sys

import kaldiio
import numpy as np
import pytest
import soundfile
from lhotse import Recording, RecordingSet, SupervisionSegment, SupervisionSet
from lhotse.kaldi import export_to_kaldi

from dldkit.bin.format_data import main as format_main
from dldkit.data.audio import BadAudio, read_audio, read_channels
from dldkit.data.corpus import describe
from dldkit.data.datadir import read_table, utterances
from dldkit.data.format import Format, format_data
from dldkit.data.from_lhotse import from_lhotse
from dldkit.errors import UserError


@pytest.fixture(scope="module")
def samples(an4) -> np.ndarray:
    """Real speech as 16 bit integers, 16 kHz."""
    path = read_table(an4 / "test" / "wav.scp")["fcaw-cen8-fcaw-b"]
    return soundfile.read(path, dtype="int16")[0]


@pytest.fixture
def talk(samples, tmp_path):
    """One recording in a directory with spaces and Unicode in its name."""
    path = tmp_path / "my tälks 講演" / "a talk.flac"
    path.parent.mkdir()
    soundfile.write(path, samples, 16000)
    return Recording.from_file(path, recording_id="talk")


def supervision(name, recording, start=0.0, duration=None, **values):
    values = {"text": name.upper(), "speaker": "s", **values}
    return SupervisionSegment(
        id=name,
        recording_id=recording.id,
        start=start,
        duration=recording.duration if duration is None else duration,
        **values,
    )


def formatted(directory, out):
    """What stage 3 makes of a directory: utterance to 16 bit integers."""
    format_data(directory, out, Format())
    table = read_table(out / "wav.scp")
    return {utt: soundfile.read(p, dtype="int16")[0] for utt, p in table.items()}


def test_whole_recordings_need_no_segments(talk, samples, tmp_path):
    utt = supervision("u 1", talk, text=" ONE \n TWO ", speaker="a b")
    assert from_lhotse([talk], [utt], tmp_path / "set", "a corpus") == 1
    assert not (tmp_path / "set" / "segments").exists()
    assert utterances(tmp_path / "set") == ["u_1"]
    assert read_table(tmp_path / "set" / "text") == {"u_1": "ONE TWO"}
    assert read_table(tmp_path / "set" / "utt2spk") == {"u_1": "a_b"}
    assert (tmp_path / "set" / "corpus_source").read_text() == "a corpus\n"
    got = formatted(tmp_path / "set", tmp_path / "out")
    np.testing.assert_array_equal(got["u_1"], samples)


def test_segments_are_the_samples_cut_by_hand(talk, samples, tmp_path):
    utts = [supervision("a", talk, 0.25, 0.5), supervision("b", talk, 1.0, 0.1234)]
    from_lhotse([talk], utts, tmp_path / "set")
    got = formatted(tmp_path / "set", tmp_path / "out")
    np.testing.assert_array_equal(got["a"], samples[4000:12000])
    np.testing.assert_array_equal(got["b"], samples[16000 : round(1.1234 * 16000)])
    # the directory can be made again without segments
    from_lhotse([talk], [supervision("a", talk)], tmp_path / "set")
    assert utterances(tmp_path / "set") == ["a"]


def test_what_has_no_recording_is_listed(talk, tmp_path, caplog):
    lost = supervision("b", talk)
    lost.recording_id = "gone"
    from_lhotse(
        [talk], [supervision("a", talk), lost], tmp_path / "set", dropped={"c": "why"}
    )
    dropped = read_table(tmp_path / "set" / "dropped.txt")
    assert dropped == {"b": "no audio: there is no recording gone", "c": "why"}
    assert "dropped 2 of 3" in caplog.text
    with pytest.raises(UserError, match="no utterance is left"):
        from_lhotse([], [lost], tmp_path / "set")


def test_speech_without_transcripts_and_speakers(talk, tmp_path):
    utt = supervision("a", talk, text=None, speaker=None)
    from_lhotse([talk], [utt], tmp_path / "set")
    assert utterances(tmp_path / "set", text=False) == ["a"]
    assert read_table(tmp_path / "set" / "utt2spk") == {"a": "a"}


def test_what_can_not_be_one_file_is_refused(talk, samples, tmp_path):
    utt = supervision("a", talk)
    for recordings, supervisions, message in (
        ([talk, talk], [utt], "recording talk is there twice"),
        ([talk], [utt, utt], "utterance a is there twice"),
        (
            [talk.perturb_speed(1.1, affix_id=False)],
            [utt],
            "to be changed by lhotse .*Speed",
        ),
        ([talk.move_to_memory()], [utt], "no file but a memory"),
        ([], [], "no utterances"),
    ):
        with pytest.raises(UserError, match=message):
            from_lhotse(recordings, supervisions, tmp_path / "set")


@pytest.mark.parametrize(
    "channels, mixed",
    [([0, 1], []), ([1], []), ([0], [0]), ([0, 0], [0, 1]), ([0, [0, 1]], [1])],
)
def test_utterances_are_in_the_channels_that_they_name(
    samples, tmp_path, channels, mixed
):
    sides = [samples // 2 * 2, np.roll(samples, 999) // 2 * 2]
    soundfile.write(tmp_path / "call.wav", np.stack(sides, 1), 16000)
    call = Recording.from_file(tmp_path / "call.wav")
    utts = [supervision(f"u{i}", call, channel=c) for i, c in enumerate(channels)]
    from_lhotse([call], utts, tmp_path / "set")
    got = formatted(tmp_path / "set", tmp_path / "out")
    for i, channel in enumerate(channels):  # lhotse's default, 0, may say nothing
        truth = np.mean(sides, 0) if i in mixed else sides[channel]
        np.testing.assert_array_equal(got[f"u{i}"], truth)


def test_some_channels_of_several_are_refused(samples, tmp_path):
    soundfile.write(tmp_path / "array.wav", np.stack([samples] * 3, 1), 16000)
    array = Recording.from_file(tmp_path / "array.wav")
    for channel, named in ((3, "3"), ([0, 2], "0, 2")):
        utt = supervision("u", array, channel=channel)
        message = rf"u is in channels \[{named}\] of recording array, which has"
        with pytest.raises(UserError, match=message):
            from_lhotse([array], [utt], tmp_path / "set")


def test_commands_are_taken_as_they_are(talk, samples, tmp_path):
    talk.sources[0].type = "command"
    talk.sources[0].source = f"cat '{talk.sources[0].source}'"
    from_lhotse([talk], [supervision("a", talk, 0, 0.5)], tmp_path / "set")
    got = formatted(tmp_path / "set", tmp_path / "out")
    np.testing.assert_array_equal(got["a"], samples[:8000])


# ---------------------------------------------------------------- Kaldi's directories


@pytest.mark.parametrize("suffix", ["wav", "flac", "sph"])
def test_an_export_of_lhotse_is_read(samples, tmp_path, suffix):
    """Its commands are not needed where libsndfile reads the file itself."""
    folder = tmp_path / "with space"
    folder.mkdir()
    path = folder / f"talk.{suffix}"
    write = dict(format="NIST") if suffix == "sph" else {}
    soundfile.write(path, samples, 16000, subtype="PCM_16", **write)
    talk = describe(path)  # lhotse itself needs sph2pipe for SPHERE
    utts = [supervision("a", talk, 0.25, 0.5), supervision("b", talk, 1.0, 0.5)]
    export_to_kaldi(
        RecordingSet.from_recordings([talk]),
        SupervisionSet.from_segments(utts),
        tmp_path / "kaldi",
    )
    is_command = (tmp_path / "kaldi" / "wav.scp").read_text().strip()[-1] == "|"
    assert is_command == (suffix != "wav")
    got = formatted(tmp_path / "kaldi", tmp_path / "out")
    np.testing.assert_array_equal(got["a"], samples[4000:12000])
    np.testing.assert_array_equal(got["b"], samples[16000:24000])


def test_an_export_s_channels_stay_apart(samples, tmp_path):
    other = np.roll(samples, 999)
    soundfile.write(tmp_path / "call.wav", np.stack([samples, other], 1), 16000)
    call = Recording.from_file(tmp_path / "call.wav")
    utts = [supervision(f"s{c}", call, channel=c) for c in (0, 1)]
    export_to_kaldi(
        RecordingSet.from_recordings([call]),
        SupervisionSet.from_segments(utts),
        tmp_path / "kaldi",
    )
    got = formatted(tmp_path / "kaldi", tmp_path / "out")
    np.testing.assert_array_equal(got["s0-0"], samples)
    np.testing.assert_array_equal(got["s1-1"], other)


def test_an_export_that_resamples_is_run(samples, tmp_path, monkeypatch):
    """By a program that stands in for ffmpeg, which may be missing here."""
    soundfile.write(tmp_path / "a.flac", samples, 16000)
    program = tmp_path / "bin" / "ffmpeg"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\n"
        "import io, sys, soundfile\n"
        "samples, _ = soundfile.read(sys.argv[4], dtype='int16')\n"
        "wav = io.BytesIO()\n"
        "soundfile.write(wav, samples[::2], int(sys.argv[6]), format='WAV')\n"
        "sys.stdout.buffer.write(wav.getvalue())\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    command = (
        f"ffmpeg -threads 1 -i {tmp_path}/a.flac -ar 8000 "
        "-map_channel 0.0.0  -f wav -threads 1 pipe:1 |"
    )
    got, fs = read_audio(command)
    assert fs == 8000
    np.testing.assert_array_equal(got * 32768, samples[::2])


def kaldi_directory(directory, **wavs):
    directory.mkdir()
    for name, value in (("text", "WORDS"), ("utt2spk", "s")):
        lines = "".join(f"{utt} {value}\n" for utt in sorted(wavs))
        (directory / name).write_text(lines)
    lines = "".join(f"{utt} {wavs[utt]}\n" for utt in sorted(wavs))
    (directory / "wav.scp").write_text(lines)
    return directory


def test_pipes_are_run_and_a_failure_names_the_utterance(samples, tmp_path):
    wav = tmp_path / "a.wav"
    soundfile.write(wav, samples, 16000)
    directory = kaldi_directory(
        tmp_path / "kaldi",
        good=f"cat {wav} | cat |",
        missing="no_such_program_at_all x |",
        first=f"cat {tmp_path}/gone.wav | cat {wav} - |",
        empty="true |",
        text="echo no audio |",
        half=f"head -c {len(samples)} {wav} |",
    )
    got = formatted(directory, tmp_path / "out")
    assert list(got) == ["good"]
    np.testing.assert_array_equal(got["good"], samples)
    dropped = read_table(tmp_path / "out" / "dropped.txt")
    assert dropped.keys() == {"missing", "first", "empty", "text", "half"}
    assert "no_such_program_at_all: command not found" in dropped["missing"]
    assert "gone.wav: No such file" in dropped["first"]
    assert dropped["empty"].startswith("command wrote nothing")
    assert dropped["text"].startswith("unreadable")
    assert dropped["half"].startswith("truncated")


@pytest.mark.parametrize("size", [0x7FFFF000, 0x7FFFFFFF, 0xFFFFFFFF])
def test_streamed_wav_is_no_truncated_wav(samples, tmp_path, size):
    """Programs that write to a pipe do not know the size in advance."""
    wav = tmp_path / "a.wav"
    soundfile.write(wav, samples, 16000)
    content = wav.read_bytes()
    data = content.index(b"data") + 4
    wav.write_bytes(content[:data] + size.to_bytes(4, "little") + content[data + 4 :])
    got, _ = read_audio(f"cat {wav} |")
    np.testing.assert_array_equal(got * 32768, samples)


def test_a_pipe_runs_once_for_all_segments_of_its_recording(samples, tmp_path):
    soundfile.write(tmp_path / "a.wav", samples, 16000)
    command = f"echo x >> {tmp_path}/runs; cat {tmp_path}/a.wav |"
    directory = kaldi_directory(tmp_path / "kaldi", a=command, b=command)
    (directory / "wav.scp").write_text(f"rec {command}\n")
    (directory / "segments").write_text("a rec 0.0 0.5\nb rec 0.5 1.0\n")
    got = formatted(directory, tmp_path / "out")
    np.testing.assert_array_equal(got["a"], samples[:8000])
    np.testing.assert_array_equal(got["b"], samples[8000:16000])
    assert (tmp_path / "runs").read_text() == "x\n"


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_audio_in_arks_is_read(samples, tmp_path, kind):
    write = {}
    if kind == "flac":  # as ESPnet does
        write = dict(write_function="soundfile", write_kwargs={"format": "flac"})
    parts = {"a": samples[:9000], "b": samples[9000:20000]}
    ark, audio = tmp_path / "wav.ark", {u: (16000, part) for u, part in parts.items()}
    kaldiio.save_ark(str(ark), audio, scp=f"{tmp_path}/wav.scp", **write)
    table = read_table(tmp_path / "wav.scp")
    directory = kaldi_directory(tmp_path / "kaldi", **table)
    got = formatted(directory, tmp_path / "out")
    for utt, part in parts.items():
        np.testing.assert_array_equal(got[utt], part)
    half, _ = read_channels(table["b"], 0.25, 0.5)
    np.testing.assert_array_equal(half[:, 0] * 32768, parts["b"][4000:8000])
    place = table["b"].rpartition(":")[2]
    (tmp_path / "half.ark").write_bytes(ark.read_bytes()[:-1000])
    with pytest.raises(BadAudio, match="truncated"):
        read_channels(f"{tmp_path}/half.ark:{place}", 0, 0.1)
    with pytest.raises(BadAudio, match="no audio at"):
        read_audio(f"{ark}:3")


def test_a_colon_in_a_file_s_name_is_no_archive(samples, tmp_path):
    soundfile.write(tmp_path / "a.wav:5", samples, 16000, format="WAV")
    np.testing.assert_array_equal(read_audio(f"{tmp_path}/a.wav:5")[0] * 32768, samples)


def test_stereo_is_mixed_silence_is_dropped_and_both_are_noted(
    samples, tmp_path, caplog
):
    caplog.set_level("INFO")
    half = samples // 2 * 2
    soundfile.write(tmp_path / "st.wav", np.stack([half, half * 0], 1), 8000)
    soundfile.write(tmp_path / "si.flac", np.zeros(8000, "int16"), 16000)
    directory = kaldi_directory(
        tmp_path / "kaldi", stereo=tmp_path / "st.wav", silent=tmp_path / "si.flac"
    )
    format_main([str(directory), str(tmp_path / "out"), "--fs", "8000"])
    table = read_table(tmp_path / "out" / "wav.scp")
    assert list(table) == ["stereo"]
    got = soundfile.read(table["stereo"], dtype="int16")[0]
    np.testing.assert_array_equal(got, half // 2)
    assert read_table(tmp_path / "out" / "dropped.txt") == {
        "silent": "silent: its 8000 samples are all the same in 16 bits"
    }
    assert "1 utterance(s) with 2 channels, mixed to one, first: stereo" in caplog.text
