"""Decode test sets at several depths, in parallel."""

import functools
import hashlib
import logging
import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Sequence, Union

import torch

from dldkit.asr.inference import get_parser, inference
from dldkit.asr.loading import encoder_states, read_checkpoint
from dldkit.asr.speech import refuse_missing_speech, speech_source, utterance_ids
from dldkit.data.datadir import read_table
from dldkit.depth.profile import DepthProfile, find_profile
from dldkit.parallel import parallel_map
from dldkit.step import Step, atomic

RESULTS = ("text", "token", "token_int", "score")
# options that do not change a result, or enter in another way
IRRELEVANT = ("config", "output_dir", "data_path_and_name_and_type", "log_level")
IRRELEVANT += ("ngpu", "num_workers")
LOG_FORMAT = "%(asctime)s (%(module)s:%(lineno)d) %(levelname)s: %(message)s"


@dataclass
class Decoding:
    """One test set at one depth, cut into parts."""

    data_dir: Path
    depth: int
    output_dir: Path
    parts: int

    @property
    def part_dirs(self) -> list[Path]:
        return [self.output_dir / "logdir" / f"output.{i}" for i in range(self.parts)]

    def merge(self) -> None:
        """Join the results of the parts, sorted by utterance."""
        for name in RESULTS:
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
) -> None:
    """Write `output_dir/depth<N>/<set>/{text,token,token_int,score}`.

    What was decoded before from the same model with the same options is kept; what
    another process is decoding is waited for.

    Args:
        asr_model_file: checkpoint, beside its config.yaml.
        inference_args: options of `dldkit.bin.asr_inference` for all of them.
        nj: number of jobs.

    Raises:
        UserError: for missing data, or an impossible depth.
    """
    model_file = Path(asr_model_file)
    model = ["--asr_train_config", str(model_file.parent / "config.yaml")]
    model += ["--asr_model_file", str(model_file), "--num_workers", "0"]
    model += [*inference_args]
    statistics = calibrated(model_file)
    parts = math.ceil(nj / (len(depths) * len(data_dirs)))
    with ExitStack() as steps:
        decodings, jobs = [], []
        # two processes that ask for the same must lock in the same order
        for data_dir in sorted(map(Path, data_dirs)):
            source = speech_source(data_dir)
            refuse_missing_speech(source[0], source[2])
            for depth in sorted(depths):
                decoding = Decoding(
                    data_dir,
                    depth,
                    Path(output_dir) / f"depth{depth}" / data_dir.name,
                    min(parts, len(utterance_ids(data_dir))),
                )
                options = [*model, "--depth", str(depth)]
                step = steps.enter_context(
                    _step(decoding, options, statistics.get(depth))
                )
                if not step.done:
                    decodings.append(decoding)
                    jobs += _jobs(decoding, options)
        run = functools.partial(_run_inference, nj > 1)
        parallel_map(run, jobs, nj, "Decoding", parallel_config)
        for decoding in decodings:
            decoding.merge()


def calibrated(model_file: Path) -> dict[int, str]:
    """Return a digest of what a checkpoint's depth profile says, by depth."""
    path = find_profile(model_file, encoder_states(read_checkpoint(model_file)))
    digests: dict[int, hashlib._Hash] = {}
    for layers, entry in DepthProfile.load(path).depths.items() if path else ():
        found = digests.setdefault(len(layers), hashlib.sha256())
        found.update(repr(layers).encode())
        for name, values in sorted(entry.statistics.items()):
            found.update(name.encode())
            for value in values:
                found.update(value.numpy().tobytes())
    return {depth: found.hexdigest() for depth, found in digests.items()}


def _step(decoding: Decoding, argv: list[str], statistics: Optional[str]) -> Step:
    """What a result depends on: options, and the content of the files they name."""
    needed = ["--output_dir", ".", "--data_path_and_name_and_type", "a,speech,sound"]
    options = vars(get_parser().parse_args([*argv, *needed]))  # refuses a wrong one
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
    files["speech"] = speech_source(decoding.data_dir)[0]
    return Step(decoding.output_dir, files, keep=True, **options)


def _jobs(decoding: Decoding, model: list[str]) -> list[tuple[list[str], Path]]:
    """Return asr_inference's arguments and the log of each part, longest last."""
    path, name, data_type = speech_source(decoding.data_dir)
    table = read_table(path)
    lengths_file = decoding.data_dir / "utt2num_samples"
    lengths = read_table(lengths_file) if lengths_file.is_file() else {}
    utts = sorted(table, key=lambda utt: int(lengths.get(utt, 0)))
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
    options = vars(get_parser().parse_args(argv))
    options.pop("config")
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
