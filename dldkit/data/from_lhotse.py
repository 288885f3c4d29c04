"""Data directories from lhotse's recordings and supervisions."""

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from dldkit.data.datadir import Table, report_dropped, write_data_dir
from dldkit.errors import UserError

if TYPE_CHECKING:  # importing lhotse takes seconds
    from lhotse import Recording, SupervisionSegment

PathLike = str | Path

SAME_TIME = 0.001  # seconds within which a supervision is its whole recording


def from_lhotse(
    recordings: Iterable["Recording"],
    supervisions: Iterable["SupervisionSegment"],
    directory: PathLike,
    source: str | None = None,
    dropped: Table | None = None,
) -> int:
    """Write a data directory: `wav.scp`, `text`, `utt2spk`, and `segments` if needed.

    Utterances are named by their supervisions, and `segments` is left out when each of
    them is a whole recording of its own. Channels are mixed, unless supervisions name
    them. Supervisions without a recording are dropped with a note. The audio is not
    opened: stage 3 drops what can not be read.

    Args:
        source: the line that names the corpus, for `corpus_source`.
        dropped: what the corpus's preparation has left out already, and why; it is
            listed in `dropped.txt` as well.

    Returns:
        how many utterances there are.

    Raises:
        UserError: an id is there twice, a recording is not one whole file or command,
            an utterance is in some of its channels, or nothing is left.
    """
    directory = Path(directory)
    dropped = dict(dropped or {})
    by_id: dict[str, Recording] = {}
    for recording in recordings:
        if recording.id in by_id:
            raise UserError(
                f"{directory}: recording {recording.id} is there twice: "
                f"{_entry(by_id[recording.id])} and {_entry(recording)}; remove one"
            )
        by_id[recording.id] = recording
    kept: dict[str, SupervisionSegment] = {}
    for supervision in supervisions:
        utt = word(supervision.id)
        if utt in kept:
            raise UserError(
                f"{directory}: utterance {utt} is there twice: {kept[utt].text!r} and "
                f"{supervision.text!r}; remove one"
            )
        if supervision.recording_id in by_id:
            kept[utt] = supervision
        else:
            dropped[utt] = f"no audio: there is no recording {supervision.recording_id}"
    report_dropped(directory, dropped, len(kept) + len(dropped))
    if not kept:
        raise UserError(f"{directory}: there are no utterances to write")
    channels = _channels(kept, by_id, directory)

    used = {s.recording_id: by_id[s.recording_id] for s in kept.values()}
    tables: dict[str, Table] = {
        "text": {utt: _line(s.text) for utt, s in kept.items()},
        "utt2spk": {utt: word(s.speaker or utt) for utt, s in kept.items()},
    }
    if not any(tables["text"].values()):
        del tables["text"]  # speech without transcripts
    (directory / "segments").unlink(missing_ok=True)
    if not channels and _are_whole(kept.values(), by_id):
        tables["wav_scp"] = {u: _entry(by_id[s.recording_id]) for u, s in kept.items()}
    else:
        names = _names_of(used, directory)
        tables["wav_scp"] = {names[id_]: _entry(used[id_]) for id_ in used}
        tables["segments"] = {
            utt: f"{names[s.recording_id]} {s.start:.6f} {s.end:.6f} "
            f"{channels.get(utt, '')}".rstrip()
            for utt, s in kept.items()
        }
    write_data_dir(directory, source, **tables)
    logging.info(f"{directory}: {len(kept)} utterances of {len(used)} recordings")
    return len(kept)


def word(text: str) -> str:
    """Return an id that is one word: tables separate their columns by spaces."""
    return re.sub(r"\s+", "_", text.strip())


def _line(text: str | None) -> str:
    return " ".join((text or "").split())


def _entry(recording: "Recording") -> str:
    """Return what `wav.scp` says of a recording.

    Raises:
        UserError: it is in memory or on a server, in several files, or to be changed.
    """
    changes = [change["name"] for change in _transforms(recording)]
    if changes:
        raise UserError(
            f"recording {recording.id} is to be changed by lhotse ({changes[0]}): save "
            "the changed audio to a file first (Recording.save_audio)"
        )
    if len(recording.sources) != 1:
        raise UserError(
            f"recording {recording.id} lies in {len(recording.sources)} files: put its "
            "channels into one file first (Recording.save_audio)"
        )
    (source,) = recording.sources
    if source.type == "command":
        return f"{source.source} |"
    if source.type != "file":
        raise UserError(
            f"recording {recording.id} is no file but a {source.type}: save it to a "
            "file first (Recording.save_audio)"
        )
    return str(Path(source.source).absolute())


def _transforms(recording: "Recording") -> list[dict]:
    """Return lhotse's changes to a recording, but for resampling: stage 3 does that."""
    changes = [
        change if isinstance(change, dict) else change.to_dict()
        for change in recording.transforms or []
    ]
    return [change for change in changes if change["name"] != "Resample"]


def _are_whole(
    supervisions: Iterable["SupervisionSegment"], by_id: dict[str, "Recording"]
) -> bool:
    seen = Counter(s.recording_id for s in supervisions)
    return all(count == 1 for count in seen.values()) and all(
        abs(s.start) < SAME_TIME
        and abs(s.duration - by_id[s.recording_id].duration) < SAME_TIME
        for s in supervisions
    )


def _names_of(ids: Iterable[str], directory: Path) -> Table:
    """Return a name of one word for each recording."""
    names = {id_: word(id_) for id_ in ids}
    for name, count in Counter(names.values()).items():
        if count > 1:
            raise UserError(
                f"{directory}: {count} recordings would be called {name}: rename them"
            )
    return names


def _channels(
    kept: dict[str, "SupervisionSegment"],
    by_id: dict[str, "Recording"],
    directory: Path,
) -> dict[str, int]:
    """Return the channels, from 0, of utterances that are in one of several.

    Raises:
        UserError: an utterance is in some channels of several.
    """
    channels: dict[str, int] = {}
    used: dict[str, set[int | None]] = defaultdict(set)
    for utt, supervision in kept.items():
        there = by_id[supervision.recording_id].channel_ids
        named = supervision.channel
        named = set(named if isinstance(named, list) else [named])
        if len(there) == 1 or named == set(there):
            used[supervision.recording_id].add(None)
        elif len(named) == 1 and named < set(there):
            (channel,) = named
            channels[utt] = there.index(channel)
            used[supervision.recording_id].add(channel)
        else:
            raise UserError(
                f"{directory}: utterance {utt} is in channels {sorted(named)} of "
                f"recording {supervision.recording_id}, which has {there}: name one of "
                "them, or all, to be mixed"
            )
    # 0 is lhotse's default: where all utterances have it, it says nothing
    return {
        utt: channel
        for utt, channel in channels.items()
        if used[kept[utt].recording_id] != {0}
    }
