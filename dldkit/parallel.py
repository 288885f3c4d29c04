"""Run one function over many items: here, in local processes, or on a cluster."""

import logging
import operator
import pickle
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from dldkit.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

JOBQUEUE_CLUSTERS = {
    "slurm": "SLURMCluster",
    "pbs": "PBSCluster",
    "sge": "SGECluster",
    "lsf": "LSFCluster",
}


def parallel_map(
    fn: Callable[[Item], Result],
    items: Sequence[Item],
    nj: int = 1,
    desc: str = "",
    config: str | None = None,
) -> list[Result]:
    """Return `[fn(item) for item in items]`, with a progress bar.

    Args:
        nj: number of local processes; 1 runs in this process.
        desc: what the progress bar says.
        config: YAML file that names the workers instead of `nj`, as ESPnet3's
            `parallel` block: `env: local|slurm|pbs|sge|lsf`, `n_workers: 8`,
            `options: {...}` (handed to the Dask cluster class).

    Raises:
        UserError: the configuration is wrong, or a worker died.
        Exception: the first error that `fn` raises ends the work.
    """
    items = list(items)
    settings = _read_config(config) if config else {"env": "local", "n_workers": nj}
    workers = min(settings["n_workers"], len(items))
    if not items or (settings["env"] == "local" and workers <= 1):
        return [fn(item) for item in tqdm(items, desc=desc)]

    import cloudpickle
    from distributed import Client, KilledWorker, as_completed

    # Its news would bury ours, and errors reach the caller without it.
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    results: list = [None] * len(items)
    with _make_cluster(settings, workers) as cluster, Client(cluster) as client:
        # Workers know `loads` and `call`. A function of a package that they lack is
        # thus an error in a task; sent as it is, Dask would restart them for ever.
        function = client.submit(pickle.loads, cloudpickle.dumps(fn))
        # Not pure: two equal items are two pieces of work.
        calls = client.map(operator.call, [function] * len(items), items, pure=False)
        places = {call.key: place for place, call in enumerate(calls)}
        try:
            done = as_completed(calls, with_results=True)
            for call, result in tqdm(done, desc=desc, total=len(items)):
                results[places[call.key]] = result
        except KilledWorker as error:
            with suppress(TimeoutError):  # closing a worker that restarts fails
                client.wait_for_workers(workers, timeout=30)
            raise UserError(
                f"{desc}: {workers} workers at work, and one died again and again "
                f"({error.task}); the usual cause is memory, so try fewer"
            )
    return results


def refuse_missing_gpu(ngpu: int, parallel_config: str | None = None) -> None:
    """Refuse a GPU that is not where it is needed.

    Args:
        parallel_config: where the work is done; None = here. Elsewhere, the jobs have
            to ask: whoever submits them, from a login node, may have none.

    Raises:
        UserError: there is none.
    """
    import torch  # takes seconds, which most commands here need not wait for

    if ngpu and not parallel_config and not torch.cuda.is_available():
        raise UserError(
            f"ngpu {int(ngpu)}: no GPU can be used on {socket.gethostname()}: set it "
            "to 0, or let the jobs of --parallel_config ask for one (docs/cluster.md)"
        )


def _read_config(path: str) -> dict:
    import yaml

    if not Path(path).is_file():
        raise UserError(f"parallel configuration {path} does not exist")
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}")
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected `env`, `n_workers` and `options`")
    unknown = set(config) - {"env", "n_workers", "options"}
    if unknown:
        raise UserError(f"{path}: unknown key(s) {' '.join(sorted(unknown))}")
    config = {"env": "local", "n_workers": 1, "options": None, **config}
    known = ["local", *JOBQUEUE_CLUSTERS]
    if config["env"] not in known:
        raise UserError(f"{path}: env {config['env']!r}, choose from {' '.join(known)}")
    if not isinstance(config["n_workers"], int) or config["n_workers"] < 1:
        raise UserError(f"{path}: n_workers must be a positive integer")
    if not isinstance(config["options"] or {}, dict):
        raise UserError(f"{path}: options must be keys and values, as cores: 1")
    return config


def _make_cluster(settings: dict, workers: int):
    options = dict(settings.get("options") or {})
    if settings["env"] == "local":
        from distributed import LocalCluster

        # One thread each: the work is Python and NumPy, and libraries thread below.
        defaults = dict(
            threads_per_worker=1,
            dashboard_address=":0",
            memory_limit=0,
            silence_logs=logging.CRITICAL,  # those of the workers
        )
        return LocalCluster(n_workers=workers, **{**defaults, **options})
    return _submit_jobs(settings["env"], options, workers)


def _submit_jobs(env: str, options: dict, workers: int):
    import dask_jobqueue
    from distributed import Status

    cluster_class = getattr(dask_jobqueue, JOBQUEUE_CLUSTERS[env])
    options = {"scheduler_options": {"dashboard_address": ":0"}, **options}
    try:
        cluster = cluster_class(**options)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"parallel options of {cluster_class.__name__}: {_one_line(error)}"
        )
    # The first job alone, and waited for: of those of `scale`, Dask logs the errors.
    cluster.worker_spec.update(cluster.new_worker_spec())
    try:
        cluster.sync(lambda: cluster)
    except (RuntimeError, OSError) as error:
        for job in cluster.workers.values():
            job.status = Status.failed  # else the cluster can not be closed
        cluster.close()
        raise UserError(
            f"{env} takes no job with these parallel options: {_one_line(error)}"
        )
    cluster.scale(workers)
    logging.info(
        f"{workers} workers are jobs of {env}, and begin when it lets them; "
        f"their logs: {options.get('log_directory') or 'the working directory'}"
    )
    return cluster


def _one_line(error: Exception) -> str:
    """Return the text of an error; of a command's, what it wrote to stderr."""
    return " ".join(str(error).rpartition("stderr:")[2].split())
