"""Statistics of training data: what ESPnet collects, from a part of the audio."""

import kaldiio
import numpy as np
import pytest
import yaml
from espnet2.layers.global_mvn import GlobalMVN

from dldkit.bin import asr_train, collect_stats
from dldkit.train import statistics

UTTS = dict(train=9, valid=3)
SHAPES = "speech_shape", "text_shape"


@pytest.fixture
def collect(corpus, tmp_path):
    """Return a function that runs the command, and returns where the results are."""

    def run(*words, name="stats", **changes):
        options = corpus.training(tmp_path / name, **changes)
        collect_stats.main(["asr", *map(str, words), *options])
        return tmp_path / name

    return run


def speech_from(options, directory, kind):
    """Change a training's config: `directory/{train,valid}` hold the speech."""
    config = yaml.safe_load(open(options[1]))
    for mode in UTTS:
        entries = config[f"{mode}_data_path_and_name_and_type"]
        name = "feats.scp" if kind == "kaldi_ark" else "wav.scp"
        entries[0] = [f"{directory}/{mode}/{name}", "speech", kind]
    with open(options[1], "w") as file:
        yaml.safe_dump(config, file)
    return options


@pytest.fixture
def espnets(corpus, tmp_path):
    """The statistics of ESPnet's own command, in one process."""
    asr_train.main([*corpus.training(tmp_path / "espnet"), "--collect_stats", "true"])
    return tmp_path / "espnet"


def test_few_utterances_give_espnets_own_files(collect, espnets):
    ours = collect()
    for mode, utts in UTTS.items():
        for name in (*SHAPES, "feats_stats.npz"):
            file = f"{mode}/{name}"
            assert (ours / file).read_bytes() == (espnets / file).read_bytes()
        lines = (ours / mode / "text_shape").read_text().splitlines()
        of_bins = (ours / mode / "text_shape.word").read_text().splitlines()
        assert of_bins == [f"{line},13" for line in lines] and len(lines) == utts


@pytest.mark.integration
def test_jobs_of_parts_give_espnets_mean_and_variance(collect, espnets, monkeypatch):
    """Of parts of one batch; other batches, and so another padding, would differ."""
    monkeypatch.setattr(statistics, "PART", 4)
    ours = collect("--nj", 2)
    for mode in UTTS:
        for name in SHAPES:
            lines = [(d / mode / name).read_text().split("\n") for d in (ours, espnets)]
            assert sorted(lines[0]) == sorted(lines[1])
        found, expected = (
            GlobalMVN(d / mode / "feats_stats.npz") for d in (ours, espnets)
        )
        np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-5)
        np.testing.assert_allclose(found.std, expected.std, rtol=1e-5)


def test_features_of_a_sample_and_lengths_of_all(collect, corpus):
    stats = collect("--stats_utts", 4)
    stored = (corpus.train / "utt2num_samples").read_text()
    assert (stats / "train" / "speech_shape").read_text() == stored
    frames = {utt: int(n) // 128 + 1 for utt, n in map(str.split, stored.splitlines())}
    sums = np.load(stats / "train" / "feats_stats.npz")
    drawn = statistics._sample(list(frames), 4)
    assert len(drawn) == 4 and drawn == sorted(drawn)
    assert sums["count"] == sum(frames[utt] for utt in drawn)
    valid = np.load(stats / "valid" / "feats_stats.npz")
    assert valid["sum"].shape == (20,) and len(statistics._sample(["a"], 4)) == 1


def test_what_is_finished_is_kept(collect, espnets, caplog):
    """Also if ESPnet's command finished it; another sample is another result."""
    caplog.set_level("INFO")

    def times():
        files = [*espnets.glob("*/*_shape"), *espnets.glob("*/feats_stats.npz")]
        return {path: path.stat().st_mtime_ns for path in files}

    first = times()
    for number in (9, 20000):
        collect("--stats_utts", number, "--nj", 1, name="espnet")
        assert times() == first
    assert caplog.text.count("is finished already") == 2
    collect("--stats_utts", 8, name="espnet")
    assert all(time > first[path] for path, time in times().items())


def test_what_was_interrupted_is_done_again(collect, espnets, monkeypatch):
    def full_disk(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(statistics, "_write_shapes", full_disk)
        with pytest.raises(OSError):
            collect()
    stats = collect()
    for file in ("train/feats_stats.npz", "valid/text_shape"):
        assert (stats / file).read_bytes() == (espnets / file).read_bytes()


def test_features_that_are_stored(collect, corpus, tmp_path):
    entries = {}
    for mode, data in (("train", corpus.train), ("valid", corpus.dev)):
        directory = tmp_path / mode
        directory.mkdir()
        rng = np.random.default_rng(0)
        utts = [line.split()[0] for line in open(data / "text")]
        feats = {utt: rng.random((30 + i, 7), np.float32) for i, utt in enumerate(utts)}
        kaldiio.save_ark(f"{directory}/f.ark", feats, scp=f"{directory}/feats.scp")
        shapes = [f"{utt} {len(value)},7\n" for utt, value in feats.items()]
        (directory / "feats_shape").write_text("".join(shapes))
        entries[mode] = feats
    options = corpus.training(tmp_path / "stats", frontend=None, input_size=7)
    speech_from(options, tmp_path, "kaldi_ark")
    collect_stats.main(["asr", *options])
    found = np.load(tmp_path / "stats" / "train" / "feats_stats.npz")
    every = np.concatenate(list(entries["train"].values()))
    assert found["count"] == len(every)
    np.testing.assert_allclose(found["sum"], every.sum(0), rtol=1e-5)
    shape = (tmp_path / "stats" / "train" / "speech_shape").read_text()
    assert shape == (tmp_path / "train" / "feats_shape").read_text()


def test_a_model_that_takes_speech_as_it_is_has_no_statistics(collect):
    stats = collect(model_conf=dict(extract_feats_in_collect_stats=False))
    assert not (stats / "train" / "feats_stats.npz").exists()
    assert (stats / "valid" / "text_shape.word").is_file()


def test_missing_lengths(corpus, tmp_path, capsys):
    for mode, data in (("train", corpus.train), ("valid", corpus.dev)):
        (tmp_path / mode).mkdir()
        (tmp_path / mode / "wav.scp").write_text((data / "wav.scp").read_text())
    options = speech_from(corpus.training(tmp_path / "stats"), tmp_path, "sound")

    def error():
        with pytest.raises(SystemExit):
            collect_stats.main(["asr", *options])
        return capsys.readouterr().err.splitlines()[-1]

    assert "train has neither utt2num_samples nor feats_shape: run stage 3" in error()
    (tmp_path / "train" / "utt2num_samples").write_text("b 800\n")
    assert "lacks 8 of 9 utterances, first: a" in error()
