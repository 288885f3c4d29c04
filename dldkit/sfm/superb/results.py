"""The scores of finished tasks, and the table row that they are."""

import json
from pathlib import Path
from typing import Any, Optional, Union

import yaml

from dldkit.errors import UserError
from dldkit.report.tables import markdown
from dldkit.sfm.superb.tasks import TASKS


def scores_of(task: str, directory: Path) -> dict[str, float]:
    """Return the task's columns in percent, as its result file has them.

    Raises:
        UserError: there is no result, or there are several.
    """
    files = sorted(directory.glob(TASKS[task].result))
    if len(files) != 1:
        raise UserError(
            f"{task}: {directory / TASKS[task].result} are {len(files)} files, and the "
            "table needs one test set; see superb.log beside it"
        )
    result = yaml.safe_load(files[0].read_text())
    return {
        column: factor * float(result[key])
        for column, (key, factor) in TASKS[task].columns.items()
    }


def directory_of(task: str, output_dir: Path, rate: Optional[float]) -> Path:
    """Return where a task is trained; without a learning rate, with s3prl's."""
    return output_dir / task / (f"lr{rate:g}" if rate is not None else "")


def finished_of(task: str, output_dir: Path) -> dict[Path, list[Path]]:
    """Return what is finished of a task: its folds, by the directory of their rate.

    A task without folds has a single one, which is that directory itself.
    """
    place = directory_of(task, output_dir, None)
    found = {}
    for directory in [place, *sorted(place.glob("lr*"))]:
        folds = sorted(directory.glob("fold*")) if TASKS[task].folds else [directory]
        if finished := [fold for fold in folds if (fold / ".done").exists()]:
            found[directory] = finished
    return found


def options_of(directory: Path) -> dict[str, Any]:
    """Return what a finished task was run with: `upstream`, `args`, perhaps `lr`."""
    return json.loads((directory / ".done").read_text(encoding="utf-8"))["options"]


def _dev_score(task: str, directory: Path) -> float:
    """Return what s3prl chose the checkpoint by; higher is better."""
    heading, (key, _) = next(iter(TASKS[task].columns.items()))
    file = directory / "train" / "valid_best" / "training_stats.yaml"
    score = yaml.safe_load(file.read_text())["valid_best_metrics"][key]
    return -score if heading.endswith("↓") else score


def _choose(task: str, found: dict[Path, list[Path]]) -> list[Path]:
    """Return the folds of the learning rate that is best on the dev sets."""
    most = max(map(len, found.values()))
    complete = [folds for folds in found.values() if len(folds) == most]
    if len(complete) == 1:
        return complete[0]
    return max(complete, key=lambda folds: sum(_dev_score(task, f) for f in folds))


def _rate_of(directory: Path) -> str:
    rate = options_of(directory).get("lr")
    return "s3prl's own" if rate is None else f"{rate:g}"


def _notes(task: str, folds: list[Path], found: dict[Path, list[Path]]) -> list[str]:
    """Say what differs from SUPERB, and which learning rate was chosen."""
    notes, number = [], TASKS[task].folds
    if number and len(folds) < number:
        names = " ".join(fold.name for fold in folds)
        notes.append(f"only {names} of {number} folds")
    for words in sorted({" ".join(options_of(fold)["args"]) for fold in folds}):
        if words:
            notes.append(f"not SUPERB's settings, but with {words}")
    if "lr" in options_of(folds[0]) or len(found) > 1:
        note = f"learning rate {_rate_of(folds[0])}"
        if len(found) > 1:
            tried = ", ".join(_rate_of(others[0]) for others in found.values())
            note += f", of {tried} the best on the dev set"
        notes.append(note)
    return [f"{task.upper()}: {note}" for note in notes]


def collect(output_dir: Union[str, Path], name: str) -> str:
    """Return the table row of all finished tasks, and write superb.{md,json}.

    A task that is not finished shows "–"; ER is the mean of its finished folds. Of
    several learning rates of a task, the one counts that is best on its dev set.
    """
    output_dir = Path(output_dir)
    row: dict[str, Optional[float]] = {}
    notes = []
    for task, about in TASKS.items():
        row.update(dict.fromkeys(about.columns))
        if found := finished_of(task, output_dir):
            folds = _choose(task, found)
            scores = [scores_of(task, fold) for fold in folds]
            for column in about.columns:
                row[column] = sum(score[column] for score in scores) / len(scores)
            notes += _notes(task, folds, found)
    cells = ["–" if value is None else f"{value:.2f}" for value in row.values()]
    table = markdown(" | ".join(["upstream", *row]), [[name, *cells]])
    table = "\n\n".join([table, *notes])
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "superb.md").write_text(table + "\n", encoding="utf-8")
    facts = {"upstream": name, "scores": row, "notes": notes}
    text = json.dumps(facts, indent=2, ensure_ascii=False)
    (output_dir / "superb.json").write_text(text + "\n", encoding="utf-8")
    return table
