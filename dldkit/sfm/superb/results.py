"""The scores of finished tasks, and the table row that they are."""

import json
from pathlib import Path
from typing import Optional, Union

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


def collect(output_dir: Union[str, Path], name: str) -> str:
    """Return the table row of all finished tasks, and write superb.{md,json}.

    A task that is not finished shows "–"; ER is the mean of its finished folds.
    """
    output_dir = Path(output_dir)
    row: dict[str, Optional[float]] = {}
    notes = []
    for task, about in TASKS.items():
        folds = sorted(output_dir.glob(f"{task}/fold*")) if about.folds else []
        finished = [
            directory
            for directory in (folds or [output_dir / task])
            if (directory / ".done").exists()
        ]
        scores = [scores_of(task, directory) for directory in finished]
        for column in about.columns:
            values = [score[column] for score in scores]
            row[column] = sum(values) / len(values) if values else None
        if finished and about.folds and len(finished) < about.folds:
            names = " ".join(directory.name for directory in finished)
            notes.append(f"{task.upper()}: only {names} of {about.folds} folds")
        for words in sorted({_task_args(directory) for directory in finished}):
            if words:
                notes.append(f"{task.upper()}: not SUPERB's settings, but with {words}")
    cells = ["–" if value is None else f"{value:.2f}" for value in row.values()]
    table = markdown(" | ".join(["upstream", *row]), [[name, *cells]])
    table = "\n\n".join([table, *notes])
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "superb.md").write_text(table + "\n", encoding="utf-8")
    facts = {"upstream": name, "scores": row, "notes": notes}
    text = json.dumps(facts, indent=2, ensure_ascii=False)
    (output_dir / "superb.json").write_text(text + "\n", encoding="utf-8")
    return table


def _task_args(directory: Path) -> str:
    done = json.loads((directory / ".done").read_text(encoding="utf-8"))
    return " ".join(done["options"]["args"])
