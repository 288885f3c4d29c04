import itertools
from pathlib import Path

import numpy as np
import pytest
import yaml
from espnet2.samplers.build_batch_sampler import build_batch_sampler

from dldkit.data.segments import GRID, segments_of
from dldkit.sfm.batches import LengthBuckets, report_used

ROOT = Path(__file__).resolve().parents[2]

# Seconds, of which a twentieth of 251 utterances of train-clean-100 lies between two
QUANTILES = [1.64, 3.74, 5.26, 8.04, 9.85, 11.3, 12.26, 12.84, 13.32, 13.77, 14.1]
QUANTILES += [14.23, 14.43, 14.61, 14.83, 15.06, 15.32, 15.51, 15.82, 16.3, 17.19]
UTTS = 28539  # of train-clean-100


@pytest.fixture(scope="module")
def samples():
    """Lengths like those of train-clean-100."""
    places = np.random.default_rng(0).random(UTTS)
    seconds = np.interp(places, np.linspace(0, 1, len(QUANTILES)), QUANTILES)
    return {f"utt{i}": int(16000 * n) for i, n in enumerate(seconds)}


@pytest.fixture
def espnets(samples, tmp_path):
    """Return a function that makes ESPnet's batches of 64."""
    (tmp_path / "shapes").write_text("".join(f"{u} {n}\n" for u, n in samples.items()))

    def batches(kind):
        files = [str(tmp_path / "shapes")]
        return list(build_batch_sampler(kind, 64, 0, files))

    return batches


def used(batches, samples, crop=True, max_seconds=15.6):
    return report_used(batches, samples, crop, 16000 * max_seconds, 16000)


def test_buckets_use_the_audio_that_is_there(samples, espnets, caplog):
    with caplog.at_level("INFO"):
        assert used(LengthBuckets(espnets("sorted"), samples), samples) > 0.98
    assert "s of audio on average: 98." in caplog.text
    assert "WARNING" not in caplog.text


def test_unsorted_batches_waste_it_and_are_warned_of(samples, espnets, caplog):
    assert used(espnets("unsorted"), samples) < 0.35
    assert "Use batch_type: sorted without shuffle_within_batch" in caplog.text
    caplog.clear()
    assert used(espnets("unsorted"), samples, crop=False) > 0.98
    assert used(espnets("sorted"), samples, max_seconds=2.0) < 0.2
    assert "cut the data to max_seconds (2 s)" in caplog.text


def test_tells_what_a_batch_has(caplog):
    batches, samples = [["a", "b"], ["c"]], dict(a=20, b=30, c=50)
    with caplog.at_level("INFO"):  # heard: twice 20 samples, and 40 of 50
        assert report_used(batches, samples, True, 40, 10) == 0.8
    assert caplog.messages == [
        "a batch has 4.0 s of audio on average: 80.0% of its utterances"
    ]


def test_batches_are_drawn_anew(samples, espnets):
    sorted_ones = espnets("sorted")
    sampler = LengthBuckets(sorted_ones, samples)
    one, same, other = (sampler.generate(seed) for seed in (1, 1, 2))
    assert one == same
    for batches in (one, other):
        assert sorted(itertools.chain(*batches)) == sorted(samples)
        assert [len(b) for b in batches] == [len(b) for b in sorted_ones]
    assert len(sampler) == len(one)
    kept = sum(len(set(a) & set(b)) for a, b in zip(one, other))
    assert kept < 0.7 * UTTS  # there are few of the short ones
    # neighbours in one batch are seldom neighbours in the next draw's
    place = {utt: i for i, batch in enumerate(other) for utt in batch}
    together = [len({place[utt] for utt in batch}) == 1 for batch in one]
    assert sum(together) < 0.05 * len(one)


def test_equal_lengths_stay_together():
    """As data that were cut have them: but where a length ends, none is mixed."""
    samples = {f"{n}-{i}": n * GRID for n in range(10, 20) for i in range(50)}
    utts = sorted(samples, key=samples.get)
    batches = [utts[i : i + 8] for i in range(0, len(utts), 8)]
    drawn = LengthBuckets(batches, samples).generate(0)
    mixed = [batch for batch in drawn if len({samples[utt] for utt in batch}) > 1]
    assert len(mixed) <= 9
    assert all(np.ptp([samples[utt] for utt in batch]) <= GRID for batch in mixed)


def test_ranks_have_batches_of_the_same_lengths(samples, espnets):
    """Each draws among its own share of every batch, as ESPnet deals them out."""
    ranks = []
    for rank in range(2):
        share = [batch[rank::2] for batch in espnets("sorted")]
        ranks.append(LengthBuckets(share, samples).generate(3))
    assert len(ranks[0]) == len(ranks[1])
    for batches in zip(*ranks):
        longest = [max(samples[utt] for utt in batch) for batch in batches]
        assert abs(longest[0] - longest[1]) < 0.5 * 16000


@pytest.mark.parametrize("recipe", ["digits", "librispeech"])
def test_every_config_uses_the_audio(recipe, samples, tmp_path):
    """After stage 4 has cut it to the config's max_seconds."""
    config = yaml.safe_load(
        (ROOT / f"egs2/{recipe}/ssl1/conf/train_sfm.yaml").read_text()
    )
    seconds = config["collate_fn_conf"]["max_seconds"]
    cut = {
        f"{utt}-{i}": end - begin
        for utt, n in samples.items()
        for i, (begin, end) in enumerate(segments_of(n, 16000 * seconds))
    }
    assert sum(cut.values()) > 0.97 * sum(samples.values())
    (tmp_path / "shapes").write_text("".join(f"{u} {n}\n" for u, n in cut.items()))
    shapes, size = [str(tmp_path / "shapes")], config["batch_size"]
    batches = list(build_batch_sampler(config["batch_type"], size, 0, shapes))
    assert not config.get("shuffle_within_batch")
    share = used(LengthBuckets(batches, cut), cut, max_seconds=seconds)
    assert share * sum(cut.values()) > 0.95 * sum(samples.values())
