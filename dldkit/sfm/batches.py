"""Batches of utterances that are about equally long, and how much of them is heard."""

import logging
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from espnet2.samplers.abs_sampler import AbsSampler

from dldkit.data.segments import GRID

LEAST_USED = 0.8


class LengthBuckets(AbsSampler):
    """Utterances sorted by length, of which the equally long are drawn anew each epoch.

    Args:
        batches: of sorted utterances, as ESPnet makes them (those of this rank); their
            number and sizes stay.
        samples: length of each utterance.
    """

    def __init__(self, batches: Sequence[Sequence[str]], samples: Mapping[str, int]):
        self.utts = [utt for batch in batches for utt in batch]
        self.cells = np.array([samples[utt] // GRID for utt in self.utts])
        self.ends = np.cumsum([len(batch) for batch in batches])

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.ends)

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        """Go through the batches of one draw."""
        return iter(self.generate(0))

    def generate(self, seed: int) -> list[tuple[str, ...]]:
        """Return the batches of the draw `seed`, which ESPnet counts by epochs."""
        drawn = np.random.RandomState(seed).random(len(self.utts))
        order = [self.utts[i] for i in np.lexsort((drawn, -self.cells))]
        starts = [0, *self.ends[:-1]]
        return [tuple(order[a:b]) for a, b in zip(starts, self.ends)]


def report_used(
    batches: Sequence[Sequence[str]],
    samples: Mapping[str, int],
    crop: bool,
    max_samples: float,
    fs: int,
) -> float:
    """Log how much of the audio in an epoch's batches is heard, and return the share.

    Args:
        batches: of utterances.
        samples: length of each utterance.
        crop: batches are cut to their shortest utterance.
        max_samples: longer ones are cut.
        fs: sampling rate in Hz.
    """
    used = whole = 0.0
    for batch in batches:
        heard = [min(samples[utt], max_samples) for utt in batch]
        used += min(heard) * len(heard) if crop else sum(heard)
        whole += sum(samples[utt] for utt in batch)
    share = used / whole
    message = (
        f"a batch has {used / fs / len(batches):.1f} s of audio on average: "
        f"{share:.1%} of its utterances"
    )
    if share >= LEAST_USED:
        logging.info(message)
    else:
        logging.warning(
            f"{message}; the rest is cut away. Use batch_type: sorted without "
            "shuffle_within_batch, and cut the data to max_seconds "
            f"({max_samples / fs:g} s) once, with dldkit.bin.sfm_cut_data"
        )
    return share
