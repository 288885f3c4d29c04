#!/usr/bin/env python3
"""TED-LIUM 3, the legacy distribution: train, dev and test, with ESPnet's texts."""

import logging
import re
from collections.abc import Iterable
from pathlib import Path

from dldkit.data.corpus import (
    corpus_parser,
    downloading,
    find_corpus,
    lines_of,
    preparation,
    reading,
    stems,
)
from dldkit.data.from_lhotse import from_lhotse
from dldkit.errors import UserError, report_user_errors
from dldkit.options import parse

SOURCE = "TED-LIUM 3, talks of TED Conferences (CC BY-NC-ND 3.0)"
SETS = ("train", "dev", "test")
IGNORED = "ignore_time_segment_in_scoring"
# The training segments are cut too closely: Kaldi and ESPnet add this much silence.
BEFORE, AFTER = 0.15, 0.1  # seconds


def find_tedlium(download_dir: str) -> Path:
    """Return the corpus's directory, after a download if $TEDLIUM3 is not set."""
    needed = [f"legacy/{name}" for name in SETS]
    corpus = find_corpus("TEDLIUM3", "TEDLIUM_release-3", needed)
    if corpus is not None:
        return corpus
    from lhotse.recipes.tedlium import download_tedlium

    with downloading("TED-LIUM 3", "TEDLIUM3"):
        return download_tedlium(download_dir).absolute()


def normalise(text: str) -> str:
    """Return a line of an STM file as ESPnet's recipe has it.

    Marks of pronunciation variants, `<sil>` and the talk's name at the end go, `they
    're` becomes `they're`, and `<unk>` becomes `[unk]`.
    """
    text = re.sub(r"\([0-9]\)", "", text).replace("<sil>", "")
    text = re.sub(r"\([^ ]*\)$", "", text)
    words: list[str] = []
    joined = False  # one suffix is joined to each word
    for word in text.translate(str.maketrans("{}<>", "[][]")).split():
        joined = bool(words) and word[0] == "'" and not joined
        if joined:
            words[-1] += word
        else:
            words.append(word)
    return " ".join(words)


def read_stm(path: Path) -> tuple[set[str], dict[str, str], set[str]]:
    """Check an STM file; return its talks, and its segments as lhotse will call them.

    Returns:
        the talks, the segments that are not to be scored, and the others.

    Raises:
        UserError: a line is malformed.
    """
    talks, ignored, others = set(), {}, set()
    for number, line in enumerate(lines_of(path)):
        fields = line.split()
        try:
            talk, start, end = fields[0], float(fields[3]), float(fields[4])
            fields[5]
        except (IndexError, ValueError):
            raise UserError(
                f"{path}, line {number + 1}: expected `talk channel speaker start end "
                f"<label> words`, got {line!r}"
            ) from None
        if not 0 <= start < end:
            raise UserError(
                f"{path}, line {number + 1}: the segment {start}-{end} s is empty"
            )
        talks.add(talk)
        if fields[6:] == [IGNORED]:
            ignored[f"{talk}-{number}"] = IGNORED
        else:
            others.add(f"{talk}-{number}")
    return talks, ignored, others


def check_talks(root: Path, sph: Iterable[str], stm: Iterable[str]) -> None:
    """Refuse a set in which talks lack their audio or their transcript."""
    sph, stm = set(sph), set(stm)
    if sph != stm or not sph:
        lacks = [
            f"{len(talks)} talk(s) have no {kind}, first: {min(talks)}"
            for kind, talks in (("audio (sph)", stm - sph), ("transcript", sph - stm))
            if talks
        ]
        raise UserError(
            f"{root}: {'; '.join(lacks) or 'there are no talks'}: complete the corpus, "
            "or take away what is single"
        )


def pad(segments: list, ends: dict[str, float]) -> None:
    """Add silence around segments, but no further than halfway to the next one.

    Args:
        segments: lhotse's supervisions of a set; they are changed.
        ends: the length of each talk.
    """
    segments.sort(key=lambda s: (s.recording_id, s.start))
    bounds = []
    for index, segment in enumerate(segments):
        start, end = segment.start - BEFORE, segment.end + AFTER
        if index and segments[index - 1].recording_id == segment.recording_id:
            before = segments[index - 1].end
            if before <= segment.start:
                start = max(start, (before + segment.start) / 2)
        if (
            index + 1 < len(segments)
            and segments[index + 1].recording_id == segment.recording_id
        ):
            after = segments[index + 1].start
            if segment.end <= after:
                end = min(end, (segment.end + after) / 2)
        bounds.append((max(0.0, start), min(end, ends[segment.recording_id])))
    for segment, (start, end) in zip(segments, bounds):
        segment.start, segment.duration = start, end - start


def prepare(corpus: Path, data_dir: Path) -> None:
    """Write train, dev and test.

    Raises:
        UserError: transcripts are malformed, or talks lack one half.
    """
    for name in SETS:
        root = corpus / "legacy" / name
        stms, sphs = (stems((root / kind).glob(f"*.{kind}")) for kind in ("stm", "sph"))
        check_talks(root, sphs, stms)
        with preparation(data_dir / name, stms.values(), sphs.values()) as step:
            if not step.done:
                _prepare(corpus, name, stms, data_dir / name)


def _prepare(corpus: Path, name: str, stms: dict[str, Path], directory: Path) -> None:
    from lhotse import SupervisionSegment
    from lhotse.recipes import tedlium

    dropped: dict[str, str] = {}
    for stem, path in stms.items():
        talks, ignored, others = read_stm(path)
        if talks != {stem}:
            raise UserError(
                f"{path}: it is about {' '.join(sorted(talks)) or 'nothing'}"
            )
        dropped.update(ignored)
        dropped.update(dict.fromkeys(others, "it begins after the end of its talk"))
    with reading(tedlium):
        manifests = tedlium.prepare_tedlium(corpus, dataset_parts=name)[name]
    ends = {r.id: r.duration for r in manifests["recordings"]}
    segments: dict[str, SupervisionSegment] = {}
    for segment in manifests["supervisions"]:
        line = segment.id
        del dropped[line]  # lhotse has kept it
        times = (round(100 * time) for time in (segment.start, segment.end))
        segment.id = "-".join([segment.recording_id, *(f"{t:07d}" for t in times)])
        segment.text = normalise(segment.text)
        if segment.id in segments and segments[segment.id].text != segment.text:
            raise UserError(
                f"{stms[segment.recording_id]}: two texts for {segment.id}: remove one"
            )
        if segment.id in segments:
            dropped[line] = f"the same line as {segment.id}"
        segments[segment.id] = segment
    utterances = list(segments.values())
    if name == "train":
        pad(utterances, ends)
    ignored = sum(reason == IGNORED for reason in dropped.values())
    logging.info(f"{name}: {ignored} segments are not to be scored ({IGNORED})")
    from_lhotse(manifests["recordings"], utterances, directory, SOURCE, dropped)


@report_user_errors
def main(cmd=None) -> None:
    """Run stage 1 of the recipe."""
    args = parse(corpus_parser(__doc__), cmd)
    prepare(find_tedlium(args.download_dir), Path(args.data_dir))


if __name__ == "__main__":
    main()
