"""Batches that are streamed from a directory in lhotse's Shar format.

Its shards hold some hundred utterances each and are read from begin to end, by several
processes. Nothing is opened at random, and no table of the whole corpus is in memory.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import numpy as np
from espnet2.iterators.abs_iter_factory import AbsIterFactory
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dldkit.errors import UserError
from dldkit.sfm.batches import report_used
from dldkit.sfm.data import CropCollateFn

if TYPE_CHECKING:  # importing lhotse takes seconds
    from lhotse import CutSet
    from lhotse.cut import Cut
    from lhotse.dataset import DynamicBucketingSampler

BUCKETS = 20  # at most, of about equally long utterances, as many in each
HELD = 2 * BUCKETS  # batches whose audio a process holds, to choose one from
LOOKED_AT = 5000  # utterances of which the lengths are asked, to find the buckets

Shards = dict[str, list[str]]


def find_shards(directory: str) -> Shards:
    """Return the files of the cuts, and those of their recordings.

    Raises:
        UserError: `directory` is not what lhotse writes.
    """
    cuts = sorted(Path(directory).glob("cuts.*.jsonl.gz"))
    audio = sorted(Path(directory).glob("recording.*.tar"))
    numbers = [[path.name.split(".")[1] for path in found] for found in (cuts, audio)]
    if not cuts or numbers[0] != numbers[1]:
        raise UserError(
            f"train_shar {directory}: there are {len(cuts)} cuts.*.jsonl.gz and "
            f"{len(audio)} recording.*.tar, but each needs the other: write them with "
            "lhotse shar export --audio flac"
        )
    return {"cuts": [*map(str, cuts)], "recording": [*map(str, audio)]}


def cuts_alone(shards: Shards) -> Iterator["Cut"]:
    """Go through the cuts of all shards; their audio is not read."""
    from lhotse import CutSet

    return chain.from_iterable(map(CutSet.from_jsonl_lazy, shards["cuts"]))


def refuse_other_rate(directory: str, sampling_rate: int) -> None:
    """Refuse recordings of another sampling rate, in Hz, than the teacher's.

    Raises:
        UserError: naming the first utterance; or there is none.
    """
    cut = next(cuts_alone(find_shards(directory)), None)
    if cut is None:
        raise UserError(f"train_shar {directory} lists no utterance")
    if cut.sampling_rate != sampling_rate:
        raise UserError(
            f"train_shar {directory}: utterance {cut.id} has {cut.sampling_rate} Hz, "
            f"but the teacher takes {sampling_rate} Hz: format the data with --fs "
            f"{sampling_rate} (stage 3), and write the shards again"
        )


def similar(
    cuts: Iterable["Cut"], batch_size: int, bounds: list[float], seed: int
) -> "DynamicBucketingSampler":
    """Return batches of about equally long cuts, each cut once; see `SharBatches`."""
    from lhotse.dataset import DynamicBucketingSampler

    return DynamicBucketingSampler(
        cuts,
        max_cuts=batch_size,
        shuffle=True,
        duration_bins=bounds,
        buffer_size=HELD * batch_size,
        seed=seed,
        world_size=1,  # the shards are shared out, not the batches
        rank=0,
    )


@dataclass
class SharBatches(IterableDataset):
    """The batches of an epoch, shared out among the processes that read.

    A process goes through its shards in an order that is drawn, and when they are
    through, through others: an epoch may have more batches than the corpus, or fewer.

    Args:
        shards: of `find_shards`.
        batch_size: utterances.
        bounds: seconds, between the buckets.
        num_batches: of all processes together.
        seed: which order of shards, and which utterances of a bucket.
        preprocess_fn, collate_fn: of the task.
    """

    shards: Shards
    batch_size: int
    bounds: list[float]
    num_batches: int
    seed: int
    collate_fn: Callable
    preprocess_fn: Optional[Callable] = None

    def __len__(self) -> int:
        """Return the number of batches."""
        return self.num_batches

    def __iter__(self) -> Iterator[tuple[list[str], dict[str, Any]]]:
        """Go through the batches of this process."""
        worker = get_worker_info()
        share = len(range(worker.id, self.num_batches, worker.num_workers))
        return map(self._collated, islice(self.cuts(), share))

    def cuts(self) -> Iterator["CutSet"]:
        """Go through batches of cuts, without an end."""
        from lhotse import CutSet

        # each time it is gone through, the order is another one
        cuts = CutSet.from_shar(
            self.shards,
            split_for_dataloading=True,
            shuffle_shards=True,
            seed=self.seed,
        )
        batches = similar(cuts, self.batch_size, self.bounds, self.seed)
        for number in count():
            batches.set_epoch(number)
            yield from batches

    def _collated(self, cuts: "CutSet") -> tuple[list[str], dict[str, Any]]:
        return self.collate_fn([(cut.id, self._loaded(cut)) for cut in cuts])

    def _loaded(self, cut: "Cut") -> dict[str, Any]:
        data = {"speech": cut.load_audio().mean(axis=0)}  # of the channels
        if self.preprocess_fn:  # with noise, ESPnet's gives float64
            data = self.preprocess_fn(cut.id, data)
        return {name: x.astype(np.float32) for name, x in data.items()}


class SharIterFactory(AbsIterFactory):
    """Streams the batches of each epoch, by at least one process of their own.

    The same epoch gives the same batches, for the same number of processes.

    Args:
        directory: what lhotse's Shar writers wrote.
        batch_size: utterances in the batches of all ranks together.
        num_iters_per_epoch: batches.
        seed: another one for each training.
        collate_fn, preprocess_fn: of the task.
        num_workers: processes of this rank that read.
        pin_memory: for copies to a GPU.
        rank, world_size: of a distributed training; ranks read different shards.

    Raises:
        UserError: there are fewer shards than processes, or utterances than ranks.
    """

    def __init__(
        self,
        directory: str,
        batch_size: int,
        num_iters_per_epoch: int,
        seed: int,
        collate_fn: CropCollateFn,
        preprocess_fn: Optional[Callable] = None,
        num_workers: int = 1,
        pin_memory: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ):
        shards, self.num_workers = find_shards(directory), max(1, num_workers)
        found, readers = len(shards["cuts"]), self.num_workers * world_size
        if found < readers:
            raise UserError(
                f"train_shar {directory} has {found} shards, but {readers} processes "
                f"are to read it, {self.num_workers} of each rank: set num_workers to "
                "less, or write smaller shards (lhotse shar export --shard-size)"
            )
        if batch_size < world_size:
            raise UserError(
                f"batch_size {batch_size} is less than one utterance for each of "
                f"{world_size} ranks"
            )
        self.seed, self.pin_memory = seed, pin_memory
        self.rank, self.world_size = rank, world_size
        looked_at = list(islice(cuts_alone(shards), LOOKED_AT))
        seconds = [cut.duration for cut in looked_at]
        share = len(range(rank, batch_size, world_size))  # as ESPnet deals them out
        buckets = max(1, min(BUCKETS, len(looked_at) // (2 * share)))
        bounds = np.quantile(seconds, np.arange(1, buckets) / buckets).tolist()
        self.options = dict(shards=shards, batch_size=share, bounds=bounds)
        self.options.update(collate_fn=collate_fn, preprocess_fn=preprocess_fn)
        self.options.update(num_batches=num_iters_per_epoch)
        examples = [[c.id for c in b] for b in similar(looked_at, share, bounds, seed)]
        samples = {cut.id: cut.num_samples for cut in looked_at}
        heard = collate_fn.crop, collate_fn.max_samples, collate_fn.fs
        report_used(examples, samples, *heard)

    def build_iter(self, epoch: int, shuffle: Optional[bool] = None) -> DataLoader:
        """Return the batches of an epoch, read by other processes."""
        from lhotse.dataset.dataloading import make_worker_init_fn

        seed = int(np.random.default_rng([self.seed, epoch]).integers(2**31))
        # lhotse asks the environment for the rank, where ESPnet may have a node's
        init = make_worker_init_fn(self.rank, self.world_size, seed=seed)
        return DataLoader(
            SharBatches(**self.options, seed=seed),
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            worker_init_fn=init,
        )
