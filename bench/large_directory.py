#!/usr/bin/env python3
"""What the data stages take, and how much memory, for a directory of many utterances.

The directory is synthetic: one file of noise that every utterance names, and sentences
of 2,000 made-up words. Stages 4, 5 and 10 get tables as stage 3 would write them, so
that it, which converts the audio, may be left out; 10 needs 5.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from multiprocessing import Process
from pathlib import Path

import numpy as np

from dldkit.data.audio import write_audio
from dldkit.data.datadir import write_data_dir, write_table
from dldkit.options import command_parser, positive
from dldkit.report.tables import markdown

FS = 16000


def write_directories(root: Path, utts: int, seconds: float) -> None:
    """Write data/train as a recipe does, and dump/org/train as stage 3 does."""
    root.mkdir(parents=True)
    noise = np.random.default_rng(0).normal(0, 0.1, int(FS * seconds))
    write_audio(root / "noise.flac", noise, FS)
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=1 + i % 9)) for i in range(2000)]
    ids = [f"speaker{i // 100:05d}-{i:07d}" for i in range(utts)]
    tables = dict(
        wav_scp=dict.fromkeys(ids, str(root / "noise.flac")),
        text={utt: " ".join(rng.choices(words, k=rng.randint(2, 30))) for utt in ids},
        utt2spk={utt: utt.partition("-")[0] for utt in ids},
    )
    for name in ("data/train", "dump/org/train", "dump/train"):
        write_data_dir(root / name, "synthetic", **tables)
        if name != "data/train":
            lengths = dict.fromkeys(ids, str(len(noise)))
            write_table(root / name / "utt2num_samples", lengths)


def commands(root: Path, nj: int, audio_format: str) -> dict[str, list[str]]:
    """Return the command of each stage, as a module of dldkit.bin and its options."""
    tokens, data = f"{root}/tokens", f"{root}/dump/train"
    speech = [f"{data}/wav.scp,speech,sound", f"{data}/text,text,text"]
    inputs = [
        word
        for mode in ("train", "valid")
        for entry in speech
        for word in (f"--{mode}_data_path_and_name_and_type", entry)
    ]
    return {
        "1 validate": f"validate_data {root}/data/train".split(),
        "2 speeds": f"perturb_speed {root}/data/train {root}/data/train_sp".split(),
        "3 format": f"format_data {root}/data/train {root}/dump/new --nj {nj} "
        f"--audio_format {audio_format}".split(),
        "4 length": f"filter_data --fs {FS} {root}/dump/org/train "
        f"{root}/dump/kept".split(),
        "5 tokens": f"make_token_list --text {data}/text --output {tokens}/tokens.txt "
        "--nbpe 256".split(),
        "10 statistics": f"collect_stats asr --nj {nj} --stats_utts 200 --output_dir "
        f"{root}/stats --token_list {tokens}/tokens.txt --bpemodel {tokens}/bpe.model "
        "--token_type bpe --model_conf ctc_weight=1.0".split() + inputs,
    }


def measure(command: list[str]) -> dict[str, float]:
    """Run a command; return minutes, minutes computed, and GiB of the largest process.

    Raises:
        SystemExit: it failed.
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", f"dldkit.bin.{command[0]}"] + command[1:]
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[0]} failed")
    return dict(
        minutes=(time.perf_counter() - start) / 60,
        computed=(usage.ru_utime + usage.ru_stime) / 60,
        memory=usage.ru_maxrss / 2**20,
    )


def main() -> None:
    """Print the table."""
    parser = command_parser(__doc__)
    parser.add_argument(
        "directory", type=Path, help="to make, and to remove at the end"
    )
    parser.add_argument("--utts", type=positive, default=20000)
    parser.add_argument("--seconds", type=float, default=2.0, help="of an utterance")
    parser.add_argument("--stages", default="1 2 3 4 5 10", help="to measure")
    parser.add_argument("--nj", type=positive, default=2, help="jobs of 3 and 10")
    parser.add_argument("--audio_format", default="flac", help="of stage 3")
    parser.add_argument("--output_json", type=Path)
    args = parser.parse_args()
    stages = args.stages.split()
    if "10" in stages and "5" not in stages:
        parser.error("--stages: 10 needs the tokens of 5")
    root = args.directory.absolute()
    if root.exists():
        parser.error(f"{root} exists: name a directory to make, and to remove")
    # in a process of its own: a command would begin with the memory that this one has
    writer = Process(target=write_directories, args=(root, args.utts, args.seconds))
    writer.start()
    writer.join()
    if writer.exitcode:
        sys.exit(f"error: {root} was not made, see above")
    found = {}
    for stage, command in commands(root, args.nj, args.audio_format).items():
        if stage.split()[0] in stages:
            found[stage] = measure(command)
            print(f"{stage}: {found[stage]}", flush=True)  # a later one may fail
    shutil.rmtree(root)
    rows = (
        [stage, *(f"{v:.2f}" for v in row.values())] for stage, row in found.items()
    )
    print(f"{args.utts} utterances of {args.seconds:g} s, {os.cpu_count()} cores\n")
    print(markdown("stage | minutes | minutes computed | GiB, largest process", rows))
    if args.output_json:
        args.output_json.write_text(json.dumps(vars(args) | found, default=str) + "\n")


if __name__ == "__main__":
    main()
