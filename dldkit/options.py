"""How the commands read their options."""

import argparse
import functools
import logging
import math
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Union

import humanfriendly

from dldkit.errors import UserError


def integers(text: str, what: str, least: int = 0, most: float = inf) -> list[int]:
    """Read numbers between blanks or commas, each once."""
    words = text.replace(",", " ").split()
    if not words or not all(w.isdecimal() and least <= int(w) <= most for w in words):
        raise argparse.ArgumentTypeError(f"{text!r}: write {what}")
    return list(dict.fromkeys(map(int, words)))


depth_list = functools.partial(
    integers, what='numbers of layers, such as "12 6 2"', least=1
)
layer_list = functools.partial(integers, what="layers from 0, as 0,3,7")
seed_list = functools.partial(integers, what='numbers, such as "0 1 2"')
fold_list = functools.partial(integers, what='folds from 0 to 4, as "0 1"', most=4)


def named_twice(names: Sequence[str]) -> str:
    """Return the names that are there more than once, as text; empty for none."""
    return ", ".join(sorted({name for name in names if names.count(name) > 1}))


def flat_layers(layers: Sequence[Union[int, Sequence[int]]]) -> list[int]:
    """Return layers, of which some may be in groups, one after the other.

    Raises:
        UserError: they are something else.
    """
    try:
        groups = [[layer] if isinstance(layer, int) else layer for layer in layers]
        flat = [layer for group in groups for layer in group]
    except TypeError:  # a number is no list
        flat = [None]
    if isinstance(layers, str) or not all(type(layer) is int for layer in flat):
        raise UserError(f"layers {layers}: write a list of numbers, as [4,8,12]")
    return flat


def positive(text: str) -> int:
    """Read an integer above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: write an integer above 0")
    return int(text)


def threshold(text: str) -> float:
    """Read a number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: write a number from 0 to 1")
    return number


def learning_rates(text: str) -> dict[str, list[float]]:
    """Read `pr=5e-4,sid=1e-2:1e-3`: rates of tasks; an empty text names none."""
    rates = {}
    for word in text.replace(",", " ").split():
        task, _, values = word.partition("=")
        try:
            numbers = [float(value) for value in values.split(":")]
        except ValueError:
            numbers = [math.nan]
        if task in rates or not task or not all(0 < n < inf for n in numbers):
            raise argparse.ArgumentTypeError(
                f"{word!r}: write a task once with a rate above 0, or several, such as "
                "pr=5e-4,sid=1e-2:1e-3"
            )
        rates[task] = list(dict.fromkeys(numbers))
    return rates


def exit_thresholds(text: str) -> Union[str, list[float]]:
    """Read `auto`, `none`, or numbers between blanks or commas, each once."""
    if text in ("auto", "none"):
        return text
    words = text.replace(",", " ").split()
    # as directories are named: two of one name would be one
    numbers = [float(f"{threshold(word):g}") for word in words]
    if not numbers:
        raise argparse.ArgumentTypeError(
            f'{text!r}: write auto, none, or numbers from 0 to 1, such as "0.02 0.05"'
        )
    return list(dict.fromkeys(numbers))


def sampling_rate(text: str) -> int:
    """Read a rate in Hz: `16000`, or `16k`."""
    try:
        rate = humanfriendly.parse_size(text)
    except (humanfriendly.InvalidSize, ValueError):  # the latter of ²
        rate = 0
    if rate < 1:
        raise argparse.ArgumentTypeError(
            f"{text}: write a sampling rate in Hz, as 16000 or 16k"
        )
    return rate


def named_paths(option: str, texts: Sequence[str]) -> dict[str, Path]:
    """Split NAME=PATH, given once or more often.

    Raises:
        UserError: no path, a name that is no file name, or one given twice.
    """
    paths: dict[str, Path] = {}
    for text in texts:
        name, _, path = text.partition("=")
        if not path or Path(name).name != name or not name:
            raise UserError(
                f"{option} {text}: write NAME=PATH, such as dld=exp/asr_dld"
            )
        if name in paths:
            raise UserError(f"{option}: the name {name} stands there twice")
        paths[name] = Path(path)
    return paths


def command_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose --help shows every default."""
    return argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """Add how many jobs do the work, and where; see `dldkit.parallel`."""
    parser.add_argument("--nj", type=positive, default=1, help="number of jobs")
    parser.add_argument(
        "--parallel_config", help="YAML of a cluster, instead of --nj local processes"
    )


def parse(
    parser: argparse.ArgumentParser, cmd: Sequence[str] | None, level: str = "INFO"
) -> argparse.Namespace:
    """Read a command line, and begin to log with time stamps."""
    args = parser.parse_args(cmd)
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s: %(message)s")
    return args
