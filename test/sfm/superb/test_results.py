"""The table row."""

import json

import pytest

from dldkit.sfm.superb.results import collect


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split("|")]


def test_row_has_the_order_of_superbs_table(tmp_path):
    header, _, row = collect(tmp_path, "student").splitlines()
    names = "upstream PR KS IC SID ER ASR QbE SF SF ASV SD".split()
    assert [cell.split()[0] for cell in cells(header)] == names
    assert cells(row) == ["student", *"–" * 11]


def test_row_is_in_percent_and_averages_folds(tmp_path, finished):
    best = "evaluate/valid_best/test-clean/result.yaml"
    finished(tmp_path / "pr", best, per=0.0541)
    finished(tmp_path / "sf", best, slot_type_f1=0.8853, slot_value_cer=0.252, wer=1)
    finished(tmp_path / "er" / "fold0", best, accuracy=0.6)
    finished(tmp_path / "er" / "fold3", best, accuracy=0.7)
    finished(tmp_path / "asv", "evaluate/test_trial/best_result.yaml", EER=0.0511)
    args = ["--train.total_steps", "9"]
    finished(tmp_path / "sd", "evaluate/valid_best/test/dscore.yaml", args, der=5.88)
    (tmp_path / "ks").mkdir()  # under way
    table = collect(tmp_path, "hubert")
    expected = "hubert 5.41 – – – 65.00 – – 88.53 25.20 5.11 5.88"
    assert cells(table.splitlines()[2]) == expected.split()
    assert "ER: only fold0 fold3 of 5 folds" in table
    assert "SD: not SUPERB's settings, but with --train.total_steps 9" in table
    assert (tmp_path / "superb.md").read_text().strip() == table
    scores = json.loads((tmp_path / "superb.json").read_text())["scores"]
    assert scores["PR PER ↓"] == pytest.approx(5.41) and scores["KS acc ↑"] is None


def test_a_learning_rate_is_chosen_on_the_dev_set(tmp_path, finished):
    """Whatever the test set says; the direction is that of the task's first score."""
    best = "evaluate/valid_best/test/result.yaml"
    finished(tmp_path / "pr", best, dev=dict(per=0.3), per=0.1)
    for rate, dev, test in ((0.001, 0.1, 0.2), (0.0005, 0.2, 0.15)):
        place, options = tmp_path / "pr" / f"lr{rate:g}", dict(lr=rate)
        finished(place, best, options=options, dev=dict(per=dev), per=test)
    for rate, dev, test in ((0.01, 0.6, 0.5), (0.1, 0.4, 0.9)):
        place, options = tmp_path / "sid" / f"lr{rate:g}", dict(lr=rate)
        finished(place, best, options=options, dev=dict(accuracy=dev), accuracy=test)
    place = tmp_path / "ks" / "lr0.01"
    finished(place, best, options=dict(lr=0.01), accuracy=0.5)
    table = collect(tmp_path, "hubert")
    assert cells(table.splitlines()[2]) == "hubert 20.00 50.00 – 50.00".split() + (
        ["–"] * 7
    )
    rates = "learning rate 0.001, of s3prl's own, 0.0005, 0.001 the best on the dev set"
    assert f"PR: {rates}\n" in table and "KS: learning rate 0.01\n" in table
    assert "SID: learning rate 0.01, of 0.01, 0.1 the best on the dev set" in table


def test_a_learning_rate_is_chosen_for_all_folds_of_er(tmp_path, finished):
    best = "evaluate/valid_best/test/result.yaml"
    for rate, folds in ((0.01, (0.9, 0.1)), (0.001, (0.6, 0.6)), (0.1, (0.99,))):
        for number, dev in enumerate(folds):
            place = tmp_path / "er" / f"lr{rate:g}" / f"fold{number}"
            options = dict(lr=rate)
            finished(place, best, options=options, dev=dict(accuracy=dev), accuracy=dev)
    table = collect(tmp_path, "hubert")
    assert cells(table.splitlines()[2])[5] == "60.00"
    assert "ER: learning rate 0.001, of 0.001, 0.01, 0.1 the best" in table
