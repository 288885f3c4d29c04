#!/usr/bin/env python3
"""What greedy decoding costs beside the bare encoder, and ESPnet's CTC search.

All of it is measured side by side in one process on one thread, in turns, as processor
time, which other load on the machine disturbs least: the medians of some rounds. The
model is a Conformer of random weights. Its CTC head is set so that most frames are
blank, as in a trained model: else ESPnet's search would go on for one token a frame.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Callable, Optional, Sequence

import numpy as np
import soundfile
import torch
from espnet2.bin import asr_inference as espnet_inference
from espnet2.utils.yaml_no_alias_safe_dump import yaml_no_alias_safe_dump

from dldkit.asr.inference import Speech2Text
from dldkit.asr.loading import without_espnets_news
from dldkit.errors import UserError, report_user_errors
from dldkit.report.cost import evenly_spaced
from dldkit.tasks.asr import DLDASRTask

BLANKS = 0.85  # of all frames: about four tokens per second
MODEL = "model.pth"


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--speech", required=True, help="folder of recordings of one sampling rate")
    add("--utts", type=int, default=32, help="utterances, spread over all lengths")
    add("--espnet_utts", type=int, default=3, help="utterances for ESPnet's search")
    add("--batch_size", type=int, default=16, help="for greedy decoding")
    add("--rounds", type=int, default=5, help="after a first one")
    add("--espnet_rounds", type=int, default=3, help="of ESPnet's search")
    add("--vocab", type=int, default=5000, help="number of CTC's units")
    add("--num_blocks", type=int, default=12, help="layers of the Conformer")
    add("--output_size", type=int, default=256, help="its width; its FFN has 4 times")
    add("--output_json", help="file for the ratios")
    return parser


def recordings(folder: Path, number: int) -> tuple[list[np.ndarray], int]:
    """Return speech (Samples,), shortest first, and its sampling rate.

    Raises:
        UserError: there is none, or they have several rates.
    """
    files = [p for p in sorted(folder.rglob("*")) if p.suffix in (".flac", ".wav")]
    if not files:
        raise UserError(f"--speech {folder}: it holds no .flac or .wav file")
    about = {str(file): soundfile.info(file) for file in files}
    rates = {info.samplerate for info in about.values()}
    if len(rates) > 1:
        raise UserError(f"--speech {folder}: sampling rates {sorted(rates)}, not one")
    chosen = evenly_spaced(sorted(about, key=lambda f: about[f].frames), number)
    return [soundfile.read(f, dtype="float32")[0] for f in chosen], rates.pop()


def make_experiment(directory: Path, args: argparse.Namespace, rate: int) -> None:
    """Write the config and the weights of a model as a training would."""
    units = [f"unit{i}" for i in range(args.vocab - 3)]
    tokens = ["<blank>", "<unk>", *units, "<sos/eos>"]
    (directory / "tokens.txt").write_text("\n".join(tokens) + "\n")
    encoder = dict(
        output_size=args.output_size,
        num_blocks=args.num_blocks,
        linear_units=4 * args.output_size,
        attention_heads=4,
        cnn_module_kernel=31,
        macaron_style=True,
        rel_pos_type="latest",
        selfattention_layer_type="rel_selfattn",
        pos_enc_layer_type="rel_pos",
    )
    options = f"""--output_dir {directory} --token_type word --encoder ld_conformer
        --token_list {directory}/tokens.txt --frontend_conf fs={rate}
        --normalize utterance_mvn --model_conf ctc_weight=1.0""".split()
    for name, value in encoder.items():
        options += ["--encoder_conf", f"{name}={value}"]
    train_args = DLDASRTask.get_parser().parse_args(options)
    torch.manual_seed(0)
    model = DLDASRTask.build_model(train_args)
    (directory / "config.yaml").write_text(yaml_no_alias_safe_dump(vars(train_args)))
    torch.save(model.state_dict(), directory / MODEL)


@torch.no_grad()
def fit_head(model: torch.nn.Module, speech: Sequence[np.ndarray]) -> None:
    """Let CTC find all units in what it hears, and blanks in most frames."""
    frames = []
    for samples in speech:
        batch = torch.from_numpy(samples)[None], torch.tensor([len(samples)])
        frames += model.encode(*batch)[0]
    frames = torch.cat(frames)
    head = model.ctc.ctc_lo
    head.weight.normal_().div_(frames.std(0))
    head.weight[0] = 0.0
    head.bias.copy_(-head.weight @ frames.mean(0))
    best = head(frames)[:, 1:].max(-1).values
    head.bias[0] = best.quantile(BLANKS)


def measure(cases: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the processor time of each case, run once."""
    seconds = {}
    for name, run in cases.items():
        begin = time.process_time()
        run()
        seconds[name] = time.process_time() - begin
    return seconds


def medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the median of each case over the rounds."""
    return {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}


@report_user_errors
@torch.no_grad()
def main(cmd: Optional[Sequence[str]] = None) -> None:
    """Measure, print, and write the ratios."""
    args = get_parser().parse_args(cmd)
    torch.set_num_threads(1)
    speech, rate = recordings(Path(args.speech), args.utts)
    with tempfile.TemporaryDirectory() as name, without_espnets_news():
        directory = Path(name)
        make_experiment(directory, args, rate)
        files = str(directory / "config.yaml"), str(directory / MODEL)
        ours = Speech2Text(*files)
        theirs = espnet_inference.Speech2Text(*files, ctc_weight=1.0)
    model = ours.asr_model
    fit_head(model, speech[:: max(1, len(speech) // 8)])
    theirs.asr_model.load_state_dict(model.state_dict())

    rounds = []
    for _ in range(args.rounds + 1):
        total: dict[str, float] = {}
        for begin in range(0, len(speech), args.batch_size):
            utts = speech[begin : begin + args.batch_size]
            batch = ours.padded(utts)
            features = model.normalize(*model._extract_feats(**batch))
            cases = {
                "encoder": lambda: model.encoder(*features),
                "frontend and encoder": lambda: model.encode(**batch),
                "greedy": lambda: ours(utts),
            }
            for case, seconds in measure(cases).items():
                total[case] = total.get(case, 0.0) + seconds
        rounds.append(total)
    found = medians(rounds[1:])
    audio = sum(map(len, speech)) / rate
    print(f"{len(speech)} utterances, {audio:.0f} s, batches of {args.batch_size}")
    for case, seconds in found.items():
        ratio = seconds / found["encoder"]
        print(f"{case:21} {seconds:8.2f} s, {ratio:6.3f} of the encoder")

    some = [speech[i] for i in evenly_spaced(range(len(speech)), args.espnet_utts)]
    cases = {
        "ESPnet": lambda: [theirs(utt) for utt in some],
        "greedy, one by one": lambda: [ours(utt) for utt in some],
        "greedy, batch": lambda: ours(some),
    }
    singles = medians([measure(cases) for _ in range(args.espnet_rounds)])
    tokens = [len(ours(utt)[0][2]) for utt in some]
    audio = sum(map(len, some)) / rate
    print(f"{len(some)} utterances, {audio:.0f} s, {sum(tokens)} tokens")
    for case, seconds in singles.items():
        ratio = singles["ESPnet"] / seconds
        print(f"{case:21} {seconds:8.2f} s, ESPnet's time is {ratio:.1f} times that")
    if args.output_json:
        result = {
            "greedy_of_encoder": found["greedy"] / found["encoder"],
            "greedy_of_encode": found["greedy"] / found["frontend and encoder"],
            "espnet_of_greedy": singles["ESPnet"] / singles["greedy, one by one"],
            "seconds": {**found, **singles},
        }
        Path(args.output_json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
