#!/usr/bin/env python3
"""Common Voice: train_xx, dev_xx and test_xx of a language, as ESPnet divides them."""

import logging
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dldkit.data.corpus import (
    DOWNLOADS,
    Places,
    corpus_parser,
    find_corpus,
    lines_of,
    preparation,
    reading,
)
from dldkit.data.from_lhotse import from_lhotse
from dldkit.errors import UserError, report_user_errors
from dldkit.options import parse

SOURCE = "Common Voice, read by volunteers (CC0)"
# ESPnet trains on all validated clips that are in neither dev nor test.
SPLITS = {"train": "validated", "dev": "dev", "test": "test"}
COLUMNS = "client_id path sentence age gender accents variant".split()  # lhotse's


def find_commonvoice(lang: str) -> Path:
    """Return the directory that holds the language's.

    Raises:
        UserError: it is not there; there is no address to download it from.
    """
    if os.environ.get("COMMONVOICE", "") in ("", DOWNLOADS):
        raise UserError(
            "Common Voice is given to people only, not to scripts: get the archive of "
            f"language {lang} at https://commonvoice.mozilla.org/datasets, unpack it, "
            f"and set COMMONVOICE to the directory that holds {lang}/clips "
            "(cv-corpus-...)"
        )
    home = Path(os.environ["COMMONVOICE"])
    if home.name == lang and (home / "clips").is_dir():
        return home.absolute().parent
    releases = [path.parent for path in home.glob(f"*/{lang}") if path.is_dir()]
    if len(releases) > 1:
        raise UserError(
            f"COMMONVOICE={home} holds several releases with {lang}: set it to one of "
            f"{' '.join(sorted(map(str, releases)))}"
        )
    nested = releases[0].name if releases else lang
    if not releases and (home / lang).is_dir():
        nested = "."
    tables = [f"{lang}/{split}.tsv" for split in SPLITS.values()]
    needed = [f"{lang}/clips", *tables]
    return find_corpus("COMMONVOICE", nested, needed, download=False)


def read_tsv(path: Path) -> Places:
    """Return where the line of each clip is, by the clip's name without suffix.

    Raises:
        UserError: lhotse's recipe could not read it, or a clip is there twice.
    """
    header, *rows = [line.split("\t") for line in lines_of(path)] or [[]]
    lacking = [name for name in COLUMNS if name not in header]
    if lacking:
        raise UserError(
            f"{path} has no column {' '.join(lacking)}: take a newer release of Common "
            "Voice"
        )
    said = Places()
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise UserError(
                f"{path}, line {number}: it has {len(row)} columns in place of "
                f"{len(header)}; mend or remove it"
            )
        said[Path(row[header.index("path")]).stem] = f"line {number} of {path}"
    return said


def prepare(lang: str, corpus: Path, data_dir: Path, nj: int) -> None:
    """Write train, dev and test of a language.

    Raises:
        UserError: a table is malformed, or nothing is left.
    """
    tables = {s: corpus / lang / f"{s}.tsv" for s in SPLITS.values()}
    said = {split: read_tsv(path) for split, path in tables.items()}
    held_out = said["dev"].keys() | said["test"].keys()
    with os.scandir(corpus / lang / "clips") as entries:
        clips = {entry.name for entry in entries}
    for name, split in SPLITS.items():
        directory = data_dir / f"{name}_{lang.replace('-', '_')}"
        with preparation(directory, tables.values(), clips) as step:
            if not step.done:
                wanted = said[split].keys() - (held_out if name == "train" else set())
                places = {clip: said[split][clip] for clip in wanted}
                _prepare(lang, split, corpus, directory, places, nj)


def _prepare(
    lang: str,
    split: str,
    corpus: Path,
    directory: Path,
    said: dict[str, str],
    nj: int,
) -> None:
    from lhotse.recipes import commonvoice

    def threads(max_workers: int, mp_context) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max_workers)  # processes would not know `reading`

    with (
        tempfile.TemporaryDirectory() as manifests_dir,
        reading(commonvoice, ProcessPoolExecutor=threads),
    ):
        try:
            manifests = commonvoice.prepare_commonvoice(
                corpus, manifests_dir, lang, [split], nj
            )[lang][split]
        except AssertionError as error:  # lhotse's word for nothing that is left
            raise UserError(f"{corpus / lang}, {split}.tsv: {error}") from None
    dropped, kept = {}, []
    for clip in manifests["supervisions"]:
        if clip.id not in said:
            continue
        clip.text = clip.text.upper()
        if "{" in clip.text and "}" in clip.text:
            dropped[clip.id] = "a placeholder in braces in its text"
        else:
            kept.append(clip)
    found = {clip.id for clip in kept} | dropped.keys()
    dropped |= {id_: f"no audio for {said[id_]}" for id_ in said.keys() - found}
    logging.info(f"{split}: {len(said)} clips, {len(kept)} of them to be used")
    from_lhotse(manifests["recordings"], kept, directory, SOURCE, dropped)


@report_user_errors
def main(cmd=None) -> None:
    """Run stage 1 of the recipe."""
    parser = corpus_parser(__doc__, nj=2)
    lang = os.environ.get("DLDKIT_LANG", "en")  # as run.sh says
    parser.add_argument("--lang", default=lang, help="language, as en or zh-CN")
    args = parse(parser, cmd)
    corpus = find_commonvoice(args.lang)
    prepare(args.lang, corpus, Path(args.data_dir), args.nj)


if __name__ == "__main__":
    main()
