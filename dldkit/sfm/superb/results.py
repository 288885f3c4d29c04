"""The scores of finished tasks, and the tables that they are put in."""

import json
from pathlib import Path
from statistics import mean
from typing import Any, Mapping, Optional, Sequence, Union

import yaml

from dldkit.errors import UserError
from dldkit.report.tables import markdown
from dldkit.sfm.superb.tasks import TASKS
from dldkit.sfm.superb.upstream import SECONDS

COLUMNS = [column for about in TASKS.values() for column in about.columns]
PUBLISHED = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text())
_ENDS = dict(
    zip(COLUMNS, zip(PUBLISHED["score"]["zero"], PUBLISHED["score"]["thousand"]))
)


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
    scores: dict[str, Optional[float]] = dict.fromkeys(COLUMNS)
    notes = []
    for task, about in TASKS.items():
        if found := finished_of(task, output_dir):
            folds = _choose(task, found)
            results = [scores_of(task, fold) for fold in folds]
            for column in about.columns:
                scores[column] = sum(each[column] for each in results) / len(results)
            notes += _notes(task, folds, found)
    cost = output_dir / "cost" / "cost.json"
    facts: dict[str, Any] = {"upstream": name}
    facts |= json.loads(cost.read_text()) if cost.is_file() else {}
    facts |= {"scores": scores, "notes": notes}
    output_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(facts, indent=2, ensure_ascii=False)
    (output_dir / "superb.json").write_text(text + "\n", encoding="utf-8")
    table = _table([facts])
    (output_dir / "superb.md").write_text(table + "\n", encoding="utf-8")
    return table


def collect_all(output_dirs: Sequence[Union[str, Path]]) -> str:
    """Return one table of several upstreams, with published rows below.

    Args:
        output_dirs: what `collect` wrote to.

    Raises:
        UserError: it did not write to one of them.
    """
    rows = []
    for directory in output_dirs:
        try:
            text = (Path(directory) / "superb.json").read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{directory} has no superb.json: run python -m dldkit.bin.sfm_superb "
                f"with it as --output_dir ({error.strerror})"
            ) from None
        rows.append({**json.loads(text), "source": str(directory)})
    published = [
        {
            **row,
            "parameters": 1e6 * row["parameters"],
            "scores": dict(zip(COLUMNS, row["scores"])),
        }
        for row in PUBLISHED["rows"]
    ]
    return _table(rows, published)


def superb_score(
    scores: Mapping[str, Optional[float]], tasks: Sequence[str]
) -> Optional[float]:
    """Return the SUPERB score over some of its tasks; None if one was not run.

    Each column is scaled linearly, FBANK = 0 and the best of 2021 = 1000; the
    score is the mean over the tasks of the mean over their columns. That is how the
    leaderboard does it, over all tasks.
    """
    parts = []
    for task in tasks:
        scaled = []
        for column in TASKS[task].columns:
            zero, thousand = _ENDS[column]
            if scores.get(column) is None:
                return None
            scaled.append(1000 * (scores[column] - zero) / (thousand - zero))
        parts.append(mean(scaled))
    return mean(parts) if parts else None


def _table(rows: Sequence[dict], published: Sequence[dict] = ()) -> str:
    """Render rows, whose score is over the tasks that all of `rows` have."""
    tasks = [
        task
        for task, about in TASKS.items()
        if all(row["scores"].get(c) is not None for row in rows for c in about.columns)
    ]
    names = " ".join(task.upper() for task in tasks)
    header = ["upstream", "params, M", "GMACs", *COLUMNS, f"SUPERB score ({names}) ↑"]
    cells = []
    for row in [*rows, *published]:
        size, macs = row.get("parameters"), row.get("macs")
        score = superb_score(row["scores"], tasks)
        numbers = [
            _cell(size and size / 1e6, 2),
            _cell(macs and macs / 1e9, 1),
            *(_cell(row["scores"].get(column), 2) for column in COLUMNS),
            _cell(score, 0),
        ]
        source = [row["source"]] if published else []
        cells.append([row["upstream"], *numbers, *source])
    several = len(rows) > 1
    notes = [
        f"{row['upstream']}: {note}" if several else note
        for row in rows
        for note in row["notes"]
    ]
    notes.append(f"GMACs: of {SECONDS} s of audio, without the downstream models")
    if tasks:
        notes.append(
            f"SUPERB score: over {names}; mean over tasks, FBANK = 0 and the best "
            f"of 2021 in each column = 1000 ({PUBLISHED['score']['source']})"
        )
    if published:
        header.append("source")
        notes += (f"{name}: {place}" for name, place in PUBLISHED["sources"].items())
    return "\n\n".join([markdown(" | ".join(header), cells), *notes])


def _cell(value: Optional[float], digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
