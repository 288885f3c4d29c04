"""AN4's transcripts, which the recipes an4 and mini_an4 read."""

import re
from pathlib import Path

from dldkit.data.corpus import Places, lines_of
from dldkit.errors import UserError

SENTENCE = re.compile(r"(?:<s>)?\s*(.*?)\s*(?:</s>)?\s*\((\S+)\)")


def read_transcripts(path: Path) -> dict[str, str]:
    """Return `file id -> words` of AN4's own `<s> WORDS </s> (id)` lines.

    Raises:
        UserError: a line is malformed, or a file is there twice.
    """
    transcripts, places = {}, Places()
    for number, line in enumerate(lines_of(path), 1):
        if not line.strip():
            continue
        match = SENTENCE.fullmatch(line.strip())
        if match is None:
            raise UserError(
                f"{path}, line {number}: expected `WORDS (id)`, got {line!r}"
            )
        places[match[2]] = f"line {number} of {path}"
        transcripts[match[2]] = match[1]
    return transcripts
