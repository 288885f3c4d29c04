"""Decode test sets at several depths, and stopping early, in parallel."""

import functools
import hashlib
import json
import logging
import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence, Union

import torch

from dldkit.asr.inference import Speech2Text, inference, read_options
from dldkit.asr.loading import profile_of, without_espnets_news
from dldkit.asr.speech import readable_speech, speech_source, utterance_ids
from dldkit.asr.stopping import thresholds_on
from dldkit.data.datadir import read_lengths, read_table
from dldkit.depth.profile import DepthProfile
from dldkit.depth.thresholds import FILE, read_thresholds, threshold_name
from dldkit.errors import UserError
from dldkit.options import named_twice
from dldkit.parallel import parallel_map
from dldkit.step import Step, atomic

RESULTS = ("text", "token", "token_int", "score")
# options that do not change a result, or enter in another way
IRRELEVANT = ("output_dir", "data_path_and_name_and_type", "log_level")
IRRELEVANT += ("ngpu", "num_workers")
LOG_FORMAT = "%(asctime)s (%(module)s:%(lineno)d) %(levelname)s: %(message)s"


@dataclass
class Decoding:
    """One test set at one depth, or with one threshold, cut into parts.

    Attributes:
        results: the files that decoding writes.
    """

    data_dir: Path
    output_dir: Path
    parts: int
    results: Sequence[str] = RESULTS

    @property
    def part_dirs(self) -> list[Path]:
        """Where each part is decoded."""
        return [self.output_dir / "logdir" / f"output.{i}" for i in range(self.parts)]

    def merge(self) -> None:
        """Join the results of the parts, sorted by utterance."""
        for name in self.results:
            files = [part / "1best_recog" / name for part in self.part_dirs]
            lines = [f.read_text("utf-8").splitlines() for f in files if f.is_file()]
            text = "".join(f"{line}\n" for line in sorted(sum(lines, [])))
            with atomic(self.output_dir / name) as part:
                part.write_text(text, "utf-8")


def decode_depths(
    asr_model_file: Union[str, Path],
    data_dirs: Sequence[Union[str, Path]],
    depths: Sequence[int],
    output_dir: Union[str, Path],
    inference_args: Sequence[str] = (),
    nj: int = 1,
    parallel_config: Optional[str] = None,
    exit_thresholds: Union[str, Sequence[float]] = "none",
    valid_dir: Union[str, Path, None] = None,
) -> None:
    """Write `output_dir/depth<N>/<set>/{text,token,token_int,score}`.

    With thresholds, also `output_dir/threshold<T>/<set>/...`, where `depth` says how
    many layers each utterance took. Which they are is noted in `output_dir`.

    What was decoded before from the same model with the same options is kept; what
    another process is decoding is waited for.

    Args:
        asr_model_file: checkpoint, beside its config.yaml.
        inference_args: options of `dldkit.bin.asr_inference` for all of them.
        nj: number of jobs.
        exit_thresholds: for early stopping; `none` | `auto` = those that give mean
            depths of `depths` on the speech in `valid_dir`.

    Raises:
        UserError: for missing data, sets of one name, an impossible depth, or
            thresholds for a model without exits.
    """
    if twice := named_twice([Path(data_dir).name for data_dir in data_dirs]):
        raise UserError(
            f"two of the sets to decode are called {twice}, as the directory of their "
            "results is: name each set once"
        )
    model_file = Path(asr_model_file)
    model = ["--asr_train_config", str(model_file.parent / "config.yaml")]
    model += ["--asr_model_file", str(model_file), "--num_workers", "0"]
    model += [*inference_args]
    statistics = calibrated(model_file)
    kinds = {f"depth{depth}": ["--depth", str(depth)] for depth in sorted(depths)}
    asked, depths = exit_thresholds, sorted(depths)
    chosen = _thresholds(asked, model, statistics, valid_dir, depths, Path(output_dir))
    for threshold in sorted(chosen):
        kinds[threshold_name(threshold)] = ["--exit_threshold", str(threshold)]
    parts = math.ceil(nj / (len(kinds) * len(data_dirs)))
    with ExitStack() as steps:
        decodings, jobs = [], []
        # two processes that ask for the same must lock in the same order
        for data_dir in sorted(map(Path, data_dirs)):
            readable_speech(data_dir)  # or it is refused, before anything is decoded
            for kind, of_kind in kinds.items():
                stops = "--exit_threshold" in of_kind
                decoding = Decoding(
                    data_dir,
                    Path(output_dir) / kind / data_dir.name,
                    min(parts, len(utterance_ids(data_dir))),
                    (*RESULTS, "depth") if stops else RESULTS,
                )
                known = statistics if stops else statistics.get(int(of_kind[1]))
                options = [*model, *of_kind]
                step = steps.enter_context(_step(decoding, options, known))
                if not step.done:
                    for name in decoding.results:  # of another model
                        (decoding.output_dir / name).unlink(missing_ok=True)
                    decodings.append(decoding)
                    jobs += _jobs(decoding, options)
        run = functools.partial(_run_inference, nj > 1)
        parallel_map(run, jobs, nj, "Decoding", parallel_config)
        for decoding in decodings:
            decoding.merge()


def calibrated(model_file: Path) -> dict[int, str]:
    """Return a digest of what a checkpoint's depth profile says, by depth."""
    path = profile_of(model_file)
    digests: dict[int, hashlib._Hash] = {}
    for layers, entry in DepthProfile.load(path).depths.items() if path else ():
        found = digests.setdefault(len(layers), hashlib.sha256())
        found.update(repr(layers).encode())
        for name, values in sorted(entry.statistics.items()):
            found.update(name.encode())
            for value in values:
                found.update(value.numpy().tobytes())
    return {depth: found.hexdigest() for depth, found in digests.items()}


def _step(decoding: Decoding, argv: list[str], statistics: Any) -> Step:
    """What a result depends on: options, and the content of the files they name."""
    files, options = _inputs(decoding.data_dir, argv, statistics)
    return Step(decoding.output_dir, files, keep=True, **options)


def _inputs(
    data_dir: Path, argv: list[str], statistics: Any
) -> tuple[dict[str, str], dict[str, Any]]:
    options = _options(argv)
    for name in IRRELEVANT:
        del options[name]
    if options["depth_profile"] == "auto":
        options["statistics"] = statistics
    files = {
        name: str(value)
        for name, value in options.items()
        if isinstance(value, (str, Path)) and Path(value).is_file()
    }
    options = {name: value for name, value in options.items() if name not in files}
    files["speech"] = speech_source(data_dir)[0]
    return files, options


def _options(argv: list[str]) -> dict[str, Any]:
    """Read asr_inference's arguments, but for those of the data; refuses wrong ones."""
    needed = ["--output_dir", ".", "--data_path_and_name_and_type", "a,speech,sound"]
    return read_options([*argv, *needed])


def _thresholds(
    asked: Union[str, Sequence[float]],
    model: list[str],
    statistics: Mapping[int, str],
    valid_dir: Union[str, Path, None],
    depths: Sequence[int],
    output_dir: Path,
) -> list[float]:
    """Return the thresholds to decode with, and note them for the report."""
    path = output_dir / FILE
    if asked == "none":
        path.unlink(missing_ok=True)
        return []
    files, relevant = {}, {}
    if asked == "auto":
        if valid_dir is None:
            raise UserError("--exit_thresholds auto: say on what speech by --valid_dir")
        options = _options(model)
        files, relevant = _inputs(Path(valid_dir), model, statistics)
    with Step(path.parent, files, True, asked=asked, depths=depths, **relevant) as step:
        if step.done and path.is_file():
            return read_thresholds(output_dir)
        chosen = asked
        if asked == "auto":
            names = ("asr_train_config", "asr_model_file", "selector", "depth_profile")
            # the jobs may have a GPU where this process, on a login node, has none
            gpu = options["ngpu"] and torch.cuda.is_available()
            with without_espnets_news():
                recogniser = Speech2Text(
                    **{name: options[name] for name in (*names, "dtype", "beam_size")},
                    device="cuda" if gpu else "cpu",
                    exit_threshold=0.0,  # refused at once, where it is impossible
                )
            chosen = thresholds_on(recogniser, valid_dir, depths)
            for threshold, depth in chosen.items():
                logging.info(f"threshold {threshold}: depth {depth:.1f} on {valid_dir}")
        with atomic(path) as part:
            part.write_text(json.dumps(list(chosen)) + "\n")
    return list(chosen)


def _jobs(decoding: Decoding, model: list[str]) -> list[tuple[list[str], Path]]:
    """Return asr_inference's arguments and the log of each part, longest last."""
    path, name, data_type = speech_source(decoding.data_dir)
    table = read_table(path)
    lengths_file = decoding.data_dir / "utt2num_samples"
    lengths = read_lengths(lengths_file) if lengths_file.is_file() else {}
    utts = sorted(table, key=lambda utt: lengths.get(utt, 0))
    jobs = []
    for i, part_dir in enumerate(decoding.part_dirs):
        part_dir.mkdir(parents=True, exist_ok=True)
        scp = part_dir / "speech.scp"
        # ESPnet's batches follow the file: sorted by length, they need little padding
        scp.write_text("".join(f"{u} {table[u]}\n" for u in utts[i :: decoding.parts]))
        argv = [*model, "--output_dir", str(part_dir)]
        argv += ["--data_path_and_name_and_type", f"{scp},{name},{data_type}"]
        jobs.append((argv, part_dir.parent / f"asr_inference.{i + 1}.log"))
    return jobs


def _run_inference(one_thread: bool, job: tuple[list[str], Path]) -> None:
    argv, log = job
    if one_thread:
        torch.set_num_threads(1)
    options = read_options(argv)
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    handler = logging.FileHandler(log, mode="w")
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    root.handlers = [handler]
    root.setLevel(options["log_level"])
    try:
        inference(**options)
    finally:
        handler.close()
        root.handlers = handlers
        root.setLevel(level)
