import numpy as np
import pytest
import soundfile
import torch

from dldkit.errors import UserError
from dldkit.sfm.data import CropCollateFn, NoisySpeech
from dldkit.sfm.int8 import pack

LENGTHS = dict(a=20000, b=9333, c=12800)


@pytest.fixture
def utterances():
    """Each sample says where in which utterance it was."""
    return [
        (utt, {"speech": np.arange(n, dtype=np.float32) + 100000 * i})
        for i, (utt, n) in enumerate(LENGTHS.items())
    ]


@pytest.fixture
def cached(utterances):
    """The same with targets (Time, Layers, Dim), a frame of 320 samples each."""
    rng = np.random.default_rng(0)
    for _, data in utterances:
        frames = (len(data["speech"]) - 400) // 320 + 1
        data["targets"] = rng.standard_normal((frames, 3, 4)).astype(np.float16)
    return utterances


def crops(batch):
    """First sample of each row in its utterance; the rest has to follow it."""
    starts = []
    for i, (row, n) in enumerate(zip(batch["speech"], batch["speech_lengths"])):
        row = row[:n] - 100000 * i
        assert torch.equal(row, row[0] + torch.arange(n))
        starts.append(int(row[0]))
    assert set(batch) == {"speech", "speech_lengths", "lengths_on_host"}
    assert batch["lengths_on_host"] == {"speech": batch["speech_lengths"].tolist()}
    return starts


def test_crops_are_as_long_as_the_shortest_utterance(utterances):
    collate = CropCollateFn(train=True)
    np.random.seed(0)
    seen = []
    for _ in range(300):
        utts, batch = collate(utterances)
        assert utts == ["a", "b", "c"]
        assert batch["speech"].shape == (3, 9333)
        assert batch["speech_lengths"].tolist() == [9333] * 3
        seen.append(crops(batch))
    # at a frame, and everywhere: the last crop ends within 320 samples of the end
    for utt, starts in zip(LENGTHS, zip(*seen)):
        spare = LENGTHS[utt] - 9333
        assert set(starts) == set(range(0, spare + 1, 320)), utt


def test_crops_are_no_longer_than_max_seconds(utterances):
    for fs, samples in ((16000, 4000), (8000, 2000)):
        _, batch = CropCollateFn(train=True, max_seconds=0.25, fs=fs)(utterances)
        assert batch["speech"].shape == (3, samples)
        crops(batch)
    assert CropCollateFn(train=True)(
        [("long", {"speech": np.zeros(300000, np.float32)})]
    )[1]["speech"].shape == (1, 249600)


def test_numpys_seed_repeats_crops(utterances):
    collate = CropCollateFn(train=True)

    def draw(seed):
        np.random.seed(seed)
        return [crops(collate(utterances)[1]) for _ in range(5)]

    first = draw(0)
    assert draw(0) == first and draw(1) != first
    assert len({tuple(starts) for starts in first}) > 1


def test_validation_takes_the_middle(utterances):
    collate = CropCollateFn(train=False, max_seconds=0.25)
    np.random.seed(0)
    _, batch = collate(utterances)
    for start, n in zip(crops(batch), LENGTHS.values()):
        middle = (n - 4000) / 2
        assert start % 320 == 0 and abs(start - middle) <= 320
    np.random.seed(1)
    assert torch.equal(collate(utterances)[1]["speech"], batch["speech"])


def test_padding(utterances):
    _, batch = CropCollateFn(train=True, crop=False)(utterances)
    assert batch["speech"].shape == (3, 20000)
    assert batch["speech_lengths"].tolist() == list(LENGTHS.values())
    assert crops(batch) == [0, 0, 0]
    for row, n in zip(batch["speech"], LENGTHS.values()):
        assert not row[n:].any()


def test_padding_crops_what_is_longer_than_max_seconds(utterances):
    collate = CropCollateFn(train=True, crop=False, max_seconds=0.7)
    seen = set()
    for _ in range(30):
        _, batch = collate(utterances)
        assert batch["speech_lengths"].tolist() == [11200, 9333, 11200]
        starts = crops(batch)
        assert starts[1] == 0
        seen.add(starts[0])
    assert len(seen) > 1


@pytest.mark.parametrize("crop", [True, False])
def test_names_the_utterance_that_is_too_short(utterances, crop):
    collate = CropCollateFn(train=True, crop=crop)
    short = utterances[1][1]["speech"]
    collate([utterances[0], ("b", {"speech": short[:640]})])
    with pytest.raises(UserError, match=r"utterance b is too short .*\(639 samples\)"):
        collate([utterances[0], ("b", {"speech": short[:639]}), utterances[2]])


@pytest.mark.parametrize("max_seconds", [0, -1, 0.03])
def test_does_not_blame_an_utterance_for_max_seconds(utterances, max_seconds):
    with pytest.raises(UserError, match="max_seconds"):
        CropCollateFn(train=True, max_seconds=max_seconds)(utterances)


@pytest.mark.parametrize("crop", [True, False])
def test_what_has_cached_targets_is_heard_whole(cached, crop):
    _, batch = CropCollateFn(train=True, crop=crop)(cached)
    for name in ("speech", "targets"):
        lengths = [len(data[name]) for _, data in cached]
        assert batch["lengths_on_host"][name] == lengths
        assert batch[f"{name}_lengths"].tolist() == lengths
        for row, (_, data) in zip(batch[name], cached):
            n = len(data[name])
            assert np.array_equal(row[:n].numpy(), data[name]) and not row[n:].any()


def test_targets_in_eight_bits_are_unpacked(cached):
    """ESPnet gives integers as int64."""
    whole = CropCollateFn(train=True)(cached)[1]["targets"]
    for _, data in cached:
        packed = pack(data["targets"].astype(np.float32))
        assert packed.dtype == np.int8
        data["targets"] = packed.astype(np.int64)
    found = CropCollateFn(train=True)(cached)[1]["targets"]
    assert found.dtype == torch.float32 and found.shape == whole.shape
    assert 0 < (found - whole.float()).abs().max() < 0.02


def test_targets_of_more_than_is_heard_are_refused(cached):
    with pytest.raises(UserError, match=r"a is longer .*\(1 s\).*sfm_cut_data"):
        CropCollateFn(train=True, max_seconds=1.0)(cached)


def test_targets_of_other_audio_are_refused(cached):
    cached[1][1]["targets"] = cached[1][1]["targets"][:-2]
    with pytest.raises(UserError, match="b has 9333 samples and 26 cached targets"):
        CropCollateFn(train=True)(cached)


def test_clean_speech_is_cut_at_the_same_places(utterances):
    for _, data in utterances:
        data["clean"] = data["speech"] + 0.5
    for crop in (True, False):
        _, batch = CropCollateFn(train=True, crop=crop)(utterances)
        assert batch["clean_lengths"].equal(batch["speech_lengths"])
        for n, speech, clean in zip(*map(batch.get, ("speech_lengths", *HEARD))):
            assert torch.equal(clean[:n], speech[:n] + 0.5)


HEARD = ("speech", "clean")


def saved(path, samples):
    """Save float samples, and a table that lists them."""
    soundfile.write(path, samples, 16000, subtype="FLOAT")
    path.with_suffix(".scp").write_text(f"one {path}\n")
    return str(path.with_suffix(".scp"))


@pytest.mark.parametrize("keep_clean", [True, False])
def test_noise_has_the_ratio_that_is_asked(tmp_path, keep_clean):
    rng = np.random.default_rng(0)
    speech, noise = 0.1 * rng.standard_normal((2, 8000)).astype(np.float32)
    table = saved(tmp_path / "noise.wav", noise)
    add = NoisySpeech(keep_clean, noise_scp=table, noise_db_range="6_6")
    data = {"speech": speech.copy()}
    found = add("utt", data)
    assert set(found) == ({"speech", "clean"} if keep_clean else {"speech"})
    assert np.array_equal(found.get("clean", speech), speech)
    added = found["speech"] - speech
    assert added.shape == speech.shape
    ratio = 10 * np.log10(np.mean(speech**2) / np.mean(added**2))
    assert ratio == pytest.approx(6.0, abs=0.1)
    assert np.corrcoef(added, noise)[0, 1] == pytest.approx(1.0, abs=1e-4)


def test_reverberation_is_a_convolution(tmp_path):
    """An echo after 100 samples, at the power of the speech."""
    rng = np.random.default_rng(0)
    speech = 0.1 * rng.standard_normal(8000).astype(np.float32)
    response = np.zeros(101)
    response[[0, 100]] = 1.0, 0.5
    table = saved(tmp_path / "rir.wav", response)
    found = NoisySpeech(True, rir_scp=table)("utt", {"speech": speech.copy()})
    echo = speech + 0.5 * np.concatenate([np.zeros(100), speech[:-100]])
    expected = echo * np.sqrt(np.mean(speech**2) / np.mean(echo**2))
    assert np.allclose(found["speech"], expected, atol=1e-3)
    assert np.array_equal(found["clean"], speech)
