"""Each corpus in its real layout, made small from recordings."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

RATE = 16000
WORDS = ["ONE TWO", "THREE", "FOUR FIVE"]


@dataclass
class Layout:
    """A small corpus; the second of three entries of its training set is spoilt.

    Attributes:
        audio: the training set's files.
        transcript: the file with the line of the second.
        line: that line, and `empty` without its words.
        ids: the utterances of the training set, by file.
    """

    variable: str
    home: Path
    train: str
    audio: list[Path]
    transcript: Path
    line: str
    empty: str
    ids: list[list[str]]

    def replace(self, old: str, new: bytes) -> None:
        content = self.transcript.read_bytes()
        assert content.count(old.encode()) == 1
        self.transcript.write_bytes(content.replace(old.encode(), new))


def as_ffmpeg_streams(mp3: bytes) -> bytes:
    """Put a tag in front, and take away the first frame, which says the length.

    Common Voice's clips are like that: ffmpeg wrote them to a pipe.
    """
    software = b"TSSE\0\0\0\x0f\0\0\x03Lavf58.29.100\0"
    tag = b"ID3\x04\0\0\0\0\0" + bytes([len(software) + 10]) + software + bytes(10)
    return tag + mp3[mp3.find(mp3[:2], 4) :]


def write(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    """Write a file of the kind that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".mp3":
        how = dict(bitrate_mode="CONSTANT", compression_level=0.5)
        soundfile.write(path, samples, rate, format="MP3", **how)
        path.write_bytes(as_ffmpeg_streams(path.read_bytes()))
    else:
        kind = "NIST" if path.suffix == ".sph" else None
        soundfile.write(path, samples, rate, "PCM_16", format=kind)
    return path


def librispeech(
    root: Path, speech: list[np.ndarray], training: str = "train-clean-100"
) -> Layout:
    home = root / "LibriSpeech"
    for number, split in enumerate(
        f"dev-clean dev-other test-clean test-other {training}".split()
    ):
        folder = home / split / str(number) / "7"
        ids = [f"{number}-7-000{i}" for i in range(3)]
        files = [write(folder / f"{id_}.flac", s) for id_, s in zip(ids, speech)]
        lines = [f"{id_} {words}" for id_, words in zip(ids, WORDS)]
        text = folder / f"{number}-7.trans.txt"
        text.write_text("\n".join(lines))  # some lack the final newline
        if split.startswith("train"):
            train = files, text, lines[1], ids[1], [[id_] for id_ in ids]
    return Layout("LIBRISPEECH", root, "train_clean_100", *train)


def tedlium3(root: Path, speech: list[np.ndarray]) -> Layout:
    home = root / "TEDLIUM_release-3" / "legacy"
    for part in ("train", "dev", "test"):
        talks = [f"{part.title()}Speaker{i}_2014" for i in range(3)]
        files, ids, stms = [], [], []
        for talk, samples in zip(talks, speech):
            files.append(write(home / part / "sph" / f"{talk}.sph", samples))
            head, label = f"{talk} 1 {talk}", "<o,f0,male>"
            lines = [
                f"{head} 0.00 0.05 {label} ignore_time_segment_in_scoring",
                f"{head} 0.05 0.40 {label} they 're here(2) <sil> {{NOISE}} <unk>",
                f"{head} 0.40 0.70 {label} it 's",
            ]
            stms.append(home / part / "stm" / f"{talk}.stm")
            stms[-1].parent.mkdir(exist_ok=True)
            stms[-1].write_text("\n".join(lines) + "\n")
            ids.append([f"{talk}-0000005-0000040", f"{talk}-0000040-0000070"])
            if part == "train" and talk == talks[1]:
                line = lines[2], f"{head} 0.40 0.70 {label}"
        if part == "train":
            train = files, stms[1], *line, ids
    return Layout("TEDLIUM3", root, "train", *train)


def an4(root: Path, speech: list[np.ndarray], dev: int = 1) -> Layout:
    home = root / "an4"
    # the first `dev` in order are the development set
    for part, folder, first, others in (
        ("train", "an4_clstk", [f"a{i:03}" for i in range(dev)], "fash mwhw zzzz"),
        ("test", "an4test_clstk", ["fcaw"], "mmxg menk zaaa"),
    ):
        speakers = [*first, *others.split()]
        names = [f"an{250 + i}-{s}-b" for i, s in enumerate(speakers)]
        recordings = [*[speech[0]] * len(first), *speech]
        words = [*[WORDS[0]] * len(first), *WORDS]
        files = [
            write(home / "wav" / folder / s / f"{name}.sph", samples)
            for s, name, samples in zip(speakers, names, recordings)
        ]
        marks = ("<s> ", " </s>") if part == "train" else ("", "")
        lines = [f"{said.join(marks)} ({name})" for name, said in zip(names, words)]
        text = home / "etc" / f"an4_{part}.transcription"
        text.parent.mkdir(exist_ok=True)
        text.write_text("\n".join(lines) + "\n")
        if part == "train":
            ids = [[f"{s}-{n.split('-')[0]}-b"] for s, n in zip(speakers, names)]
            empty = f"<s> </s> ({names[dev + 1]})"
            train = files[dev:], text, lines[dev + 1], empty, ids[dev:]
    return Layout("AN4", root, "train_nodev", *train)


def commonvoice(root: Path, speech: list[np.ndarray]) -> Layout:
    home = root / "cv-corpus-99.0" / "cy"
    header = "client_id path sentence up_votes down_votes age gender accents variant"
    rows: dict[str, list[str]] = {}
    for part in ("train", "dev", "test"):
        names = [f"common_voice_cy_{part}{i}" for i in range(3)]
        values = ["2", "1", "", "", "", ""]
        files = [write(home / "clips" / f"{n}.mp3", s) for n, s in zip(names, speech)]
        rows[part] = [
            "\t".join([f"c{name}", f"{name}.mp3", f"“{words.lower()}” ŵ", *values])
            for name, words in zip(names, WORDS)
        ]
        if part == "train":
            line = rows[part][1]
            empty = line.replace("“three” ŵ", "")
            train = files, home / "validated.tsv", line, empty, [[n] for n in names]
    rows["validated"] = [*rows["train"], *rows["dev"], *rows["test"]]
    for name, lines in rows.items():
        text = "\n".join(["\t".join(header.split()), *lines]) + "\n"
        (home / f"{name}.tsv").write_text(text, encoding="utf-8")
    return Layout("COMMONVOICE", root, "train_cy", *train)


def aishell(root: Path, speech: list[np.ndarray]) -> Layout:
    home = root / "data_aishell"
    lines = []
    for number, part in enumerate(("train", "dev", "test")):
        ids = [f"BAC009S000{number}W012{i}" for i in range(3)]
        files = [
            write(home / "wav" / part / f"S000{number}" / f"{id_}.wav", samples)
            for id_, samples in zip(ids, speech)
        ]
        lines += [f"{id_} 广州 市 房{i}" for i, id_ in enumerate(ids)]
        if part == "train":
            train = files, [[id_] for id_ in ids], lines[1], ids[1]
    text = home / "transcript" / "aishell_transcript_v0.8.txt"
    text.parent.mkdir()
    text.write_text("\n".join(lines) + "\n", encoding="utf-8")
    files, ids, line, empty = train
    return Layout("AISHELL", root, "train", files, text, line, empty, ids)


def librispeech_960(root: Path, speech: list[np.ndarray]) -> Layout:
    return librispeech(root, speech, "train-clean-360 train-other-500 train-clean-100")


CORPORA: dict[str, Callable[[Path, list[np.ndarray]], Layout]] = {
    "librispeech_100": librispeech,
    "librispeech": librispeech_960,
    "tedlium3": tedlium3,
    "an4": an4,
    "commonvoice": commonvoice,
    "aishell": aishell,
}
