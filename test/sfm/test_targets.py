import shutil
from collections import namedtuple

import kaldiio
import numpy as np
import pytest
import soundfile
import torch
import yaml
from espnet2.train.dataset import ESPnetDataset
from transformers import AutoFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import dldkit
from dldkit.bin.sfm_collect_targets import main
from dldkit.data import frames
from dldkit.errors import UserError
from dldkit.sfm import targets
from dldkit.sfm.data import CropCollateFn
from dldkit.sfm.targets import collect_targets
from dldkit.sfm.teacher.live import LiveTeacher
from dldkit.sfm.teacher.opening import open_teacher, teacher_info
from dldkit.tasks.sfm import SFMDistillTask

# samples beyond a multiple of 320: HuBERT's CNN needs 80 of them for a last frame
LENGTHS = dict(a=9600, b=9601, c=7279, d=7280, e=8000, x=9919, y=6401)


@pytest.fixture
def data_dirs(tmp_path):
    """Five utterances for training and two for validation, at 16 kHz."""
    rng = np.random.default_rng(0)
    for name, utts in (("train", "abcde"), ("dev", "xy")):
        directory = tmp_path / name
        directory.mkdir()
        for utt in utts:
            samples = 0.1 * rng.standard_normal(LENGTHS[utt])
            soundfile.write(directory / f"{utt}.wav", samples, 16000)
        scp = [f"{utt} {directory / utt}.wav\n" for utt in utts]
        (directory / "wav.scp").write_text("".join(scp))
        lengths = [f"{utt} {LENGTHS[utt]}\n" for utt in utts]
        (directory / "utt2num_samples").write_text("".join(lengths))
    return [tmp_path / "train", tmp_path / "dev"]


@pytest.fixture
def batch(data_dirs):
    """Return a function that pads utterances; with the targets that ESPnet reads."""
    dldkit.register()

    def padded(*utts, cache=None):
        dirs = [data_dirs[utt not in "abcde"] for utt in utts]
        data = []
        for utt, directory in zip(utts, dirs):
            speech, _ = soundfile.read(directory / f"{utt}.wav", dtype="float32")
            data.append((utt, {"speech": speech}))
        if cache is not None:
            entry = (f"{cache}/targets.scp", "targets", "numpy_ark")
            stored = ESPnetDataset([entry])
            for utt, values in data:
                values.update(stored[utt][1])
        _, tensors = CropCollateFn(train=True, crop=False)(data)
        del tensors["lengths_on_host"]
        return dict(tensors, utt_ids=list(utts))

    return padded


@pytest.fixture(params=["hubert_stable", "wavlm", "whisper"])
def any_teacher(request, wave_teacher, whisper_teacher):
    """The directory of a teacher."""
    if request.param == "whisper":
        return whisper_teacher(WhisperEncoder)[1]
    return wave_teacher(request.param)[1]


@pytest.fixture
def hubert(wave_teacher):
    return wave_teacher("hubert")[1]


@pytest.fixture
def parts(monkeypatch):
    """Make parts of two utterances, in this process; remember how many there were."""
    counts = []

    def parallel_map(fn, items, *_):
        counts.append(len(items))
        return [fn(item) for item in items]

    monkeypatch.setattr(frames, "parallel_map", parallel_map)
    monkeypatch.setattr(frames, "PART", 2)
    targets._open.cache_clear()
    return counts


def read(directory):
    return dict(kaldiio.load_scp(str(directory / "targets.scp")).items())


def stamps(directory):
    return {f.name: f.stat().st_mtime_ns for f in directory.iterdir()}


def test_whole_utterances_are_those_of_the_live_teacher(
    any_teacher, data_dirs, batch, tmp_path
):
    collect_targets(any_teacher, [1, 2, 3], data_dirs, tmp_path / "cache")
    stored = read(tmp_path / "cache")
    assert sorted(stored) == sorted(LENGTHS)
    live = open_teacher(any_teacher, [3, 1])
    cached = open_teacher(tmp_path / "cache", [3, 1])
    for utt in LENGTHS:
        expected, lengths = live(**batch(utt))
        assert stored[utt].dtype == np.float16
        assert stored[utt].shape == (int(lengths), 3, 16)
        outputs, output_lengths = cached(**batch(utt, cache=tmp_path / "cache"))
        assert abs(output_lengths - lengths).max() <= 1
        n = min(int(output_lengths), int(lengths))
        for output, states in zip(outputs, expected):
            assert output.dtype == torch.float32
            assert torch.allclose(output[:, :n], states[:, :n], rtol=1e-3, atol=1e-3)


def test_frames_differ_by_one_at_most_from_those_of_a_cnn(
    any_teacher, wave_teacher, data_dirs, batch, tmp_path
):
    student, _ = wave_teacher("data2vec_audio")
    collect_targets(any_teacher, [1], data_dirs, tmp_path / "cache")
    for path, cache in ((any_teacher, None), (tmp_path / "cache", tmp_path / "cache")):
        teacher = open_teacher(path, [1])
        for utt in LENGTHS:
            whole = batch(utt, cache=cache)
            _, lengths = teacher(**whole)
            cnn = student._get_feat_extract_output_lengths(whole["speech_lengths"])
            assert 0 <= int(lengths) - int(cnn) <= 1


def test_describes_the_teacher(hubert, data_dirs, tmp_path):
    collect_targets(hubert, [3, 1, 1], data_dirs, tmp_path / "cache")
    info = teacher_info(tmp_path / "cache")
    assert info.layers == [1, 3]
    info.layers = None
    assert info == teacher_info(hubert)
    description = yaml.safe_load((tmp_path / "cache" / "teacher.yaml").read_text())
    assert description["teacher"] == str(hubert)


@pytest.mark.integration
def test_jobs_write_what_one_would(hubert, data_dirs, tmp_path, monkeypatch):
    monkeypatch.setattr(frames, "PART", 2)
    for nj in (1, 2):
        collect_targets(hubert, [2], data_dirs, tmp_path / f"{nj}", nj=nj)
    one, two = read(tmp_path / "1"), read(tmp_path / "2")
    assert sorted(one) == sorted(two) == sorted(LENGTHS)
    assert all(np.array_equal(one[utt], two[utt]) for utt in one)


def test_a_finished_collection_is_kept(hubert, data_dirs, tmp_path, parts):
    collect_targets(hubert, [2], data_dirs, tmp_path / "cache")
    before = stamps(tmp_path / "cache")
    collect_targets(hubert, [2], data_dirs, tmp_path / "cache", nj=3)
    assert stamps(tmp_path / "cache") == before
    assert parts == [4]


def test_a_touched_file_keeps_it(hubert, data_dirs, tmp_path, parts):
    collect_targets(hubert, [2], data_dirs, tmp_path / "cache")
    (data_dirs[0] / "wav.scp").touch()
    collect_targets(hubert, [2], data_dirs, tmp_path / "cache")
    assert parts == [4]


def test_training_is_refused_without_all_targets(hubert, data_dirs, tmp_path, parts):
    cache = tmp_path / "cache"
    collect_targets(hubert, [2], data_dirs[1:], cache)
    train, dev = ([[str(d / "wav.scp"), "speech", "sound"]] for d in data_dirs)
    args = SFMDistillTask.get_parser().parse_args([])
    args.model_conf = dict(teacher=str(cache))
    args.train_data_path_and_name_and_type = train
    args.valid_data_path_and_name_and_type = dev
    with pytest.raises(UserError, match="5 of 7 .* no targets .* is a: collect"):
        SFMDistillTask.check_data(args)
    args.train_data_path_and_name_and_type = dev
    SFMDistillTask.check_data(args)
    entry = (str(cache / "targets.scp"), "targets", "numpy_ark")
    for data in (train, dev):
        assert data is train or list(data[1]) == list(entry)
    SFMDistillTask.check_data(args)
    assert len(dev) == 2


def test_too_short_utterances_are_left_out(hubert, data_dirs, tmp_path, caplog):
    soundfile.write(data_dirs[0] / "c.wav", np.zeros(639), 16000)
    collect_targets(hubert, [1], data_dirs, tmp_path / "cache")
    assert sorted(read(tmp_path / "cache")) == sorted(set(LENGTHS) - {"c"})
    assert (tmp_path / "cache" / "too_short").read_text() == "c\n"
    assert "c is too short: nothing is stored" in caplog.text


def test_batches_equal_one_utterance_at_a_time(
    any_teacher, data_dirs, tmp_path, monkeypatch
):
    for utt in "abd":
        sound, _ = soundfile.read(data_dirs[0] / f"{utt}.wav")
        soundfile.write(data_dirs[0] / f"{utt}.wav", sound[:7000], 16000)
    call, sizes = LiveTeacher.__call__, []

    def counted(self, speech, *args):
        sizes.append(len(speech))
        return call(self, speech, *args)

    monkeypatch.setattr(LiveTeacher, "__call__", counted)
    collect_targets(any_teacher, [3], data_dirs, tmp_path / "batches")
    assert sorted(sizes) == [1, 1, 1, 1, 3]
    monkeypatch.setattr(frames, "BATCH", 1)
    collect_targets(any_teacher, [3], data_dirs, tmp_path / "single")
    batches, single = read(tmp_path / "batches"), read(tmp_path / "single")
    for utt in LENGTHS:
        assert np.allclose(batches[utt], single[utt], rtol=1e-3, atol=1e-3)


def test_a_gpu_is_looked_for_where_the_work_is_done(
    hubert, data_dirs, tmp_path, parts, monkeypatch
):
    """A login node has none: the jobs that it submits find out."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for where, jobs in (({}, 0), ({"parallel_config": "slurm.yaml"}, 1)):
        with pytest.raises(UserError, match="ngpu 1: no GPU"):
            collect_targets(hubert, [1], data_dirs, tmp_path / "t", ngpu=1, **where)
        assert len(parts) == jobs


def test_an_interrupted_collection_continues(
    hubert, data_dirs, tmp_path, parts, monkeypatch
):
    broken = tmp_path / "broken"
    collect_targets(hubert, [2], data_dirs, tmp_path / "unbroken")
    read_one, done = targets._read, []

    def killed(*args):
        if len(done) == 3:  # in the middle of a part
            raise KeyboardInterrupt
        done.append(args)
        return read_one(*args)

    monkeypatch.setattr(targets, "_read", killed)
    with pytest.raises(KeyboardInterrupt):
        collect_targets(hubert, [2], data_dirs, broken)
    kept = {k: v for k, v in stamps(broken).items() if k.startswith("0-0")}
    assert len(kept) == 3
    with pytest.raises(UserError, match="no teacher"):
        open_teacher(broken, [2])
    monkeypatch.setattr(targets, "_read", read_one)
    collect_targets(hubert, [2], data_dirs, broken)
    assert parts == [4, 4, 3]
    assert kept.items() <= stamps(broken).items()
    one, two = read(tmp_path / "unbroken"), read(broken)
    assert sorted(one) == sorted(two) == sorted(LENGTHS)
    assert all(np.array_equal(one[utt], two[utt]) for utt in one)


def test_a_finished_collection_is_not_cleared_for_another_request(
    hubert, wave_teacher, data_dirs, tmp_path, parts
):
    cache = tmp_path / "cache"
    collect_targets(hubert, [2], data_dirs[:1], cache)
    before = stamps(cache)
    for layers, dirs, dtype, changed in (
        ([2, 3], data_dirs[:1], "float16", "layers"),
        ([2], data_dirs, "float16", "1 wav.scp"),
        ([2], data_dirs[1:], "float16", "0 wav.scp"),
        ([2], data_dirs[:1], "int8", "dtype"),
    ):
        with pytest.raises(UserError, match=f"other input: .*{changed}.* Remove it"):
            collect_targets(hubert, layers, dirs, cache, dtype=dtype)
    wave_teacher("hubert", seed=1)  # in the same place
    targets._open.cache_clear()  # a new command knows nothing
    with pytest.raises(UserError, match="begun with other input: teacher"):
        collect_targets(hubert, [2], data_dirs[:1], cache)
    assert stamps(cache) == before


def test_an_unfinished_collection_gives_way_to_another_request(
    hubert, wave_teacher, data_dirs, tmp_path, monkeypatch
):
    cache = tmp_path / "cache"
    with monkeypatch.context() as context:
        context.setattr(targets.WaveTeacher, "save_cnn", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            collect_targets(hubert, [2], data_dirs[1:], cache)
    before = read(cache)["x"]
    wave_teacher("hubert", seed=1)
    targets._open.cache_clear()
    collect_targets(hubert, [2, 3], data_dirs, cache)
    assert teacher_info(cache).layers == [2, 3]
    assert sorted(read(cache)) == sorted(LENGTHS)
    assert not np.allclose(read(cache)["x"][:, 0], before[:, 0], atol=1e-2)


@pytest.mark.parametrize("tables", ["utt2num_samples", "wav.scp alone"])
def test_estimates_the_size_before_it_writes(
    tables, hubert, data_dirs, tmp_path, caplog, monkeypatch
):
    if tables != "utt2num_samples":
        for directory in data_dirs:
            (directory / "utt2num_samples").unlink()
    cache = tmp_path / "cache"
    size = sum(LENGTHS.values()) // 320 * 2 * 16 * 2
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: usage(0, 0, size - 1))
        with pytest.raises(UserError, match="2 layer.* of 16 values: .* has .* left"):
            collect_targets(hubert, [1, 2], data_dirs, cache)
    assert not list(cache.glob("*.ark"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, size))
    with caplog.at_level("INFO"):
        collect_targets(hubert, [1, 2], data_dirs, cache)
    assert "2 layer(s) of 16 values: 11.31 KiB" in caplog.text
    stored = sum(array.nbytes for array in read(cache).values())
    assert 0.9 * size < stored <= size
    # with 8 channels of the CNN, all of it is known before anything is written
    both = size + sum(LENGTHS.values()) // 320 * 8 * 2
    other = tmp_path / "other"
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: usage(0, 0, both - 1))
        with pytest.raises(UserError, match="values: .*; .* CNN features of 8 values"):
            collect_targets(hubert, [1, 2], data_dirs, other, features=True)
    assert not list(other.rglob("*.ark"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, both))
    collect_targets(hubert, [1, 2], data_dirs, other, features=True)
    assert list((other / "features").glob("*.ark"))


def test_eight_bits_take_half_the_size(hubert, data_dirs, batch, tmp_path):
    """With the scale of each dimension, an outlier costs the others nothing."""
    collect_targets(hubert, [1, 3], data_dirs, tmp_path / "whole")
    collect_targets(hubert, [1, 3], data_dirs, tmp_path / "eight", dtype="int8")
    for utt in LENGTHS:
        whole, eight = (read(tmp_path / name)[utt] for name in ("whole", "eight"))
        assert eight.dtype == np.int8 and eight.nbytes < 0.6 * whole.nbytes
        states = [
            open_teacher(tmp_path / name, [1, 3])(**batch(utt, cache=tmp_path / name))
            for name in ("whole", "eight")
        ]
        for exact, rounded in zip(states[0][0], states[1][0]):
            limit = exact.abs().amax(1) / 127
            assert ((exact - rounded).abs().amax(1) <= limit).all()
            assert 0 < (exact - rounded).square().mean() / exact.var() < 1e-3
    with pytest.raises(UserError, match="unknown dtype 'int4': choose float16 or"):
        collect_targets(hubert, [1], data_dirs, tmp_path / "four", dtype="int4")


@pytest.mark.parametrize("family", ["hubert", "hubert_stable", "wavlm"])
def test_features_are_those_of_the_teachers_own_cnn(
    family, wave_teacher, data_dirs, tmp_path
):
    """As transformers' own extractor and CNN give them; beside them lies the CNN."""
    model, directory = wave_teacher(family)
    collect_targets(directory, [1], data_dirs, tmp_path / "cache", features=True)
    extract = AutoFeatureExtractor.from_pretrained(directory)
    stored = dict(kaldiio.load_scp(f"{tmp_path}/cache/features/features.scp").items())
    assert sorted(stored) == sorted(LENGTHS)
    for utt in LENGTHS:
        file = data_dirs[utt not in "abcde"] / f"{utt}.wav"
        speech, rate = soundfile.read(file, dtype="float32")
        heard = extract(speech, sampling_rate=rate, return_tensors="pt").input_values
        with torch.no_grad():
            expected = model.feature_extractor(heard)[0].T.numpy()
        assert stored[utt].dtype == np.float16
        assert len(stored[utt]) == len(read(tmp_path / "cache")[utt])
        assert np.allclose(stored[utt], expected, rtol=1e-3, atol=1e-3)
    ours = open_teacher(tmp_path / "cache", [1]).model.feature_extractor.state_dict()
    theirs = model.feature_extractor.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_features_join_targets_that_are_there(hubert, data_dirs, tmp_path, parts):
    cache = tmp_path / "cache"
    collect_targets(hubert, [2], data_dirs, cache)
    before = {k: v for k, v in stamps(cache).items() if k.endswith("ark")}
    collect_targets(hubert, [2], data_dirs, cache, features=True)
    collect_targets(hubert, [2], data_dirs, cache, features=True)
    assert parts == [4, 4]
    assert {k: v for k, v in stamps(cache).items() if k.endswith("ark")} == before


def test_features_need_a_cnn(whisper_teacher, data_dirs, tmp_path):
    whisper = whisper_teacher(WhisperEncoder)[1]
    with pytest.raises(UserError, match="has no CNN on waveforms .*: leave --features"):
        collect_targets(whisper, [1], data_dirs, tmp_path / "cache", features=True)
    assert not (tmp_path / "cache").exists()


def test_layers_that_are_left_open_are_thirds(hubert, data_dirs, tmp_path):
    collect_targets(hubert, None, data_dirs, tmp_path / "cache")
    assert teacher_info(tmp_path / "cache").layers == [1, 2, 3]


def test_refuses_what_was_not_collected(hubert, data_dirs, batch, tmp_path):
    cache = tmp_path / "cache"
    collect_targets(hubert, [1, 3], data_dirs[:1], cache)
    with pytest.raises(UserError, match=r"the layers \[1, 3\], not of \[0, 2\]"):
        open_teacher(cache, [1, 2, 0])
    with pytest.raises(UserError, match="no targets of .*cache: only training reads"):
        open_teacher(cache, [1])(**batch("a"))
    with pytest.raises(UserError, match="holds cached targets already"):
        collect_targets(cache, [1], data_dirs, tmp_path / "other")


def test_refuses_other_peoples_directories(hubert, data_dirs):
    with pytest.raises(UserError, match="dev holds other files"):
        collect_targets(hubert, [1], data_dirs, data_dirs[1])
    assert (data_dirs[1] / "x.wav").is_file()


def test_refuses_audio_that_can_not_be_taken(hubert, data_dirs, tmp_path):
    def refused(match, dirs=data_dirs):
        targets._open.cache_clear()
        with pytest.raises(UserError, match=match):
            collect_targets(hubert, [1], dirs, tmp_path / "cache")

    refused(
        "2 utterance.* in two of the data directories, first: x", [data_dirs[1]] * 2
    )
    refused("nowhere/wav.scp does not exist", [tmp_path / "nowhere"])
    soundfile.write(data_dirs[0] / "c.wav", np.zeros(8000), 8000)
    refused("utterance c has 8000 Hz, the teacher takes 16000 Hz: format")
    (data_dirs[0] / "c.wav").unlink()
    refused("utterance c: no such file")
    (data_dirs[0] / "utt2num_samples").unlink()
    refused("utterance c: .*c.wav")


def test_refuses_other_frame_rates(wave_teacher, data_dirs, tmp_path):
    _, slow = wave_teacher("wavlm", conv_stride=[5, 2, 2, 2, 2, 2, 4])
    with pytest.raises(UserError, match="only frames of 320 samples can be cached"):
        collect_targets(slow, [1], data_dirs, tmp_path / "cache")


def test_refuses_values_beyond_float16(wave_teacher, data_dirs, tmp_path):
    model, directory = wave_teacher("hubert")
    model.encoder.layers[0].final_layer_norm.weight.data.mul_(1e6)
    model.save_pretrained(directory)
    with pytest.raises(UserError, match="utterance a: .* beyond what float16 holds"):
        collect_targets(directory, [1], data_dirs, tmp_path / "cache")


def test_command(hubert, data_dirs, tmp_path, capsys):
    cache = tmp_path / "cache"
    command = ["--teacher", str(hubert), "--output_dir", str(cache)]
    command += ["--data_dirs", *map(str, data_dirs), "--layers"]
    main([*command, "2 3"])
    assert sorted(read(cache)) == sorted(LENGTHS)
    assert teacher_info(cache).layers == [2, 3]
    with pytest.raises(SystemExit) as stop:
        main([*command, "4"])
    assert stop.value.code == 1
    assert "error: the teacher" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([*command, "two"])
    assert stop.value.code == 2
