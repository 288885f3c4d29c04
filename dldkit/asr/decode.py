"""Decode test sets at several depths, in parallel."""

import functools
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Sequence, Union

import torch

from dldkit.asr.inference import inference
from dldkit.asr.speech import speech_source, utterance_ids
from dldkit.bin.asr_inference import get_parser
from dldkit.data.datadir import read_table
from dldkit.parallel import parallel_map

RESULTS = ("text", "token", "token_int", "score")
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

    def is_done(self, request: str) -> bool:
        """Whether it was decoded before, in just this way."""
        done = self.output_dir / "request"
        return done.is_file() and done.read_text() == request

    def merge(self, request: str) -> None:
        """Join the results of the parts, sorted by utterance."""
        for name in RESULTS:
            files = [part / "1best_recog" / name for part in self.part_dirs]
            lines = [f.read_text("utf-8").splitlines() for f in files if f.is_file()]
            text = "".join(f"{line}\n" for line in sorted(sum(lines, [])))
            (self.output_dir / name).write_text(text, "utf-8")
        (self.output_dir / "request").write_text(request)


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

    What was decoded before from the same model with the same options is kept.

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
    profile = model_file.parent / "depth_profile.pth"

    parts = math.ceil(nj / (len(depths) * len(data_dirs)))
    decodings, jobs = [], []
    for depth in depths:
        for data_dir in map(Path, data_dirs):
            decoding = Decoding(
                data_dir,
                depth,
                Path(output_dir) / f"depth{depth}" / data_dir.name,
                min(parts, len(utterance_ids(data_dir))),
            )
            request = _request(model, data_dir, (model_file, profile))
            if decoding.is_done(request):
                logging.info(f"{decoding.output_dir} is complete")
                continue
            decodings.append((decoding, request))
            jobs += _jobs(decoding, [*model, "--depth", str(depth)])
    for argv, _ in jobs:
        get_parser().parse_args(argv)  # a wrong option stops here, not in a worker
    run = functools.partial(_run_inference, nj > 1)
    parallel_map(run, jobs, nj, "Decoding", parallel_config)
    for decoding, request in decodings:
        decoding.merge(request)


def _request(model: Sequence[str], data_dir: Path, files: Sequence[Path]) -> str:
    """What the result depends on, in words that change when it does."""
    stamps = [f"{f} {f.stat().st_mtime_ns}" for f in files if f.exists()]
    stamps.append(f"{data_dir} {Path(speech_source(data_dir)[0]).stat().st_mtime_ns}")
    return "\n".join([" ".join(model), *stamps])


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
