"""An experiment directory: one process works in it, and it stands by itself."""

import argparse
import logging
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import torch
from espnet2.train.distributed_utils import (
    get_node_rank,
    get_num_nodes,
    get_rank,
    resolve_distributed_mode,
)

from dldkit.asr.speech import refuse_missing_speech
from dldkit.config_files import BARE_NAMES, copy_files, named_files, without_files
from dldkit.data.datadir import splits_of
from dldkit.data.frames import DATA_TYPE
from dldkit.errors import UserError
from dldkit.step import Step

# What statistics depend on besides the data: systems that agree in it share them.
STATISTICS = "frontend frontend_conf input_size use_preprocessor preprocessor"
STATISTICS += (
    " preprocessor_conf token_type cleaner g2p write_collected_feats stats_utts"
)
# What does not change the result of a training, or is no option of it.
IRRELEVANT = "config print_config log_level log_interval output_dir ngpu num_workers"
IRRELEVANT += " num_att_plot use_tensorboard use_matplotlib create_graph_in_tensorboard"
IRRELEVANT += " resume dry_run version required detect_anomaly distributed"
IRRELEVANT += " multiprocessing_distributed unused_parameters sharded_ddp local_rank"
SELECTING = "keep_nbest_models best_model_criterion nbest_averaging_interval"
EXTENDING = "max_epoch", "patience"  # what lets a training that has ended go on
FILES = "data_path_and_name_and_type", "shape_file"


@contextmanager
def experiment(
    args: argparse.Namespace,
    teachers: Mapping[str, Path] = MappingProxyType({}),
    hub_teachers: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[bool]:
    """Hold the experiment directory of a training; yield whether it is to be done.

    Another process that trains there is waited for. What was finished with the same
    options and the same content of the files that they name is not done again.

    Args:
        args: of ESPnet's training command. The files that inference needs are copied
            into `output_dir`, and `args` name the copies.
        teachers: files of models that it learns from; the directory is bound to them
            as to its data.
        hub_teachers: names of those that are no files here.

    Raises:
        UserError: the training can not begin, or the directory belongs to other data.
    """
    if args.dist_launcher == "slurm":
        _be_a_task_of_srun(args)
    resolve_distributed_mode(args)
    if args.ngpu > 1 and not args.multiprocessing_distributed:
        raise UserError(
            f"--ngpu {args.ngpu} in one process would draw other layers on each GPU: "
            "set --multiprocessing_distributed true"
        )
    _refuse_missing_data(args)
    if args.dry_run:
        yield True
        return
    step = Step(
        args.output_dir,
        {**_files(args), **teachers},
        keep=True,
        bound_by=None if args.collect_stats else "checkpoint.pth",
        binding=["hub_teachers"],
        **_options(args),
        **({"hub_teachers": dict(hub_teachers)} if hub_teachers else {}),
    )
    if not _is_first(args):  # which would be waited for if it had nothing to do
        yield not step.is_done()
        return
    if not args.collect_stats:
        _refuse_relabelling(step)
    logging.basicConfig(level=args.log_level, format=_log_format())
    # Other nodes would not know why this one waits, and time out.
    step.lock.wait = not args.distributed or _number_of_nodes(args) == 1
    with step:
        if not step.done and not args.collect_stats:
            copy_files(args)
        yield not step.done


def _refuse_missing_data(args: argparse.Namespace) -> None:
    """Refuse speech that is not there, and options that are left out."""
    for part in ("train", "valid"):
        data, shapes = (getattr(args, f"{part}_{name}") for name in FILES)
        for path, _, kind in data:
            refuse_missing_speech(splits_of(path)[0], kind)
        if args.dry_run or (part == "train" and getattr(args, "train_shar", None)):
            continue
        if not data:
            raise UserError(
                f"there are no {part} data: name them, as "
                f"--{part}_{FILES[0]} wav.scp,speech,sound"
            )
        iterator = args.iterator_type
        if part == "valid":
            iterator = args.valid_iterator_type or iterator
        if iterator == "sequence" and not shapes and not args.collect_stats:
            raise UserError(
                f"there are no lengths of the {part} data, of which batches are made: "
                f"say --{part}_{FILES[1]} STATS/{part}/speech_shape, which `python -m "
                "dldkit.bin.collect_stats` writes into its --output_dir STATS"
            )


def _refuse_relabelling(step: Step) -> None:
    """Refuse other options for a training that has ended.

    Nothing would be trained, but config.yaml would say that it was trained with them.
    """
    done = step.read(".done")
    before = done.get("options") if isinstance(done, dict) else None
    if before is None:
        return
    old, new = map(_without_selection, (before, step.description["options"]))
    more = [name for name in EXTENDING if new.get(name) != old.get(name)]
    if more and (new.get("max_epoch") or 0) >= (old.get("max_epoch") or 0):
        return
    changed = [n for n in sorted({*old, *new}) if old.get(n) != new.get(n)]
    if changed:
        raise UserError(
            f"{step.directory}: this training has ended, and {', '.join(changed)} is "
            "not what it was done with: choose another directory, remove this one, or "
            "raise max_epoch to train on"
        )


def _without_selection(options: Mapping[str, object]) -> dict[str, object]:
    """Return the options but those that choose checkpoints, or what is reported."""
    kept = {name: v for name, v in options.items() if name not in SELECTING.split()}
    if isinstance(kept.get("model_conf"), dict):
        kept["model_conf"] = {
            k: v for k, v in kept["model_conf"].items() if k != "valid_depths"
        }
    return kept


def _be_a_task_of_srun(args: argparse.Namespace) -> None:
    """Let each task of srun be a rank; ESPnet would have one task per node.

    ESPnet takes `gpu` for the first node of `gpu-[01-04]`; Slurm itself says it right.
    """
    step = {
        name: os.environ.get(f"SLURM_{name}")
        for name in "PROCID LOCALID STEP_NUM_TASKS STEP_NODELIST JOB_ID STEP_ID".split()
    }
    if None in step.values():
        raise UserError("--dist_launcher slurm is for tasks that srun has started")
    if args.ngpu > 1:
        raise UserError(
            f"--ngpu {args.ngpu}: a task of srun trains on one GPU, so say --ngpu 1, "
            f"and --ntasks-per-node {args.ngpu} to srun"
        )
    args.multiprocessing_distributed = False
    args.dist_rank = int(step["PROCID"])
    args.dist_world_size = int(step["STEP_NUM_TASKS"])
    # a task sees the GPUs of its node, or just its own
    args.local_rank = int(step["LOCALID"]) % max(torch.cuda.device_count(), 1)
    if args.dist_master_addr is None:
        command = ["scontrol", "show", "hostnames", step["STEP_NODELIST"]]
        names = subprocess.run(command, check=True, capture_output=True, text=True)
        args.dist_master_addr = names.stdout.split()[0]
    if args.dist_master_port is None:  # another one for each job on a node
        number = 10 * int(step["JOB_ID"]) + int(step["STEP_ID"])
        args.dist_master_port = 20000 + number % 10000


def _log_format() -> str:
    """ESPnet's own, which it sets too late for what is said before training."""
    host = os.uname()[1].split(".")[0]
    return f"[{host}] %(asctime)s (%(module)s:%(lineno)d) %(levelname)s: %(message)s"


def _is_first(args: argparse.Namespace) -> bool:
    if not args.distributed:
        return True
    rank_of = get_node_rank if args.multiprocessing_distributed else get_rank
    return not rank_of(args.dist_rank, args.dist_launcher)


def _number_of_nodes(args: argparse.Namespace) -> int:
    if not args.multiprocessing_distributed:
        return 2  # processes of their own, wherever they are
    return get_num_nodes(args.dist_world_size, args.dist_launcher) or 1


def _options(args: argparse.Namespace) -> dict[str, object]:
    if args.collect_stats:
        names = [name for name in STATISTICS.split() if hasattr(args, name)]
        return {name: getattr(args, name) for name in names}
    return {
        name: value
        for name, value in without_files(vars(args)).items()
        if name not in IRRELEVANT.split()
        and not name.startswith(("dist_", "wandb_"))
        and not name.endswith(FILES)  # which enter by what they hold
    }


def _with_splits(tables: Mapping[str, str]) -> dict[str, str]:
    """Return tables by name; for multiple_iterator, one is a directory of its parts."""
    return {
        name if part == Path(path) else f"{name} {part.name}": str(part)
        for name, path in tables.items()
        for part in splits_of(path)
    }


def _files(args: argparse.Namespace) -> dict[str, str]:
    files = {}
    for part in ("train", "valid"):
        for path, name, kind in getattr(args, f"{part}_{FILES[0]}"):
            if kind != DATA_TYPE:  # paths of arks; who made them is a teacher's file
                named = {f"{part} {name} ({kind})": path}
                files.update(_with_splits(named))
        if not args.collect_stats:
            shapes = enumerate(getattr(args, f"{part}_{FILES[1]}"), 1)
            named = {f"{part} shapes {i}": path for i, path in shapes}
            files.update(_with_splits(named))
    for key, path in named_files(vars(args)).items():
        if args.collect_stats and key == "normalize_conf.stats_file":
            continue
        copy = Path(args.output_dir, BARE_NAMES[key])
        files[key] = str(copy) if copy.is_file() and not Path(path).is_file() else path
    for i, source in enumerate(() if args.collect_stats else args.init_param, 1):
        path = source.split(":")[0]
        if not Path(path).is_file():
            raise UserError(f"--init_param {path}: there is no such file")
        files[f"init_param {i}"] = path
    return files
