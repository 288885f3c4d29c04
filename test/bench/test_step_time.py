"""The bench of distillation steps, at a size where it takes seconds."""

import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench/step_time.py"
CASES = ["live", "cached", "frozen", "frozen cached", "features"]
# the student of digits hears a second
CHANNELS = [1, 32, 32, 64, 64, 96, 96, 96]
KERNELS = [10, 3, 3, 3, 3, 2, 2]
FRAMES = [3199, 1599, 799, 399, 199, 99, 49]
WIDTH, FFN = 96, 384


@pytest.fixture(scope="module")
def measured(python, tmp_path_factory):
    ratios = tmp_path_factory.mktemp("bench") / "ratios.json"
    small = "--batch_size 1 --seconds 1 --rounds 1 --num_threads 1 --trace"
    process = python(SCRIPT, *small.split(), "--output_json", ratios)
    return json.loads(ratios.read_text()), process.stdout


def gflop(of_a_second, case, depth):
    return of_a_second["arithmetic"][case][str(depth)]


def test_arithmetic_is_that_of_what_runs(measured):
    found, _ = measured
    cnn = 2e-9 * sum(
        frames * kernel * inputs * outputs
        for frames, kernel, inputs, outputs in zip(
            FRAMES, KERNELS, CHANNELS, CHANNELS[1:]
        )
    )
    layer = 2e-9 * FRAMES[-1] * (4 * WIDTH**2 + 2 * WIDTH * FFN)
    for depth in (3, 6, 9, 12):
        live, cached, frozen, frozen_cached, features = (
            gflop(found, case, depth) for case in CASES
        )
        assert frozen_cached - features == pytest.approx(cnn)
        # the teacher costs the same; frozen, its CNN is the student's
        assert live - cached == pytest.approx(frozen - features)
        # backward, of which transformers wants the gradient of the speech, too
        assert cached - frozen_cached == pytest.approx(2 * cnn)
    for case in CASES:  # attention's two products are a tenth
        three = gflop(found, case, 12) - gflop(found, case, 9)
        assert 9 * layer < three < 10.5 * layer


def test_ratios_and_tables(measured):
    found, printed = measured
    for of in (found, *(found[case] for case in CASES if case != "cached")):
        assert of["depths"]["12"] == 1.0 and set(of["schedules"]) == {"equal", "prop1"}
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if "|" in line]
    assert rows[2 : 2 + len(CASES)] == CASES
    assert "aten::addmm" in rows
