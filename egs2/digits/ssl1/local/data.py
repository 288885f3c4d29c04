#!/usr/bin/env python3
"""Unlabelled speech and connected digits to distil on, digits to probe with.

train, valid: speech of $UNLABELLED and connected digits, without transcripts.
digits_train, digits_test: single digits by six speakers; the test set is FSDD's own.
strings_train, strings_test: connected digits with transcripts.
"""

import argparse
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Optional, Sequence

from dldkit.data.datadir import Table, read_table, write_data_dir
from dldkit.data.digits import (
    DEV,
    TEST,
    TRAIN,
    WORDS,
    Corpus,
    DigitSet,
    find_digits,
    write_set,
)
from dldkit.errors import UserError, report_user_errors

PROBE_TRAIN, PROBE_TEST = TRAIN[:10], TEST[:5]  # takes of each digit and speaker
SUFFIXES = {".flac", ".wav", ".mp3", ".ogg", ".opus", ".sph"}


def find_unlabelled(directory: str) -> Table:
    """Return the path of every audio file below `directory`, by utterance id.

    Raises:
        UserError: none is named, it does not exist, or holds no audio.
    """
    if not directory:
        raise UserError(
            "there is no unlabelled speech: set UNLABELLED, in the environment or in "
            "db.sh, to any folder of audio files, or distil on digits alone with "
            '--local_data_opts "--unlabelled none"'
        )
    root = Path(directory)
    if not root.is_dir():
        raise UserError(f"UNLABELLED: {root} is not a directory")
    found: Table = {}
    for path in sorted(_files_below(root)):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            name = "-".join(path.relative_to(root).with_suffix("").parts)
            utt = "_".join(name.split())
            if utt in found:
                raise UserError(
                    f"{found[utt]} and {path} would both be utterance {utt}: rename one"
                )
            found[utt] = str(path.resolve())
    if not found:
        raise UserError(
            f"UNLABELLED: {root} holds no audio ({' '.join(sorted(SUFFIXES))})"
        )
    return found


def _files_below(root: Path) -> Iterator[Path]:
    """Yield them, in linked folders too; a folder that is linked twice comes once."""
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(folder, name) for name in names)


def hold_out(found: Table, size: int) -> tuple[Table, Table]:
    """Split into training and validation; `size` files, evenly spaced, are held out.

    Raises:
        UserError: there are too few files.
    """
    utts = sorted(found)
    if len(utts) <= size:
        raise UserError(
            f"UNLABELLED holds {len(utts)} files, of which --num_valid {size} are "
            "for validation: nothing is left to train on"
        )
    held = {utts[i * len(utts) // size] for i in range(size)}
    train = {utt: path for utt, path in found.items() if utt not in held}
    return train, {utt: found[utt] for utt in sorted(held)}


def write_unlabelled(name: str, source: str, speech: Table, data_dir: Path) -> None:
    """Write a data directory without `text`; each utterance is its own speaker."""
    write_data_dir(
        data_dir / name, source, wav_scp=speech, utt2spk={utt: utt for utt in speech}
    )
    logging.info(f"{name}: {len(speech)} utterances")


def write_digits(name: str, corpus: Corpus, takes: range, data_dir: Path) -> None:
    """Write a data directory of single recordings of every digit and speaker."""
    recordings = [
        (f"{speaker}-{digit}-{take:02d}", f"{digit}_{speaker}_{take}.wav", digit)
        for speaker in corpus.speakers
        for digit in range(10)
        for take in takes
    ]
    write_data_dir(
        data_dir / name,
        corpus.source,
        wav_scp={u: str((corpus.recordings / f).resolve()) for u, f, _ in recordings},
        text={utt: WORDS[digit] for utt, _, digit in recordings},
        utt2spk={utt: utt.split("-")[0] for utt, _, _ in recordings},
    )
    logging.info(f"{name}: {len(recordings)} recordings")


def prepare(args: argparse.Namespace) -> None:
    """Write the six data directories.

    Raises:
        UserError: the speech can not be had, or an option makes no sense.
    """
    sizes = {
        "train": args.num_strings,
        "valid": args.num_valid_strings,
        "strings_train": args.num_probe_train,
        "strings_test": args.num_probe_test,
    }
    for name, size in {"--num_valid": args.num_valid, **sizes}.items():
        if size < 1:
            raise UserError(f"{name}: expected at least 1, got {size}")
    train: Table = {}
    valid: Table = {}
    sources = []
    if args.unlabelled == "none":
        logging.warning("no unlabelled speech: the student hears digits alone")
    else:
        found = find_unlabelled(args.unlabelled)
        train, valid = hold_out(found, args.num_valid)
        sources.append(f"{len(found)} files of unlabelled speech")
    corpus = find_digits(args.source, Path(args.download_dir))
    logging.info(f"digits: {corpus.source}, {corpus.recordings}")
    sources.append(corpus.source)

    data_dir = Path(args.data_dir)
    seen = [speaker for speaker in corpus.speakers if speaker != corpus.unseen]
    for index, (name, size) in enumerate(sizes.items()):
        # A seed per set: the size of one does not alter another. The strings of valid
        # and strings_test share no recording with the training sets.
        takes = {"strings_test": TEST, "valid": DEV}.get(name, TRAIN)
        strings = DigitSet(name, seen, takes, size, index)
        # those of train and valid are taken from there without their transcripts
        place = data_dir / "local" if name in ("train", "valid") else data_dir
        write_set(strings, corpus, (3, 7), args.seed, place)
    for name, speech in (("train", train), ("valid", valid)):
        strings = read_table(data_dir / "local" / name / "wav.scp")
        write_unlabelled(name, "; ".join(sources), {**speech, **strings}, data_dir)
    write_digits("digits_train", corpus, PROBE_TRAIN, data_dir)
    write_digits("digits_test", corpus, PROBE_TEST, data_dir)


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--unlabelled",
        default=os.environ.get("UNLABELLED", ""),
        help="folder of audio files, searched recursively; default: $UNLABELLED; "
        "none: digits alone",
    )
    add("--num_valid", type=int, default=20, help="of these files, for validation")
    add(
        "--source",
        choices=("auto", "fsdd", "espeak"),
        default="auto",
        help="of the digits, fsdd: real recordings, from $FSDD or downloaded; espeak: "
        "synthesised; auto: real ones where they can be had",
    )
    add("--num_strings", type=int, default=249, help="connected digits in train")
    add("--num_valid_strings", type=int, default=10, help="connected digits in valid")
    add("--num_probe_train", type=int, default=150, help="in strings_train")
    add("--num_probe_test", type=int, default=100, help="in strings_test")
    add("--seed", type=int, default=0, help="same seed, same digits")
    add("--data_dir", default="data", help="where the sets go")
    add("--download_dir", default="downloads", help="where corpora go")
    return parser


@report_user_errors
def main(cmd: Optional[Sequence[str]] = None) -> None:
    """Run stage 1 of the recipe."""
    logging.basicConfig(
        level="INFO", format="%(asctime)s (%(module)s:%(lineno)d) %(message)s"
    )
    prepare(get_parser().parse_args(cmd))


if __name__ == "__main__":
    main()
