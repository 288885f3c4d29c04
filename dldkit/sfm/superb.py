"""Run SUPERB's tasks with s3prl on a frozen upstream; collect one table row."""

import hashlib
import importlib.util
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Optional, Sequence, Union

import yaml

from dldkit.errors import UserError
from dldkit.report.tables import markdown
from dldkit.step import Step, atomic

INSTALL = (
    "DLDKIT_EXTRAS=espeak,sfm,test,superb tools/install.sh, or pip install "
    "'dldkit[superb]'"
)
MODULES = ("s3prl", "editdistance", "sed_eval", "more_itertools", "pkg_resources")


@dataclass(frozen=True)
class Corpus:
    """A corpus that the user has: what to look for in it, and where to get it."""

    holds: str  # a path that must be in it
    source: str  # address and licence
    parent_of: str = ""  # the directory above this one may be named as well


CORPORA = {
    "librispeech": Corpus(
        "SPEAKERS.TXT",
        "https://www.openslr.org/12 (train-clean-100, dev-clean, test-clean), "
        "licence CC BY 4.0",
        parent_of="LibriSpeech",
    ),
    "speech_commands": Corpus(
        "_background_noise_",
        "http://download.tensorflow.org/data/speech_commands_v0.01.tar.gz, "
        "licence CC BY 4.0",
    ),
    "speech_commands_test": Corpus(
        "_silence_",
        "http://download.tensorflow.org/data/speech_commands_test_set_v0.01.tar.gz, "
        "licence CC BY 4.0",
    ),
    "fluent_speech_commands": Corpus(
        "data/train_data.csv",
        "https://fluent.ai/fluent-speech-commands-a-dataset-for-spoken-language-"
        "understanding-research, licence: academic research only",
    ),
    "voxceleb1": Corpus(
        "dev/wav",
        "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/vox1.html, on request, "
        "licence CC BY 4.0; unpacked into dev/wav and test/wav",
    ),
    "iemocap": Corpus(
        "Session1",
        "https://sail.usc.edu/iemocap, on request, licence: USC's own, research only",
    ),
    "snips": Corpus(
        "all.iob.snips.txt",
        "https://github.com/aws-samples/aws-lex-noisy-spoken-language-understanding, "
        "see its LICENSE; converted to wav by s3prl's preprocess/snips_prepare_data.sh",
    ),
    "libri2mix": Corpus(
        "train/segments",
        "https://github.com/ftshijt/LibriMix, licence CC BY 4.0; the Kaldi directories "
        "train, dev and test of its scripts/prepare_diarization.py",
    ),
}

_VOX = "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/meta/iden_split.txt"
_TRIALS = "https://openslr.magicdatatech.com/resources/49/voxceleb1_test_v2.txt"
_LEXICON = "https://huggingface.co/datasets/s3prl/g2p/raw/main/lexicon"
_IEMOCAP = (
    "https://huggingface.co/datasets/s3prl/iemocap_split/raw/"
    "4097f2b496c41eed016d4e5eb0ada4cccd46d1f3"
)
LEXICONS = ("librispeech-lexicon-200k-g2p.txt", "librispeech-lexicon-allothers-g2p.txt")


@dataclass(frozen=True)
class Task:
    """A task of SUPERB, as s3prl runs it.

    `corpora` maps options of s3prl's prepare_data to names in CORPORA; `lists` maps
    names of files that s3prl needs besides to their addresses; `columns` maps headings
    of the table to keys of the file `result`, and to the factor that makes percent.
    """

    problem: str
    corpora: dict[str, str]
    columns: dict[str, tuple[str, float]]
    result: str = "evaluate/valid_best/*/result.yaml"
    lists: Optional[dict[str, str]] = None
    folds: int = 0


def _iemocap_lists() -> dict[str, str]:
    return {
        f"test_session{session}_{part}_metadata.json": (
            f"{_IEMOCAP}/Session{session}/{part}_meta_data.json"
        )
        for session in range(1, 6)
        for part in ("train", "test")
    }


# In the order of the columns in SUPERB's table (Yang et al., Interspeech 2021).
TASKS = {
    "pr": Task(
        "SuperbPR",
        {"dataset_root": "librispeech"},
        {"PR PER ↓": ("per", 100)},
        lists={name: f"{_LEXICON}/{name}" for name in LEXICONS},
    ),
    "ks": Task(
        "SuperbKS",
        {"gsc1": "speech_commands", "gsc1_test": "speech_commands_test"},
        {"KS acc ↑": ("accuracy", 100)},
    ),
    "ic": Task(
        "SuperbIC",
        {"dataset_root": "fluent_speech_commands"},
        {"IC acc ↑": ("accuracy", 100)},
    ),
    "sid": Task(
        "SuperbSID",
        {"dataset_root": "voxceleb1"},
        {"SID acc ↑": ("accuracy", 100)},
        lists={"iden_split.txt": _VOX},
    ),
    "er": Task(
        "SuperbER",
        {"iemocap": "iemocap"},
        {"ER acc ↑": ("accuracy", 100)},
        lists=_iemocap_lists(),
        folds=5,
    ),
    "asr": Task(
        "SuperbASR",
        {"dataset_root": "librispeech"},
        {"ASR WER ↓": ("wer", 100)},
    ),
    "qbe": Task("", {}, {"QbE MTWV ↑": ("", 1)}),  # s3prl.problem does not have it
    "sf": Task(
        "SuperbSF",
        {"dataset_root": "snips"},
        {"SF F1 ↑": ("slot_type_f1", 100), "SF CER ↓": ("slot_value_cer", 100)},
    ),
    "asv": Task(
        "SuperbASV",
        {"dataset_root": "voxceleb1"},
        {"ASV EER ↓": ("EER", 100)},
        result="evaluate/test_trial/best_result.yaml",
        lists={"iden_split.txt": _VOX, "voxceleb1_test_v2.txt": _TRIALS},
    ),
    "sd": Task(
        "SuperbSD",
        {"data_dir": "libri2mix"},
        {"SD DER ↓": ("der", 1)},  # dscore reports percent
        result="evaluate/valid_best/*/dscore.yaml",
    ),
}


def check_environment(tasks: Sequence[str]) -> None:
    """Look for everything that the tasks need besides their corpora.

    Raises:
        UserError: a task that is none, or a package or a program is missing.
    """
    runnable = [name for name, task in TASKS.items() if task.problem]
    for name in tasks:
        if name not in runnable:
            raise UserError(f"--tasks {name}: choose from {' '.join(runnable)}")
    missing = [name for name in MODULES if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(f"SUPERB needs {', '.join(missing)}: {INSTALL}")
    if "asv" in tasks and not shutil.which("sox"):
        raise UserError(
            "ASV trims silence with the program sox, which is not in PATH: install it "
            "(apt-get install sox, or conda install -c conda-forge sox)"
        )


def check_upstream(upstream_dir: Path) -> str:
    """Return a digest of a Hugging Face HuBERT directory.

    Raises:
        UserError: it is no such directory.
    """
    names = ("config.json", "preprocessor_config.json", "model.safetensors")
    digest = hashlib.sha256()
    for name in names:
        path = Path(upstream_dir) / name
        if not path.is_file():
            raise UserError(
                f"--upstream_dir {upstream_dir}: {name} is not there; export a student "
                "with python -m dldkit.bin.sfm_export"
            )
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    config = json.loads((Path(upstream_dir) / "config.json").read_text())
    if config.get("model_type") != "hubert":
        raise UserError(
            f"--upstream_dir {upstream_dir} holds a {config.get('model_type')} model, "
            "and s3prl's hf_hubert_custom loads HuBERT models only"
        )
    return digest.hexdigest()


def find_corpora(
    tasks: Sequence[str], paths: dict[str, Optional[str]]
) -> dict[str, Path]:
    """Return the directories of the corpora that the tasks need.

    Raises:
        UserError: one was not named, or holds something else.
    """
    found = {}
    for task in tasks:
        for name in TASKS[task].corpora.values():
            corpus, path = CORPORA[name], paths.get(name)
            if not path:
                raise UserError(
                    f"{task.upper()} needs a corpus: name its directory with --{name} "
                    f"or {name.upper()} in the environment ({corpus.source})"
                )
            roots = [Path(path).resolve()]
            if corpus.parent_of:
                roots.append(roots[0] / corpus.parent_of)
            roots = [root for root in roots if (root / corpus.holds).exists()]
            if not roots:
                raise UserError(
                    f"--{name} {path} (or {name.upper()}) has no {corpus.holds}: name "
                    f"the directory that holds it ({corpus.source})"
                )
            found[name] = roots[0]
    return found


def check_tasks(
    tasks: Sequence[str], corpora: dict[str, Optional[str]], dscore: Optional[str]
) -> tuple[list[str], dict[str, Path]]:
    """Return the tasks to run, and the directories of their corpora.

    Args:
        tasks: empty = those whose corpora are named.
        corpora: directories by their names in CORPORA.

    Raises:
        UserError: a package, a program or a corpus is missing, or no corpus is named.
    """
    tasks = list(tasks) or [
        name
        for name, task in TASKS.items()
        if task.corpora and all(corpora.get(corpus) for corpus in task.corpora.values())
    ]
    if not tasks:
        names = ", ".join(f"--{name} ({name.upper()})" for name in CORPORA)
        raise UserError(
            f"SUPERB has nothing to run: name the directory of a corpus with {names}"
        )
    check_environment(tasks)
    found = find_corpora(tasks, corpora)
    if "sd" in tasks and not (dscore and (Path(dscore) / "score.py").is_file()):
        raise UserError(
            f"SD is scored with dscore, and --dscore {dscore or ''} (or DSCORE) has no "
            "score.py: git clone https://github.com/nryant/dscore (BSD 2-Clause), and "
            "name that directory"
        )
    return tasks, found


def fetch_lists(tasks: Sequence[str], list_dir: Path) -> None:
    """Download the splits and lexicons that the tasks need; files there are kept.

    Raises:
        UserError: one can not be downloaded.
    """
    list_dir.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        for name, url in (TASKS[task].lists or {}).items():
            path = list_dir / name
            if path.is_file():
                continue
            logging.info(f"{task}: downloading {url} to {path}")
            try:
                with (
                    urllib.request.urlopen(url, timeout=60) as response,
                    atomic(path) as part,
                ):
                    part.write_bytes(response.read())
            except (OSError, HTTPException) as error:
                raise UserError(
                    f"{task.upper()} needs {url}, which can not be downloaded "
                    f"({error}): fetch it elsewhere, and put it at {path}"
                ) from error


def run(
    tasks: Sequence[str],
    upstream_dir: Union[str, Path],
    output_dir: Union[str, Path],
    corpora: dict[str, Optional[str]],
    list_dir: Union[str, Path],
    task_args: Sequence[str] = (),
    er_folds: Sequence[int] = range(5),
    device: str = "cpu",
    num_workers: int = 6,
    dscore: Optional[str] = None,
) -> None:
    """Train and test SUPERB's downstream models, each in ``output_dir/TASK``.

    A finished task is kept, an interrupted one goes on from its last checkpoint.

    Raises:
        UserError: something is missing, s3prl failed, or a task's directory is from
            another upstream or other `task_args`.
    """
    upstream_dir, output_dir = Path(upstream_dir).resolve(), Path(output_dir)
    list_dir = Path(list_dir).resolve()
    tasks, roots = check_tasks(tasks, corpora, dscore)
    settings = {"upstream": check_upstream(upstream_dir), "args": list(task_args)}
    steps = []
    for task in tasks:
        for fold in er_folds if TASKS[task].folds else [None]:
            directory = output_dir / task
            if fold is not None:
                directory /= f"fold{fold}"
            step = Step(directory, {}, keep=True, **settings)
            if step.changes("options"):
                raise UserError(
                    f"{directory} is from another upstream or other --task_args: "
                    "remove it, or choose another --upstream_name"
                )
            steps.append((task, fold, step))
    fetch_lists(tasks, list_dir)

    for task, fold, step in steps:
        with step:
            if step.done:
                continue
            directory = step.directory
            _keep_whole_checkpoints(directory / "train")
            options = {
                "target_dir": str(directory.resolve()),
                "cache_dir": str(list_dir),
                "device": device,
                "num_workers": num_workers,
                "build_upstream.name": "hf_hubert_custom",
                "build_upstream.path_or_url": str(upstream_dir),
            }
            for option, name in TASKS[task].corpora.items():
                options[f"prepare_data.{option}"] = str(roots[name])
            if fold is not None:
                options["prepare_data.test_fold"] = fold
            if task == "sd":
                _link_dscore(Path(dscore).resolve(), directory)
            # s3prl evaluates the values as Python expressions.
            words = [w for k, v in options.items() for w in (f"--{k}", repr(v))]
            command = [str(list_dir), TASKS[task].problem, *words, *task_args]
            _run_s3prl(command, directory / "superb.log")
            _scores(task, directory)


def _keep_whole_checkpoints(train_dir: Path) -> None:
    """Remove a checkpoint that s3prl was killed in; it writes config.yaml last."""
    for checkpoint in train_dir.glob("step_*"):
        if not (checkpoint / "config.yaml").exists():
            logging.warning(f"{checkpoint} is incomplete, removed")
            shutil.rmtree(checkpoint)


def _link_dscore(dscore: Path, directory: Path) -> None:
    """Put dscore where s3prl would clone it."""
    link = directory / "evaluate" / "valid_best" / "test" / "score" / "dscore"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(dscore)


def _run_s3prl(arguments: Sequence[str], log: Path) -> None:
    problem = arguments[1]
    logging.info(f"{problem}: running, log in {log}")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "dldkit.sfm.s3prl_main", *arguments]
    with open(log, "a", encoding="utf-8") as file:
        print(f"# {shlex.join(command)}", file=file, flush=True)
        status = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment
        ).returncode
    if status != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
        raise UserError(
            f"{problem} failed (exit status {status}): {(named or lines)[-1].strip()}; "
            f"see {log}; run again to go on"
        )


def _scores(task: str, directory: Path) -> dict[str, float]:
    """Return the task's columns in percent, as its result file has them."""
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
        scores = [_scores(task, directory) for directory in finished]
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
