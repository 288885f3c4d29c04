"""The bench of training steps, at a size where it takes seconds."""

import json
import re
from pathlib import Path

import pytest
import yaml

SCRIPT = Path(__file__).parents[2] / "bench/train_step.py"
SYSTEMS = (
    "early_exit dld_paper:cached nested:cached anytime:live anytime:cached anytime:self"
)


@pytest.fixture(scope="module")
def measured(corpus, python, tmp_path_factory):
    directory = tmp_path_factory.mktemp("bench")
    config, ratios = directory / "train.yaml", directory / "ratios.json"
    sizes = {**corpus.config["encoder_conf"], "num_blocks": 12}
    config.write_text(
        yaml.safe_dump(
            {**corpus.config, "encoder": "ld_conformer", "encoder_conf": sizes}
        )
    )
    command = [SCRIPT, "--config", config, "--systems", SYSTEMS]
    small = "--batch_size 2 --seconds 1 --text_length 3 --vocab_size 8 --rounds 1"
    process = python(*command, *small.split(), "--trace", "--output_json", ratios)
    return json.loads(ratios.read_text()), process.stdout


def test_depths_stand_for_what_is_drawn(measured):
    found, _ = measured
    assert found["static"]["depths"] == found["early_exit"]["depths"] == [12]
    assert found["anytime:live"]["depths"] == [2, 6, 8, 12]  # their mean is 7.0
    assert found["nested:cached"]["depths"] == [2, 5, 8, 11]  # 6.5
    assert found["dld_paper:cached"]["depths"] == [4, 5, 7, 8]  # 6.0, of Bernoulli


def test_arithmetic_is_that_of_what_runs(measured):
    found, _ = measured
    paper, _, live, cached, own = (
        found[name]["arithmetic"] for name in SYSTEMS.split() if name != "early_exit"
    )
    assert found["static"]["arithmetic"] == [1.0]
    # a layer costs the same wherever it is, and a frozen reference its forward alone
    by_depth = dict(zip(found["dld_paper:cached"]["depths"], paper))
    assert by_depth[5] - by_depth[4] == pytest.approx(by_depth[8] - by_depth[7])
    full = by_depth[8] + 4 * (by_depth[5] - by_depth[4])
    assert full == pytest.approx(1.0)
    assert [a - b for a, b in zip(live, cached)] == pytest.approx([1 / 3] * 4)
    # exits add their heads, and self runs all layers whatever is drawn
    assert cached[2] > by_depth[8]
    assert min(own) >= found["early_exit"]["arithmetic"][0] > 1.0


def test_table_has_each_system(measured):
    found, printed = measured
    printed, of_operations = printed.split("| operation")
    assert "anytime:self, %" in of_operations
    assert re.search(r"\| aten::\w+ +\| +\d+\.\d", of_operations)
    assert all(len(of["times"]) == len(of["depths"]) for of in found.values())
    assert all(of["kept_bytes"] > 0 for of in found.values())
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert (
        [row.split()[1] for row in rows[1:]]
        == list(found)
        == [
            "static",
            *SYSTEMS.split(),
        ]
    )
