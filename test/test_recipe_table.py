"""The table of egs2/README.md: a row for each recipe, and a recipe for each row."""

import re
from pathlib import Path

import pytest
import yaml

EGS = Path(__file__).resolve().parents[1] / "egs2"
COLUMNS = [
    "recipe",
    "corpus",
    "hours",
    "licence",
    "variable",
    "size on disk",
    "stages run in tests",
    "published score",
    "ours",
]


def read_rows() -> list[dict[str, str]]:
    # other tables follow under headings of their own
    text = (EGS / "README.md").read_text(encoding="utf-8").partition("\n## ")[0]
    lines = text.splitlines()
    table = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in row] for row in table]
    assert header == COLUMNS
    return [dict(zip(header, row, strict=True)) for row in rows]


ROWS = read_rows()


def directory(row: dict[str, str]) -> Path:
    name, target = re.fullmatch(r"\[(.*)\]\((.*)\)", row["recipe"]).groups()
    assert name == target
    return EGS / target


def test_every_recipe_has_a_row_and_every_row_a_recipe():
    recipes = {path.parent for path in EGS.glob("*/*/run.sh")}
    assert len(recipes) == len(ROWS) > 10
    assert {directory(row) for row in ROWS} == recipes


@pytest.mark.parametrize("row", ROWS, ids=lambda row: directory(row).parent.name)
def test_a_row_is_true_of_its_recipe(row):
    recipe = directory(row)
    assert all(row.values())  # what is not known is said to be so
    for name in ("run.sh", "path.sh", "local/data.sh", "local/data.py", "README.md"):
        assert (recipe / name).is_file()
    (config,) = recipe.glob("conf/train_[as][sf][rm].yaml")
    assert yaml.safe_load(config.read_text())
    sources = [recipe / "db.sh", recipe / "local" / "data.py"]
    texts = [path.read_text() for path in sources if path.is_file()]
    for variable in re.findall(r"`\$(\w+)`", row["variable"]):
        assert any(re.search(rf"\b{variable}\b", text) for text in texts)
    if "`$" not in row["variable"]:
        assert row["variable"] == "none"
    readme = (recipe / "README.md").read_text(encoding="utf-8")
    if row["ours"] == "not run":
        assert re.search("[Nn]ot run|have not run|No run", readme)
    for score in re.findall(r"\d+\.\d+", row["published score"]):
        assert score in readme


CONFIGS = sorted(EGS.glob("*/*/conf/train_*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: "/".join(path.parts[-4:]))
def test_a_config_begins_with_hardware_hours_and_error_rate(config):
    comment = re.match(r"((?:# .*\n)+)", config.read_text())[1].lower()
    assert "hardware" in comment and "hours" in comment
    assert "wer" in comment or "cer" in comment
    assert "not measured" in comment or re.search(r"\d %", comment)
