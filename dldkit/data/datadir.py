"""Data directories in ESPnet's layout: plain tables, read, written and checked."""

import logging
from collections.abc import Iterable
from pathlib import Path

from dldkit.errors import UserError
from dldkit.step import Lock, Step, atomic

PathLike = str | Path
Table = dict[str, str]

DROPPED_TEXT = "dropped_text"  # what was said in utterances that stage 3 dropped


def read_text(path: Path) -> str:
    """Return what a file of text holds.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 ({error}): convert it, for example by iconv -f latin1"
            " -t utf-8"
        ) from None


def read_table(path: PathLike, allow_empty: bool = False) -> Table:
    """Read `key value` lines; with `allow_empty` the value may be missing.

    Raises:
        UserError: no such file, not UTF-8, a key without a value, or a key twice.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    lines = read_text(path).split("\n")
    if lines[-1] == "":  # after the final newline, which some corpora lack
        lines.pop()
    table: Table = {}
    for number, line in enumerate(lines, 1):
        key, value = [*line.split(maxsplit=1), "", ""][:2]
        if not key or (not value and not allow_empty):
            raise UserError(
                f"{path}, line {number}: expected `key value`, got {line!r}"
            )
        if key in table:
            raise UserError(f"{path}, line {number}: {key} is there twice")
        table[key] = value.rstrip()
    return table


def read_lengths(path: PathLike) -> dict[str, int]:
    """Read `utt2num_samples`, or the numbers of frames in `feats_shape`.

    Raises:
        UserError: see `read_table` and `lengths_in`.
    """
    return lengths_in(read_table(path), path)


def lengths_in(table: Table, path: PathLike) -> dict[str, int]:
    """Return the numbers of a table of lengths that was read from `path`.

    Raises:
        UserError: naming the utterance whose length is no number.
    """
    lengths = {}
    for utt, value in table.items():
        length = value.split(",")[0]
        if not length.isdecimal():
            raise UserError(
                f"{path}: {value!r} of {utt} is no length: remove {path.parent}, and "
                "run stages 3 and 4"
            )
        lengths[utt] = int(length)
    return lengths


def splits_of(table: PathLike) -> list[Path]:
    """Return the parts of a table that espnet2.bin.split_scps cut, or the table."""
    return sorted(Path(table).glob("split.*")) or [Path(table)]


def write_table(path: PathLike, table: dict[str, object]) -> None:
    """Write `key value` lines sorted by key (C locale), in one step.

    The file appears only when it is complete, so a killed run leaves no half table.
    """
    path = Path(path)
    with atomic(path) as part, part.open("w", encoding="utf-8") as lines:
        lines.writelines(f"{key} {table[key]}".rstrip() + "\n" for key in sorted(table))


def write_data_dir(
    directory: PathLike, source: str | None = None, **tables: dict[str, object]
) -> None:
    """Write the tables given by file name (`text=...`; `wav_scp` is wav.scp).

    `spk2utt` is derived from `utt2spk`; `source` goes to `corpus_source`. Another
    process that writes them, too, is waited for.
    """
    directory = Path(directory)
    with Lock(directory / ".lock.tables"):
        for name, table in tables.items():
            write_table(directory / name.replace("_scp", ".scp"), table)
        if "utt2spk" in tables:
            write_table(directory / "spk2utt", spk2utt(tables["utt2spk"]))
        if source is not None:
            with atomic(directory / "corpus_source") as new:
                new.write_text(source + "\n", encoding="utf-8")


def spk2utt(utt2spk: Table) -> Table:
    """Turn `utt -> speaker` into `speaker -> utt utt ...`."""
    utts: dict[str, list[str]] = {}
    for utt in sorted(utt2spk):
        utts.setdefault(utt2spk[utt], []).append(utt)
    return {spk: " ".join(members) for spk, members in utts.items()}


def read_source(directory: PathLike) -> str | None:
    """Return the line that names the corpus, if the directory has one."""
    path = Path(directory) / "corpus_source"
    return read_text(path).strip() if path.is_file() else None


def subset_data_dir(src: PathLike, dst: PathLike, utts: Iterable[str]) -> None:
    """Write `text`, `utt2spk`, `spk2utt`, `corpus_source` of `src` for `utts`.

    A directory without `text` gets none.
    """
    src, utts = Path(src), list(utts)
    tables = {}
    for name in ("text", "utt2spk"):
        if name == "text" and not (src / name).is_file():
            continue
        table = read_table(src / name, allow_empty=True)
        tables[name] = {utt: table[utt] for utt in utts}
    write_data_dir(dst, read_source(src), **tables)


def test_set_dir(root: PathLike, name: str) -> Path:
    """Return where a test set lies in `dump/raw`: as stage 3 wrote it.

    Of a validation set, `root/name` lacks what stage 4 left out, and `root/org/name`
    does not. What is too long to learn from is to be recognised all the same.
    """
    org = Path(root) / "org" / name
    return org if org.is_dir() else Path(root) / name


def utterances(directory: PathLike, text: bool = True) -> list[str]:
    """Return the utterance ids of a directory whose tables agree.

    The ids are those of `segments`, else of `wav.scp`, else of `feats.scp`; every
    other table must hold exactly them. Empty transcripts are allowed here: stage 3
    and 4 drop them and say so.

    Args:
        text: whether there must be transcripts; if not, there may be.

    Raises:
        UserError: names the file, how many keys differ, and the first of them.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"data directory {directory} does not exist")
    names = ("segments", "wav.scp", "feats.scp")
    key_file = next((name for name in names if (directory / name).is_file()), None)
    if key_file is None:
        raise UserError(f"{directory} has neither wav.scp nor feats.scp")
    keys = read_table(directory / key_file)
    if not keys:
        raise UserError(f"{directory / key_file} is empty")

    if key_file == "segments":
        recordings = {value.split()[0] for value in keys.values()}
        _compare(directory, "wav.scp", "segments", recordings)
    if text and not (directory / "text").is_file():
        raise UserError(
            f"{directory / 'text'} does not exist: write the transcripts (to distil, "
            "none are needed: --no_text of this command)"
        )
    others = ["utt2spk"]
    optional = ("text", "utt2speed", "utt2num_samples", "feats_shape")
    others += [name for name in optional if (directory / name).is_file()]
    if key_file != "feats.scp" and (directory / "feats.scp").is_file():
        others.append("feats.scp")
    for name in others:
        _compare(directory, name, key_file, set(keys))

    utt2spk = read_table(directory / "utt2spk")
    if (directory / "spk2utt").is_file() and (
        read_table(directory / "spk2utt") != spk2utt(utt2spk)
    ):
        raise UserError(
            f"{directory / 'spk2utt'} does not agree with utt2spk: remove spk2utt, "
            "or write it again from utt2spk"
        )
    return sorted(keys)


def empty_transcripts(directory: PathLike) -> set[str]:
    """Return the ids of utterances whose transcript is empty."""
    table = read_table(Path(directory) / "text", allow_empty=True)
    return {utt for utt, text in table.items() if not text}


def _compare(directory: Path, name: str, key_file: str, expected: set) -> None:
    found = set(read_table(directory / name, allow_empty=name == "text"))
    for keys, has, lacks in (
        (found - expected, name, key_file),
        (expected - found, key_file, name),
    ):
        if keys:
            raise UserError(
                f"{directory}: {lacks} lacks {len(keys)} key(s) that {has} has, first: "
                f"{' '.join(sorted(keys)[:3])}; mend the data preparation"
            )


def report_dropped(directory: PathLike, dropped: dict[str, str], total: int) -> None:
    """Write `dropped.txt` (`utt reason`) and log how many were dropped and why.

    Raises:
        UserError: nothing is left.
    """
    path = Path(directory) / "dropped.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(path, dropped)
    if not dropped:
        return
    first = ", ".join(f"{utt} ({dropped[utt]})" for utt in sorted(dropped)[:3])
    message = f"dropped {len(dropped)} of {total} utterances, listed in {path}: {first}"
    if len(dropped) == total:
        raise UserError(f"no utterance is left; {message}")
    logging.warning(message)


def step_of(src: PathLike, dst: PathLike, **options: object) -> Step:
    """Return the step that makes `dst` from the tables of `src`."""
    tables = {
        path.name: path
        for path in sorted(Path(src).iterdir())
        if path.is_file()
        and path.name[0] != "."
        and path.suffix != ".part"  # another process writes it
        and path.name != "dropped.txt"
    }
    return Step(dst, tables, **options)
