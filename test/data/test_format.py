import shutil
import subprocess
import sys
from pathlib import Path

import kaldiio
import numpy as np
import pytest
import soundfile
from espnet2.train.dataset import kaldi_loader, sound_loader

import dldkit.data.format as format_module
from dldkit.bin.format_data import main
from dldkit.data.audio import read_audio, read_channels
from dldkit.data.datadir import read_table, write_table
from dldkit.data.format import Format, format_data
from dldkit.data.length import filter_data
from dldkit.data.speed import perturb_speed
from dldkit.errors import UserError


@pytest.fixture
def train(an4, tmp_path):
    """A copy to spoil: four real utterances, 16 kHz."""
    return shutil.copytree(an4 / "train_nodev", tmp_path / "train")


def scp(directory, name="wav.scp"):
    return read_table(directory / name)


def test_raw_keeps_the_samples_and_the_tables(train, tmp_path):
    format_data(train, tmp_path / "out", Format(fs=16000), nj=1)
    out = tmp_path / "out"
    wavs = sound_loader(str(out / "wav.scp"))
    assert sorted(wavs) == sorted(scp(train))
    for utt, path in scp(train).items():
        truth, _ = read_audio(path)
        np.testing.assert_array_equal(wavs[utt], truth)
        assert scp(out, "utt2num_samples")[utt] == str(len(truth))
        assert soundfile.info(scp(out)[utt]).subtype == "PCM_16"
    for name in ("text", "utt2spk", "spk2utt", "corpus_source"):
        assert (out / name).read_text() == (train / name).read_text()
    assert (out / "feats_type").read_text() == "raw\n"
    assert (out / "dropped.txt").read_text() == ""


@pytest.mark.parametrize("audio_format", ["flac.ark", "wav.ark"])
def test_arks_hold_the_same_samples(train, tmp_path, monkeypatch, audio_format):
    monkeypatch.setattr(format_module, "CHUNK", 3)
    wavs = {utt: scp(train)[utt] for utt in sorted(scp(train))}
    broken = list(wavs)[1]
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    write_table(train / "wav.scp", {**wavs, broken: str(tmp_path / "broken.wav")})
    out = tmp_path / "my out"
    format_data(train, out, Format(audio_format=audio_format))
    del wavs[broken]
    assert list(scp(out, "dropped.txt")) == [broken]
    arks = sorted((out / "data").rglob("*.*"))
    assert [ark.name for ark in arks] == ["wav.ark", "wav.scp"] * 2
    espnets = kaldi_loader(str(out / "wav.scp"), "float32")
    for utt, path in wavs.items():
        truth, fs = read_audio(path)
        np.testing.assert_array_equal(espnets[utt], truth)
        np.testing.assert_array_equal(read_audio(scp(out)[utt])[0], truth)
        assert scp(out, "utt2num_samples")[utt] == str(len(truth))
    filter_data(out, tmp_path / "kept", 0.1, 20.0, 16000)
    assert scp(tmp_path / "kept") == scp(out)


def test_an_ark_that_was_interrupted_is_written_anew(train, tmp_path):
    utts = format_module.read_utterances(train, sorted(scp(train)))
    form = Format(audio_format="flac.ark")
    format_module._write_arks(utts[:2], tmp_path, form)
    again = format_module._write_arks(utts, tmp_path, form)
    assert len(again.entries) == len(utts)
    for utt, entry in again.entries.items():
        truth, _ = read_audio(scp(train)[utt])
        np.testing.assert_array_equal(read_audio(entry)[0], truth)


def test_ids_that_look_alike_have_files_of_their_own(train, tmp_path):
    """With slashes, too long for a file's name, and of any script."""
    paths = list(scp(train).values())
    ids = ["s/1", "s_1", "s%2F1", "x" * 250, "x" * 251, "数字/一"]
    wavs = {utt: paths[i % len(paths)] for i, utt in enumerate(ids)}
    write_table(train / "wav.scp", wavs)
    write_table(train / "text", dict.fromkeys(ids, "ONE"))
    write_table(train / "utt2spk", dict.fromkeys(ids, "s"))
    (train / "spk2utt").unlink()
    format_data(train, tmp_path / "my out", Format())
    found = scp(tmp_path / "my out")
    assert len(set(found.values())) == len(ids)
    for utt, path in wavs.items():
        np.testing.assert_array_equal(read_audio(found[utt])[0], read_audio(path)[0])


def test_two_jobs_at_once_format_once(train, tmp_path):
    command = [sys.executable, "-m", "dldkit.bin.format_data"]
    command += [str(train), str(tmp_path / "out")]
    jobs = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    logs = [job.communicate(timeout=300)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    assert sum("formatting" in log for log in logs) == 1
    assert sorted(scp(tmp_path / "out")) == sorted(scp(train))


def test_resampling_is_done_and_logged(train, tmp_path, caplog):
    caplog.set_level("INFO")
    main([str(train), str(tmp_path / "out"), "--fs", "8000", "--audio_format", "wav"])
    assert "from 16000 Hz to 8000 Hz" in caplog.text
    for utt, path in scp(tmp_path / "out").items():
        info = soundfile.info(path)
        assert info.samplerate == 8000 and path.endswith(".wav")
        truth = soundfile.info(scp(train)[utt]).duration
        assert abs(info.duration - truth) < 1e-3


def test_speeds_and_segments(train, tmp_path):
    (utt, path), *_ = scp(train).items()
    speaker = read_table(train / "utt2spk")[utt]
    write_table(train / "wav.scp", {"rec": path})
    write_table(train / "segments", {utt: "rec 0.25 0.75"})
    write_table(train / "text", {utt: "HALF"})
    write_table(train / "utt2spk", {utt: speaker})
    (train / "spk2utt").unlink()
    perturb_speed(train, tmp_path / "train_sp", ["0.9", "1.0", "1.1"])
    format_data(tmp_path / "train_sp", tmp_path / "out", Format(fs=16000))
    sizes = {u: int(n) for u, n in scp(tmp_path / "out", "utt2num_samples").items()}
    assert sizes.keys() == {f"sp0.9-{utt}", utt, f"sp1.1-{utt}"}
    assert sizes[utt] == 8000
    assert abs(sizes[f"sp0.9-{utt}"] - 8000 / 0.9) <= 1
    assert abs(sizes[f"sp1.1-{utt}"] - 8000 / 1.1) <= 1
    part, _ = read_audio(scp(tmp_path / "out")[utt])
    np.testing.assert_array_equal(part, read_channels(path, 0.25, 0.75)[0][:, 0])


@pytest.fixture
def call(an4, tmp_path):
    """A directory with utterances a and b of two sides, which are returned, too."""
    path = next(iter(scp(an4 / "train_nodev").values()))
    left = soundfile.read(path, dtype="int16")[0]
    right = left[::-1]
    soundfile.write(tmp_path / "call.wav", np.stack([left, right], 1), 16000)
    directory = tmp_path / "call"
    directory.mkdir()
    write_table(directory / "text", {"a": "A", "b": "B"})
    write_table(directory / "utt2spk", {"a": "a", "b": "b"})
    write_table(directory / "wav.scp", {"call": tmp_path / "call.wav"})
    return directory, left, right


def formatted(directory, out):
    """What stage 3 makes of utterances a and b."""
    format_data(directory, out, Format())
    return [soundfile.read(scp(out)[utt], dtype="int16")[0] for utt in "ab"]


@pytest.mark.parametrize("names", ["AB", "01"])
def test_kaldi_s_end_and_channel_of_a_segment(call, tmp_path, names):
    directory, left, right = call
    lines = {"a": f"call 0.5 -1 {names[0]}", "b": f"call 0.25 -1.0 {names[1]}"}
    write_table(directory / "segments", lines)
    a, b = formatted(directory, tmp_path / "out")
    np.testing.assert_array_equal(a, left[8000:])
    np.testing.assert_array_equal(b, right[4000:])


def test_the_sides_of_recordings_are_kept_apart(call, tmp_path):
    directory, left, right = call
    path = tmp_path / "call.wav"
    soundfile.write(tmp_path / "b.wav", right, 16000)
    for second in (path, f"cat {tmp_path}/b.wav |"):  # a command may take it apart
        write_table(directory / "wav.scp", {"a": path, "b": second})
        sides = {"a": "call A", "b": "call B"}
        write_table(directory / "reco2file_and_channel", sides)
        out = tmp_path / str(len(str(second)))
        a, b = formatted(directory, out)
        np.testing.assert_array_equal(a, left)
        np.testing.assert_array_equal(b, right)
    perturb_speed(directory, tmp_path / "speeds", ["1.0", "1.1"])
    assert scp(tmp_path / "speeds", "reco2file_and_channel")["sp1.1-b"] == "call B"
    # one name for all says nothing
    write_table(directory / "reco2file_and_channel", {"a": "call A", "b": "call A"})
    assert (formatted(directory, tmp_path / "out")[0] != left).any()


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("call 0 1 C", "channel C: write A, B or a number from 0"),
        ("call 0 1 -1", "channel -1: write A, B or a number from 0"),
        ("call 0", "write `recording start end .channel.` in place of 'call 0'"),
        ("call 0 x", "could not convert .* 'x'"),
        ("call 0 inf", "'call 0 inf': write times in seconds; -1 is the end"),
        ("call nan 1", "'call nan 1': write times in seconds"),
    ],
)
def test_a_malformed_segment_is_refused(call, tmp_path, line, complaint):
    directory, *_ = call
    write_table(directory / "segments", {"a": "call 0 0.5", "b": line})
    with pytest.raises(UserError, match=f"segments, .* of b: {complaint}"):
        format_data(directory, tmp_path / "out", Format())


def test_bad_utterances_are_dropped_and_listed(train, tmp_path, caplog):
    good, empty, broken, silent = sorted(scp(train))
    wavs, text = scp(train), read_table(train / "text")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    wavs[empty] = str(tmp_path / "empty.wav")
    content = open(wavs[broken], "rb").read()
    (tmp_path / "broken.sph").write_bytes(content[: len(content) // 2])
    wavs[broken] = str(tmp_path / "broken.sph")
    text[silent] = ""
    write_table(train / "wav.scp", wavs)
    write_table(train / "text", text)
    format_data(train, tmp_path / "out", Format())
    assert list(scp(tmp_path / "out")) == [good]
    assert list(read_table(tmp_path / "out" / "text")) == [good]
    dropped = read_table(tmp_path / "out" / "dropped.txt")
    assert dropped.keys() == {empty, broken, silent}
    assert dropped[empty] == "no samples"
    assert dropped[broken].startswith("truncated")
    assert dropped[silent] == "empty transcript"
    said = read_table(tmp_path / "out" / "dropped_text")
    texts = read_table(train / "text", allow_empty=True)
    assert said == {utt: texts[utt] for utt in (empty, broken)}
    assert "dropped 3 of 4" in caplog.text


def test_what_is_shorter_than_a_window_has_no_energies(train, tmp_path):
    wavs = scp(train)
    short, enough, *_ = sorted(wavs)
    for utt, samples in ((short, 399), (enough, 400)):
        wavs[utt] = tmp_path / f"{utt}.wav"
        noise = np.random.default_rng(0).uniform(-0.5, 0.5, samples)
        soundfile.write(wavs[utt], noise, 16000)
    write_table(train / "wav.scp", wavs)
    format_data(train, tmp_path / "out", Format("fbank"))
    made = (tmp_path / "out" / "feats.scp").stat().st_mtime_ns
    format_data(train, tmp_path / "out", Format("fbank"))
    assert (tmp_path / "out" / "feats.scp").stat().st_mtime_ns == made
    dropped = scp(tmp_path / "out", "dropped.txt")
    assert dropped == {short: "shorter than a window of 0.025 s"}
    assert scp(tmp_path / "out", "feats.scp").keys() == wavs.keys() - {short}


def test_what_would_be_written_as_silence_is_dropped(train, tmp_path):
    utts = sorted(scp(train))
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 44100)
    high = 1e-3 * np.sin(2 * np.pi * 20000 / 44100 * np.arange(44100))
    silent = {  # once it is mixed, rounded or at the new rate
        utts[0]: (np.stack([noise, -noise], 1), 16000),
        utts[1]: (noise * 1e-9, 16000),
        utts[2]: (high * np.hanning(44100), 44100),
    }
    wavs = scp(train)
    for utt, (samples, fs) in silent.items():
        wavs[utt] = tmp_path / f"{utt}.wav"
        soundfile.write(wavs[utt], samples, fs, "FLOAT")
    write_table(train / "wav.scp", wavs)
    format_data(train, tmp_path / "out", Format())
    assert list(scp(tmp_path / "out")) == utts[3:]
    dropped = scp(tmp_path / "out", "dropped.txt")
    assert dropped.keys() == silent.keys()
    assert all(reason.startswith("silent: its ") for reason in dropped.values())


def test_nothing_usable_is_an_error_that_can_be_mended(train, tmp_path, capsys):
    wavs = scp(train)
    write_table(train / "wav.scp", {utt: f"/nowhere/{utt}.wav" for utt in wavs})
    with pytest.raises(SystemExit):
        main([str(train), str(tmp_path / "out")])
    assert "error: no utterance is left" in capsys.readouterr().err
    # The files come back (a disk was not mounted); the tables are what they were.
    links = {utt: tmp_path / f"{utt}.sph" for utt in wavs}
    write_table(train / "wav.scp", links)
    with pytest.raises(UserError):
        format_data(train, tmp_path / "out", Format())
    for utt, link in links.items():
        link.symlink_to(wavs[utt])
    format_data(train, tmp_path / "out", Format())
    assert len(scp(tmp_path / "out")) == 4


def test_inconsistent_and_unsupported_input_is_refused(train, tmp_path):
    table = read_table(train / "text")
    write_table(train / "text", {**table, "x": "X"})
    with pytest.raises(UserError, match="wav.scp lacks 1 key.*x"):
        format_data(train, tmp_path / "out", Format())
    write_table(train / "text", table)
    with pytest.raises(UserError, match="holds other files"):
        format_data(train, train, Format())


def test_finished_is_kept_and_changed_input_is_done_again(train, tmp_path):
    out = tmp_path / "out"
    format_data(train, out, Format())
    utt = sorted(scp(out))[0]
    before = (out / "wav.scp").stat().st_mtime_ns
    format_data(train, out, Format())
    assert (out / "wav.scp").stat().st_mtime_ns == before
    for name in ("wav.scp", "text", "utt2spk"):
        table = read_table(train / name)
        del table[utt]
        write_table(train / name, table)
    (train / "spk2utt").unlink()
    format_data(train, out, Format())
    assert utt not in scp(out) and len(scp(out)) == 3


@pytest.mark.parametrize("feats_type, name", [("raw", "wav"), ("fbank", "feats")])
def test_other_audio_has_other_paths_and_the_same_has_the_same(
    train, tmp_path, feats_type, name
):
    """What is made of them is done again when it has to be, and not otherwise."""
    out = tmp_path / "out"

    def paths(**form):
        format_data(train, out, Format(feats_type, **form))
        found = scp(out, f"{name}.scp")
        assert all(Path(path.partition(":")[0]).is_file() for path in found.values())
        assert [path.name for path in (out / "data").iterdir()] == [
            Path(next(iter(found.values()))).parts[-3]
        ]
        return found

    before = paths()
    text, wavs = read_table(train / "text"), scp(train)
    utt = sorted(wavs)[0]
    write_table(train / "text", {**text, utt: "OTHER WORDS"})
    assert paths() == before
    shutil.copy(wavs[utt], tmp_path / "moved.sph")
    write_table(train / "wav.scp", {**wavs, utt: tmp_path / "moved.sph"})
    assert paths() == before
    assert not set(paths(fs=8000).values()) & set(before.values())
    write_table(train / "wav.scp", {**wavs, utt: wavs[sorted(wavs)[1]]})
    assert not set(paths().values()) & set(before.values())


@pytest.mark.parametrize("feats_type", ["raw", "extracted"])
def test_what_was_mended_after_the_end_is_picked_up(
    train, tmp_path, monkeypatch, feats_type
):
    out, name = tmp_path / "out", "wav.scp"
    if feats_type == "extracted":
        name = "feats.scp"
        (train / "wav.scp").unlink()
        feats = {utt: np.ones((9, 4)) for utt in read_table(train / "text")}
        kaldiio.save_ark(str(tmp_path / "a.ark"), feats, scp=str(train / name))
    table = scp(train, name)
    broken, absent, *_ = sorted(table)
    files = {broken: tmp_path / "broken", absent: tmp_path / "absent"}
    files[broken].write_bytes(b"RIFF")
    write_table(train / name, {**table, **files})
    format_data(train, out, Format(feats_type))
    before = (out / name).stat().st_mtime_ns
    files[broken].touch()
    format_data(train, out, Format(feats_type))
    assert (out / name).stat().st_mtime_ns == before

    found, _, place = table[broken].partition(":")
    content = open(found, "rb").read()[int(place or 0) :]
    files[broken].write_bytes(content)
    with monkeypatch.context() as context:  # where it is interrupted, it goes on
        context.setattr(format_module, "_write_tables", None)
        with pytest.raises(TypeError):
            format_data(train, out, Format(feats_type))
    format_data(train, out, Format(feats_type))
    assert scp(out, "dropped.txt").keys() == {absent}
    files[absent].write_bytes(content)
    format_data(train, out, Format(feats_type))
    assert scp(out, name).keys() == table.keys()
    assert not scp(out, "dropped.txt") and not (out / "dropped_text").exists()


@pytest.mark.parametrize("feats_type", ["raw", "fbank"])
def test_an_interrupted_run_goes_on(train, tmp_path, monkeypatch, feats_type):
    monkeypatch.setattr(format_module, "CHUNK", 1)
    read, calls = format_module.read_channels, []

    def dying(path, *times):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(path)
        return read(path, *times)

    monkeypatch.setattr(format_module, "read_channels", dying)
    with pytest.raises(KeyboardInterrupt):
        format_data(train, tmp_path / "out", Format(feats_type))
    resumed = []
    monkeypatch.setattr(
        format_module, "read_channels", lambda *a: resumed.append(a[0]) or read(*a)
    )
    format_data(train, tmp_path / "out", Format(feats_type))
    assert len(resumed) == 2 and not set(resumed) & set(calls)
    name = "wav.scp" if feats_type == "raw" else "feats.scp"
    assert scp(tmp_path / "out", name).keys() == scp(train).keys()


@pytest.mark.integration
def test_two_processes_make_what_one_makes(train, tmp_path, monkeypatch):
    monkeypatch.setattr(format_module, "CHUNK", 1)
    for nj in (1, 2):
        format_data(train, tmp_path / f"nj{nj}", Format("fbank"), nj=nj)
    one, two = (kaldiio.load_scp(str(tmp_path / f"nj{n}/feats.scp")) for n in (1, 2))
    assert sorted(one) == sorted(two)
    for utt in one:
        np.testing.assert_array_equal(one[utt], two[utt])


def kaldi_log_mel(samples, fs, n_mels):
    """Kaldi's definition, written out for one frame at a time (snip_edges false)."""
    length, shift = fs * 25 // 1000, fs * 10 // 1000
    size = 1 << (length - 1).bit_length()
    window = np.hanning(length) ** 0.85  # Povey's
    mel = lambda f: 1127 * np.log1p(np.asarray(f) / 700)  # noqa: E731
    edges = np.linspace(mel(20), mel(fs / 2 - 400), n_mels + 2)
    bins = mel(np.arange(size // 2 + 1) * fs / size)
    up = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    down = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    bank = np.maximum(0, np.minimum(up, down))
    frames = []
    for index in range(round(len(samples) / shift)):
        start = index * shift + shift // 2 - length // 2
        places = np.arange(start, start + length)
        places = np.where(places < 0, -places - 1, places)
        places = np.where(places >= len(samples), 2 * len(samples) - 1 - places, places)
        frame = samples[places].astype(np.float64)
        frame -= frame.mean()
        frame -= 0.97 * np.concatenate([frame[:1], frame[:-1]])
        power = np.abs(np.fft.rfft(frame * window, size)) ** 2
        frames.append(np.log(np.maximum(bank @ power, np.finfo(np.float32).eps)))
    return np.array(frames)


@pytest.mark.parametrize("fs, n_mels", [(16000, 80), (8000, 40)])
def test_fbank_is_kaldis_and_reads_back(train, tmp_path, fs, n_mels):
    out = tmp_path / "out"
    main(f"{train} {out} --feats_type fbank --fs {fs} --n_mels {n_mels} --nj 2".split())
    assert (out / "feats_dim").read_text() == f"{n_mels}\n"
    assert (out / "feats_type").read_text() == "fbank\n"
    by_kaldiio = kaldiio.load_scp(str(out / "feats.scp"))
    by_espnet = kaldi_loader(str(out / "feats.scp"))
    for utt, path in scp(train).items():
        samples = format_module.convert(*read_audio(path), fs)
        truth = kaldi_log_mel(samples * 32768, fs, n_mels)
        assert by_kaldiio[utt].dtype == np.float32
        np.testing.assert_array_equal(by_kaldiio[utt], by_espnet[utt])
        np.testing.assert_allclose(by_kaldiio[utt], truth, atol=0.05)
        assert scp(out, "feats_shape")[utt] == f"{len(truth)},{n_mels}"


class TestExtracted:
    DIM = 7

    @pytest.fixture
    def extracted(self, train, tmp_path):
        """The directory of a user's own features: no audio at all."""
        rng = np.random.default_rng(0)
        utts = sorted(scp(train))
        self.feats = {
            utt: rng.normal(size=(20 + place, self.DIM)).astype(np.float32)
            for place, utt in enumerate(utts)
        }
        self.write(tmp_path, train)
        (train / "wav.scp").unlink()
        return train

    def write(self, tmp_path, directory):
        ark = tmp_path / "own.ark"
        with kaldiio.WriteHelper(f"ark,scp:{ark},{directory}/feats.scp") as writer:
            for utt, matrix in self.feats.items():
                writer(utt, matrix)

    def test_any_dimension_is_taken_as_it_is(self, extracted, tmp_path):
        out = tmp_path / "out"
        main([str(extracted), str(out), "--feats_type", "extracted"])
        assert (out / "feats_dim").read_text() == "7\n"
        assert scp(out, "feats.scp") == scp(extracted, "feats.scp")
        loaded = kaldi_loader(str(out / "feats.scp"))
        for utt, truth in self.feats.items():
            np.testing.assert_array_equal(loaded[utt], truth)
            assert scp(out, "feats_shape")[utt] == f"{len(truth)},7"

    def test_bad_features_are_dropped(self, extracted, tmp_path):
        good, empty, infinite, lost = sorted(self.feats)
        self.feats[empty] = np.zeros((0, self.DIM), dtype=np.float32)
        self.feats[infinite][3, 2] = np.inf
        self.write(tmp_path, extracted)
        table = scp(extracted, "feats.scp")
        write_table(extracted / "feats.scp", {**table, lost: "/nowhere/x.ark:5"})
        format_data(extracted, tmp_path / "out", Format("extracted"))
        assert list(scp(tmp_path / "out", "feats.scp")) == [good]
        dropped = read_table(tmp_path / "out" / "dropped.txt")
        assert dropped.keys() == {empty, infinite, lost}

    def test_two_dimensions_are_refused(self, extracted, tmp_path):
        utt = sorted(self.feats)[2]
        self.feats[utt] = np.ones((5, 9), dtype=np.float32)
        self.write(tmp_path, extracted)
        with pytest.raises(UserError, match=f"7 .*9 .{utt}"):
            format_data(extracted, tmp_path / "out", Format("extracted"))

    @pytest.mark.parametrize("speed", ["abc", "0.9", "10"])
    def test_other_speeds_are_refused(self, extracted, tmp_path, speed):
        utt = max(self.feats)
        speeds = {**dict.fromkeys(self.feats, "1.0"), utt: speed}
        write_table(extracted / "utt2speed", speeds)
        with pytest.raises(UserError, match=f"utt2speed of {utt} is {speed}, and"):
            format_data(extracted, tmp_path / "out", Format("extracted"))
        write_table(extracted / "utt2speed", {**speeds, utt: "1"})
        format_data(extracted, tmp_path / "out", Format("extracted"))

    def test_missing_features_are_refused(self, train, tmp_path):
        with pytest.raises(UserError, match="feats.scp does not exist"):
            format_data(train, tmp_path / "out", Format("extracted"))
        with pytest.raises(UserError, match="wav.scp"):
            (train / "wav.scp").rename(train / "feats.scp")
            format_data(train, tmp_path / "out", Format("fbank"))
