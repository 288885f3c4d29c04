import numpy as np
import pytest
import torch

from dldkit.errors import UserError
from dldkit.sfm.data import CropCollateFn

LENGTHS = dict(a=20000, b=9333, c=12800)


@pytest.fixture
def utterances():
    """Each sample, and each target, says where in which utterance it was."""
    return [
        (
            utt,
            {
                "speech": np.arange(n, dtype=np.float32) + 100000 * i,
                "targets": frames(n, i),
            },
        )
        for i, (utt, n) in enumerate(LENGTHS.items())
    ]


def frames(samples, utt):
    """Targets (Time, Layers, Dim): the CNN of HuBERT begins a frame every 320."""
    place = np.arange((samples - 400) // 320 + 1) * 320 + 100000 * utt
    return np.broadcast_to(place[:, None, None], (len(place), 3, 4)).astype(np.float32)


def crops(batch):
    """First sample of each row in its utterance; the rest has to follow it."""
    starts = []
    for i, (row, n) in enumerate(zip(batch["speech"], batch["speech_lengths"])):
        row = row[:n] - 100000 * i
        assert torch.equal(row, row[0] + torch.arange(n))
        starts.append(int(row[0]))
        count = int(batch["targets_lengths"][i])
        assert n // 320 - 1 <= count <= n // 320
        targets = batch["targets"][i, :count] - 100000 * i
        expected = starts[-1] + 320 * torch.arange(count)
        assert torch.equal(targets, expected[:, None, None].expand_as(targets))
    names = {"speech", "speech_lengths", "targets", "targets_lengths"}
    assert set(batch) == names | {"lengths_on_host"}
    for name, lengths in batch["lengths_on_host"].items():
        assert lengths == batch[f"{name}_lengths"].tolist()
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
    for _, data in utterances:
        del data["targets"]
    short = utterances[1][1]["speech"]
    collate([utterances[0], ("b", {"speech": short[:640]})])
    with pytest.raises(UserError, match=r"utterance b is too short .*\(639 samples\)"):
        collate([utterances[0], ("b", {"speech": short[:639]}), utterances[2]])


@pytest.mark.parametrize("max_seconds", [0, -1, 0.03])
def test_does_not_blame_an_utterance_for_max_seconds(utterances, max_seconds):
    with pytest.raises(UserError, match="max_seconds"):
        CropCollateFn(train=True, max_seconds=max_seconds)(utterances)


def test_targets_of_other_audio_are_refused(utterances):
    utterances[1][1]["targets"] = utterances[1][1]["targets"][:-2]
    with pytest.raises(UserError, match="b has 9333 samples and 26 cached targets"):
        CropCollateFn(train=True)(utterances)
