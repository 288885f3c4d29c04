"""Stages 6 and 10: lengths of the training data, and statistics of their features.

ESPnet's `--collect_stats` reads all of the audio in one process. Here lengths are those
that stage 3 stored, and features are computed for a sample of the utterances, in parts.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from espnet2.main_funcs import collect_stats as espnet
from espnet2.tasks.abs_task import AbsTask
from espnet2.torch_utils.set_all_random_seed import set_all_random_seed

from dldkit.asr.loading import without_espnets_news
from dldkit.config_files import resolved_arguments
from dldkit.data.datadir import Table, read_table
from dldkit.errors import UserError
from dldkit.parallel import parallel_map
from dldkit.step import atomic
from dldkit.train.experiment import experiment

MODES = "train", "valid"
LENGTHS = "utt2num_samples", "feats_shape"  # stage 3 stores one of them
PART = 2000  # utterances, about: no result depends on the number of jobs
EXTRACTS = "extract_feats_in_collect_stats"  # ESPnet's name

Statistics = dict[str, dict[str, np.ndarray]]


def collect_stats(
    task: type[AbsTask],
    args: argparse.Namespace,
    stats_utts: int,
    nj: int = 1,
    parallel_config: str | None = None,
) -> None:
    """Write what ESPnet's `--collect_stats` writes, and `text_shape.TOKEN_TYPE`.

    Up to `PART` utterances, all files are the same as ESPnet's (with `num_workers: 1`).

    Args:
        args: of the training; `output_dir` is where the statistics go.
        stats_utts: compute features for at most so many utterances of each set.
        nj: number of jobs.

    Raises:
        UserError: the lengths that stage 3 stores are missing, or tables disagree.
    """
    args.collect_stats, args.ngpu = True, 0
    task.check_data(args)
    lengths = {mode: _stored_lengths(_path(args, mode, "speech")) for mode in MODES}
    if any(len(table) > stats_utts for table in lengths.values()):
        args.stats_utts = stats_utts  # what decides the result
    with experiment(args) as is_to_be_done:
        if not is_to_be_done:
            return
        if _has_features(task, args):
            parts = [
                (mode, part)
                for mode in MODES
                for part in _in_parts(
                    _sample(list(lengths[mode]), stats_utts), _batch_size(args, mode)
                )
            ]
            work = partial(_of_part, task, args)
            if len(parts) == len(MODES):  # to start more jobs takes longer
                nj, parallel_config = 1, None
            found = parallel_map(work, parts, nj, "Statistics", parallel_config)
            for mode in MODES:
                _write_sums(
                    Path(args.output_dir, mode),
                    [sums for (of, _), sums in zip(parts, found) if of == mode],
                )
        for mode in MODES:
            directory = Path(args.output_dir, mode)
            _write_shapes(directory / "speech_shape", lengths[mode])
            if text := _path(args, mode, "text"):
                shapes = _text_lengths(task, args, text, list(lengths[mode]))
                _write_shapes(directory / "text_shape", shapes)
                units = _units(args)
                vocabulary = {utt: f"{n},{units}" for utt, n in shapes.items()}
                _write_shapes(directory / f"text_shape.{args.token_type}", vocabulary)


def _path(args: argparse.Namespace, mode: str, name: str) -> Path | None:
    for path, key, _ in getattr(args, f"{mode}_data_path_and_name_and_type"):
        if key == name:
            return Path(path)
    return None


def _stored_lengths(scp: Path) -> Table:
    """Return the shape of each utterance, in the order of the table of speech."""
    for name in LENGTHS:
        if (stored := scp.with_name(name)).is_file():
            return _of_utterances(list(read_table(scp)), read_table(stored), stored)
    raise UserError(f"{scp.parent} has neither {' nor '.join(LENGTHS)}: run stage 3")


def _of_utterances(utts: Sequence[str], table: Table, path: Path) -> Table:
    missing = [utt for utt in utts if utt not in table]
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} of {len(utts)} utterances, first: "
            f"{missing[0]}: remove {path.parent}, and run stages 3 and 4"
        )
    return {utt: table[utt] for utt in utts}


def _has_features(task: type[AbsTask], args: argparse.Namespace) -> bool:
    """Say whether the model has features to normalise; it may take speech as it is."""
    (models,) = (c for c in task.class_choices_list if c.name == "model")
    default = getattr(models.get_class(args.model), EXTRACTS, True)
    return (args.model_conf or {}).get(EXTRACTS, default)


def _sample(utts: list[str], most: int) -> list[str]:
    """Draw utterances, the same ones every time; they keep their order."""
    drawn = random.Random(0).sample(range(len(utts)), min(most, len(utts)))
    return [utts[i] for i in sorted(drawn)]


def _in_parts(utts: list[str], batch_size: int) -> list[list[str]]:
    """Cut between batches: padding is heard in the last frames of an utterance."""
    size = max(PART // batch_size, 1) * batch_size
    return [utts[first : first + size] for first in range(0, len(utts), size)]


def _batch_size(args: argparse.Namespace, mode: str) -> int:
    """Return the batch size that ESPnet would take."""
    if mode == "valid" and args.valid_batch_size is not None:
        return args.valid_batch_size
    return args.batch_size


def _of_part(
    task: type[AbsTask], args: argparse.Namespace, part: tuple[str, list[str]]
) -> Statistics:
    """Return ESPnet's statistics of some utterances: count, sum and sum of squares."""
    mode, utts = part
    torch.set_num_threads(1)
    set_all_random_seed(args.seed)
    with TemporaryDirectory() as directory, without_espnets_news():
        Path(directory, "valid").mkdir()  # which stays empty
        keys = Path(directory, "keys")
        keys.write_text("".join(f"{utt}\n" for utt in utts), encoding="utf-8")
        espnet.collect_stats(
            model=task.build_model(args).to(getattr(torch, args.train_dtype)),
            train_iter=task.build_streaming_iterator(
                getattr(args, f"{mode}_data_path_and_name_and_type"),
                preprocess_fn=task.build_preprocess_fn(args, train=False),
                collate_fn=task.build_collate_fn(args, train=False),
                key_file=str(keys),
                batch_size=_batch_size(args, mode),
                dtype=args.train_dtype,
                num_workers=0,
                allow_variable_data_keys=args.allow_variable_data_keys,
                mode=mode,
            ),
            valid_iter=[],
            output_dir=Path(directory),
            ngpu=0,
            log_interval=sys.maxsize,
            write_collected_feats=False,
        )
        return {
            path.name: dict(np.load(path))
            for path in Path(directory, "train").glob("*_stats.npz")
        }


def _write_sums(directory: Path, found: list[Statistics]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, first in found[0].items():
        sums = {key: sum(part[name][key] for part in found) for key in first}
        np.savez(directory / name, **sums)


def _write_shapes(path: Path, shapes: Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as part, part.open("w", encoding="utf-8") as lines:
        lines.writelines(f"{utt} {shape}\n" for utt, shape in shapes.items())


def _text_lengths(
    task: type[AbsTask], args: argparse.Namespace, path: Path, utts: list[str]
) -> Table:
    texts = _of_utterances(utts, read_table(path, allow_empty=True), path)
    with without_espnets_news():
        preprocess = task.build_preprocess_fn(args, train=False)
    return {
        utt: str(len(preprocess(utt, {"text": text})["text"]))
        for utt, text in texts.items()
    }


def _units(args: argparse.Namespace) -> int:
    with resolved_arguments(args):
        if not isinstance(args.token_list, str):
            return len(args.token_list)
        with open(args.token_list, encoding="utf-8") as tokens:
            return sum(1 for _ in tokens)
