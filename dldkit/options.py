"""How the commands read their options."""

import argparse


def depth_list(text: str) -> list[int]:
    """Read numbers of layers, each once: `12 6 2`, or `12,6,2`."""
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise argparse.ArgumentTypeError(
            f'{text!r}: write numbers of layers, such as "12 6 2"'
        )
    return list(dict.fromkeys(int(word) for word in words))
