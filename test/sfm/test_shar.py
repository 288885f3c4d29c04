import shutil

import numpy as np
import pytest
import torch
from lhotse import CutSet
from lhotse.testing.dummies import dummy_recording

from dldkit.errors import UserError
from dldkit.sfm.data import CropCollateFn
from dldkit.sfm.shar import SharIterFactory, find_shards, refuse_other_rate

RATE = 8000


def factory(directory, batch_size=2, num_iters=12, crop=False, **options):
    collate = CropCollateFn(True, crop, max_seconds=9.0, fs=RATE)
    return SharIterFactory(str(directory), batch_size, num_iters, 3, collate, **options)


def utterances(batches):
    return [utt for utts, _ in batches for utt in utts]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_pass_has_each_utterance_once_and_whole(corpus, shar, workers):
    batches = list(factory(shar, num_workers=workers).build_iter(1))
    for utts, batch in batches:
        for utt, speech, n in zip(utts, batch["speech"], batch["speech_lengths"]):
            assert speech.dtype == torch.float32
            assert np.array_equal(speech[:n].numpy(), corpus.speech(utt))
    readers = workers or 1
    first = [utterances(batches[i::readers])[: 9 // readers] for i in range(readers)]
    assert sorted(sum(first, [])) == list("abcdefghi")


@pytest.mark.parametrize("workers", [1, 2])
def test_an_epoch_has_its_batches_and_crops(shar, workers):
    """As many as are asked for, which are more than a pass has."""
    made = factory(shar, num_iters=11, crop=True, num_workers=workers)
    one, again, other = (list(made.build_iter(epoch)) for epoch in (1, 1, 2))
    assert len(made.build_iter(1)) == len(one) == len(other) == 11
    assert utterances(one) == utterances(again) != utterances(other)
    for (_, batch), (_, same) in zip(one, again):
        assert torch.equal(batch["speech"], same["speech"])


def test_ranks_read_different_shards(shar, monkeypatch):
    """Whatever the environment says, as ESPnet's RANK may be the number of a node."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    read, sizes = [], []
    for rank in (0, 1):
        made = factory(shar, batch_size=3, rank=rank, world_size=2)
        batches = list(made.build_iter(1))
        assert len(batches) == 12
        read.append(utterances(batches)[: 6 - 3 * rank])  # of two shards, and of one
        sizes.append(max(len(utts) for utts, _ in batches))
    assert sorted(sum(read, [])) == list("abcdefghi")
    assert sizes[1] == 1


@pytest.fixture(scope="module")
def noises(tmp_path_factory):
    """400 utterances of 0.1 to 1 s."""
    seconds = np.random.default_rng(0).integers(100, 1000, 400) / 1000
    recordings = [
        dummy_recording(i, duration=n, sampling_rate=RATE, with_data=True)
        for i, n in enumerate(seconds)
    ]
    directory = tmp_path_factory.mktemp("noises")
    cuts = CutSet([recording.to_cut() for recording in recordings])
    cuts.to_shar(directory, {"recording": "wav"}, shard_size=100)
    return directory


def test_batches_are_full_and_of_similar_length(noises, caplog):
    with caplog.at_level("INFO"):
        factory(noises, batch_size=4, crop=True)
    assert "s of audio on average: 9" in caplog.text  # per cent
    made = factory(noises, batch_size=4, num_iters=60)
    lengths = [batch["lengths_on_host"]["speech"] for _, batch in made.build_iter(1)]
    assert {len(n) for n in lengths} == {4}
    heard = sum(min(n) * len(n) for n in lengths) / sum(map(sum, lengths))
    assert heard > 0.95


def test_epochs_begin_with_different_shards(noises):
    """As the audio of less than the corpus is held."""
    made = factory(noises, batch_size=1, num_iters=5)
    firsts = {frozenset(utterances(made.build_iter(epoch))) for epoch in range(6)}
    assert len(frozenset.union(*firsts)) > 15


@pytest.mark.parametrize(
    "lost, message",
    [
        ("*", "there are 0 cuts.*.jsonl.gz and 0 recording.*.tar"),
        ("recording.*", "there are 3 cuts.*.jsonl.gz and 0 recording.*.tar"),
        ("recording.000001.tar", "there are 3 cuts.*.jsonl.gz and 2 recording.*.tar"),
    ],
)
def test_what_is_no_shar_is_refused(shar, tmp_path, lost, message):
    shutil.copytree(shar, tmp_path / "shar")
    for path in (tmp_path / "shar").glob(lost):
        path.unlink()
    with pytest.raises(UserError) as error:
        find_shards(str(tmp_path / "shar"))
    assert f"{tmp_path}/shar: {message}" in str(error.value)


def test_other_rates_are_refused(shar):
    refuse_other_rate(str(shar), RATE)
    with pytest.raises(UserError, match="utterance a has 8000 Hz, .* takes 16000 Hz"):
        refuse_other_rate(str(shar), 16000)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_workers=4), "has 3 shards, but 4 processes .* num_workers to less"),
        (dict(num_workers=2, world_size=2), "has 3 shards, but 4 processes"),
        (dict(batch_size=1, world_size=2), "batch_size 1 is less than .* 2 ranks"),
    ],
)
def test_too_many_readers_are_refused(shar, options, message):
    with pytest.raises(UserError, match=message):
        factory(shar, **options)
