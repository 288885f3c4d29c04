#!/usr/bin/env python3
"""Connected digits from the Free Spoken Digit Dataset, or from espeak-ng.

Each utterance strings 3 to 7 single-digit recordings of one speaker together, with
short random gaps. No recording is shared between training, dev and test sets, and
one speaker is kept out of training altogether (`test_unseen`). The noisy sets say other
strings of the same recordings, or for tests the same strings, in rooms full of babble.
"""

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path

from dldkit.data.digits import DEV, TEST, TRAIN, DigitSet, find_digits, write_set
from dldkit.data.fsdd import TAKES
from dldkit.errors import UserError, report_user_errors


def prepare(args: argparse.Namespace) -> None:
    """Write the data directories.

    Raises:
        UserError: an option makes no sense, or the corpus can not be had.
    """
    digits = (args.min_digits, args.max_digits)
    if not 1 <= digits[0] <= digits[1]:
        raise UserError(
            "expected 1 <= --min_digits <= --max_digits, got %d, %d" % digits
        )
    corpus = find_digits(args.source, Path(args.download_dir))
    logging.info(f"corpus: {corpus.source}, {corpus.recordings}")
    unseen = args.unseen_speaker or corpus.unseen
    if unseen not in corpus.speakers:
        choices = " ".join(corpus.speakers)
        raise UserError(f"--unseen_speaker {unseen}: choose from {choices}")
    seen = [speaker for speaker in corpus.speakers if speaker != unseen]
    for made in _sets(args, seen, unseen):
        if made.size < 1:
            raise UserError(f"--num_{made.name} must be at least 1, got {made.size}")
        write_set(made, corpus, digits, args.seed, Path(args.data_dir))


def _sets(args: argparse.Namespace, seen: list[str], unseen: str) -> Iterator[DigitSet]:
    # Nothing of the unseen speaker is trained on, so all takes may be tested on.
    train, dev = ("train", seen, TRAIN), ("dev", seen, DEV)
    tests = ("test_seen", seen, TEST), ("test_unseen", [unseen], TAKES)
    yield DigitSet(*train, args.num_train, 0)
    yield DigitSet(*dev, args.num_dev, 1)
    yield DigitSet(*tests[0], args.num_test_seen, 2)
    yield DigitSet(*tests[1], args.num_test_unseen, 3)
    mixed = dict(snr=(0.0, 20.0), noisy=0.5)
    for (name, *of), size, seed in (
        (train, 2 * args.num_train, 4),
        (dev, args.num_dev, 5),
    ):
        yield DigitSet(f"{name}_noisy", *of, size, seed, **mixed, babble=tuple(of))
    for snr in (20, 10, 5):
        of, level = tests[0][1:], dict(snr=(snr, snr), babble=(seen, TEST))
        yield DigitSet(f"test_seen_{snr}db", *of, args.num_test_seen, 2, **level)
        of = tests[1][1:]
        yield DigitSet(f"test_unseen_{snr}db", *of, args.num_test_unseen, 3, **level)


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--source",
        choices=("auto", "fsdd", "espeak"),
        default="auto",
        help="fsdd: real recordings, from $FSDD or downloaded; espeak: synthesised; "
        "auto: real ones where they can be had",
    )
    parser.add_argument(
        "--unseen_speaker",
        help="kept out of training; default: theo (fsdd), eve (espeak)",
    )
    parser.add_argument("--num_train", type=int, default=1500, help="utterances")
    parser.add_argument("--num_dev", type=int, default=150, help="utterances")
    parser.add_argument("--num_test_seen", type=int, default=300, help="utterances")
    parser.add_argument("--num_test_unseen", type=int, default=300, help="utterances")
    parser.add_argument("--min_digits", type=int, default=3, help="per utterance")
    parser.add_argument("--max_digits", type=int, default=7, help="per utterance")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same corpus")
    parser.add_argument("--data_dir", default="data", help="where the sets go")
    parser.add_argument("--download_dir", default="downloads", help="where corpora go")
    return parser


@report_user_errors
def main(cmd=None) -> None:
    """Run stage 1 of the recipe."""
    logging.basicConfig(
        level="INFO", format="%(asctime)s (%(module)s:%(lineno)d) %(message)s"
    )
    prepare(get_parser().parse_args(cmd))


if __name__ == "__main__":
    main()
