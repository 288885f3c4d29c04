"""The bench of decoding, at a size where it takes seconds."""

import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench/decode.py"


def test_ratios_are_those_of_what_was_measured(corpus, python, tmp_path):
    ratios = tmp_path / "ratios.json"
    small = "--num_blocks 2 --output_size 16 --vocab 40 --utts 4 --batch_size 2"
    rounds = "--rounds 1 --espnet_utts 1 --espnet_rounds 1"
    command = [SCRIPT, "--speech", corpus.train, "--output_json", ratios]
    printed = python(*command, *small.split(), *rounds.split()).stdout

    found = json.loads(ratios.read_text())
    seconds = found.pop("seconds")
    assert all(value > 0 for value in seconds.values())
    assert found == pytest.approx(
        {
            "greedy_of_encoder": seconds["greedy"] / seconds["encoder"],
            "greedy_of_encode": seconds["greedy"] / seconds["frontend and encoder"],
            "espnet_of_greedy": seconds["ESPnet"] / seconds["greedy, one by one"],
        }
    )
    assert "4 utterances" in printed and "batches of 2" in printed
    tokens = int(printed.split(" tokens")[0].split()[-1])
    assert tokens > 0  # ESPnet's search has something to find
    assert set(seconds) <= {line.partition("  ")[0] for line in printed.splitlines()}


def test_recordings_are_needed(python, tmp_path):
    process = python(SCRIPT, "--speech", tmp_path, status=1)
    assert "it holds no .flac or .wav file" in process.stderr
