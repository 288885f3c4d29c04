"""The table row."""

import json
from importlib.resources import files

import pytest

from dldkit.bin.sfm_superb_table import main
from dldkit.errors import UserError
from dldkit.sfm.superb.results import (
    COLUMNS,
    PUBLISHED,
    collect,
    collect_all,
    superb_score,
)
from dldkit.sfm.superb.tasks import TASKS


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split("|")]


def test_row_has_the_order_of_superbs_table(tmp_path):
    header, _, row = collect(tmp_path, "student").splitlines()[:3]
    names = "upstream params, GMACs PR KS IC SID ER ASR QbE SF SF ASV SD SUPERB".split()
    assert [cell.split()[0] for cell in cells(header)] == names
    assert cells(row) == ["student", *"–" * 14]


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
    expected = "hubert – – 5.41 – – – 65.00 – – 88.53 25.20 5.11 5.88"
    assert cells(table.splitlines()[2])[:-1] == expected.split()
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
    assert cells(table.splitlines()[2])[3:7] == "20.00 50.00 – 50.00".split()
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
    assert cells(table.splitlines()[2])[7] == "60.00"
    assert "ER: learning rate 0.001, of 0.001, 0.01, 0.1 the best" in table


# The scores that the leaderboard itself showed, all tasks taken: see
# github.com/pyf98/DPHuBERT/blob/c18093f/imgs/dphubert-superb-score.png
LEADERBOARD = {
    "WavLM Large": 1145,
    "WavLM Base+": 1106,
    "WavLM Base": 1019,
    "HuBERT Base": 941,
    "DPWavLM": 926,
    "HuBERT Large": 919,
    "DPHuBERT": 866,
    "wav2vec 2.0 Base": 818,
}


def test_superb_scores_are_those_of_the_leaderboard():
    rows = {row["upstream"]: row["scores"] for row in PUBLISHED["rows"]}
    found = {
        name: superb_score(dict(zip(COLUMNS, rows[name])), list(TASKS))
        for name in LEADERBOARD
    }
    # it rounds scores that are not rounded to two digits, as ours are
    assert found == {name: pytest.approx(s, abs=0.6) for name, s in LEADERBOARD.items()}


def test_every_published_row_is_complete_and_has_a_source():
    assert files("dldkit.sfm.superb").joinpath("published.yaml").is_file()
    for row in PUBLISHED["rows"]:
        assert row["source"] in PUBLISHED["sources"], row
        assert len(row["scores"]) == len(COLUMNS) == 11, row


def test_one_table_of_many_has_published_rows_and_their_sources(
    tmp_path, finished, capsys
):
    """Scored over the tasks that all of ours have: half-way is 500."""
    best = "evaluate/valid_best/test/result.yaml"
    zero, thousand = (
        dict(zip(COLUMNS, PUBLISHED["score"][k])) for k in ("zero", "thousand")
    )
    column = "ASR WER ↓"
    middle = (zero[column] + thousand[column]) / 200
    for name in ("one", "two"):
        finished(tmp_path / name / "asr", best, wer=middle)
    finished(tmp_path / "two" / "ks", best, accuracy=0.9)
    (tmp_path / "one" / "cost").mkdir()
    cost = dict(parameters=26_870_000, macs=34_560_000_000)
    (tmp_path / "one" / "cost" / "cost.json").write_text(json.dumps(cost))
    places = [str(tmp_path / name) for name in ("one", "two")]
    for place, name in zip(places, ("student", "teacher")):
        collect(place, name)

    main(places)

    table = capsys.readouterr().out
    header, _, *rows = (cells(x) for x in table.splitlines() if x.startswith("|"))
    assert header[-2:] == ["SUPERB score (ASR) ↑", "source"]
    assert rows[0][:3] == ["student", "26.87", "34.6"]
    assert [row[-2:] for row in rows[:2]] == [["500", place] for place in places]
    published = {row[0]: row for row in rows[2:]}
    assert len(published) == len(PUBLISHED["rows"])
    assert published["FBANK"][-2:] == ["0", "leaderboard"]
    assert published["DPHuBERT"][1:4] == ["23.59", "–", "9.67"]
    assert published["DPHuBERT"][-1] == "DPHuBERT" and "arXiv 2305.17651" in table
    with pytest.raises(UserError, match="has no superb.json: run python -m dldkit.bin"):
        collect_all([tmp_path])
