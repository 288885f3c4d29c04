"""Single options of a recipe: read, or refused with what they may be."""

import math
import re
import shlex
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dldkit.errors import UserError

UNSET = {"top_k": "", "seed": "", "ngpu": "auto"}  # what is no integer, but allowed


def parsed(parse: Callable[[str], Any], options: Mapping[str, str], name: str) -> Any:
    """Read an option as the commands do."""
    try:
        return parse(options[name])
    except ArgumentTypeError as error:
        raise UserError(f"--{name} {error}") from None


def check_integer(name: str, text: str, least: int, most: float = math.inf) -> None:
    """Refuse what is no integer, or out of bounds."""
    if re.fullmatch(r"\d+", text) and least <= int(text) <= most:
        return
    bounds = f"from {least} to {most}" if most < math.inf else f"of at least {least}"
    unset = f", or {UNSET[name] or 'nothing'}" if name in UNSET else ""
    raise UserError(f"--{name} {text}: write an integer {bounds}{unset}")


def number(name: str, text: str, above: float) -> float:
    """Read a number; refuse one that is not above a bound."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not above < number < math.inf:
        raise UserError(f"--{name} {text}: write a number above {max(above, 0):g}")
    return number


def words_of(options: Mapping[str, str], name: str) -> list[str]:
    """Cut an option into words, as the shell does."""
    try:
        return shlex.split(options.get(name, ""))
    except ValueError as error:
        raise UserError(f"--{name} {options[name]}: {error}") from None


def by_name(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Cut `--a 1 --b=2 3` into [(a, [1]), (b, [2, 3])]."""
    given: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            given.append((name, [value] if equals else []))
        elif given:
            given[-1][1].append(word)
    return given


def check_file(name: str, text: str) -> None:
    """Refuse a file that is not there."""
    # of --init_param's FILE:SOURCE:TARGET:EXCLUDE, only the first is a file
    path = Path(text.partition(":")[0] if name == "pretrained_model" else text)
    if text and text != "none" and not path.is_file():
        raise UserError(f"--{name} {path}: there is no such file")


def check_directory(name: str, text: str) -> None:
    """Refuse a directory that can not be made, or that ESPnet can not be told."""
    # ESPnet separates file, name and type by commas, and parts of init_param by colons
    if re.search("[,:\n]", text):
        raise UserError(f"--{name} {text}: choose a path without commas and colons")
    for path in (Path(text), *Path(text).parents):
        if path.is_file():
            raise UserError(f"--{name} {text}: {path} is a file; choose a directory")


def runs(options: Mapping[str, str], *stages: int) -> bool:
    """Whether one of these stages is to be run."""
    first, last = int(options["stage"]), int(options["stop_stage"])
    skipped = options["skip_stages"].replace(",", " ").split()
    skipped += ["1"] if options["skip_data_prep"] == "true" else []
    skipped += ["13"] if options["skip_eval"] == "true" else []
    skipped += ["9", "10", "11"] if options["skip_train"] == "true" else []
    skipped += ["15"] if options["skip_upload"] == "true" else []
    return any(first <= n <= last and str(n) not in skipped for n in stages)
