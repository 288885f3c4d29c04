#!/usr/bin/env python3
"""What a training step of each system takes, over one of a static model.

Models are built from conf/systems over a training config, and take turns in one process
on random audio. A system that draws its depth is timed at the medians of some equally
likely parts of its draws: their mean is that of a training. Beside each of them, a
static step is timed, and the ratio of both is what counts.

Arithmetic is that of matrix products and convolutions, from the log-mel features to
CTC's logits: once forward, and twice as much backward; of a live reference, its forward
alone. STFT, activations, norms, softmax, losses and updates are not in it. Memory is
what the forward at full depth keeps for the backward.
"""

import argparse
import bisect
import itertools
import json
import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from espnet2.asr.espnet_model import ESPnetASRModel
from espnet2.utils.yaml_no_alias_safe_dump import yaml_no_alias_safe_dump
from omegaconf import DictConfig, OmegaConf
from steps import times_in_turns, trace, training_step
from tabulate import tabulate
from torch.autograd.graph import saved_tensors_hooks

from dldkit.asr.loading import without_espnets_news
from dldkit.asr.posteriors import pack
from dldkit.asr.reference import POSTERIORS, LiveReference
from dldkit.config_files import merge_configs
from dldkit.depth.sampler import DepthSampler
from dldkit.errors import UserError, report_user_errors
from dldkit.options import command_parser, positive
from dldkit.report.cost import counted_macs
from dldkit.tasks.asr import DLDASRTask

ROOT = Path(__file__).parents[1]
RATE = 16000
STATIC = "static"
ALL = """early_exit dld_paper:live dld_paper:cached dld:live dld:cached nested:live
nested:cached anytime:live anytime:cached anytime:self"""


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--config",
        default=str(ROOT / "egs2/librispeech_100/asr1/conf/train_asr.yaml"),
        help="training config that the systems are merged over",
    )
    add(
        "--systems",
        default=" ".join(ALL.split()),
        help="files of conf/systems; with :live, :cached or :self, the reference of "
        "those that leave it open",
    )
    add("--batch_size", type=positive, default=4, help="utterances")
    add("--seconds", type=float, default=15.0, help="of each utterance")
    add("--vocab_size", type=positive, default=256, help="tokens")
    add("--text_length", type=positive, default=80, help="tokens of an utterance")
    add("--draws", type=positive, default=4, help="timed depths of those drawn")
    add("--rounds", type=positive, default=5, help="after one that warms up")
    add("--num_threads", type=positive, default=1, help="on CPU")
    add("--device", default="cpu", help="cpu or cuda")
    add("--trace", action="store_true", help="print which operations take the time")
    add("--output_json", help="file for the times by depth")
    return parser


def build(config: DictConfig, vocab_size: int, directory: Path) -> ESPnetASRModel:
    """Build a model with random weights, and save it as a trained one would be."""
    tokens = ["<blank>", *map(str, range(1, vocab_size))]
    extra = {"token_list": tokens, "normalize": "utterance_mvn", "normalize_conf": {}}
    directory.mkdir()
    file = directory / "train.yaml"
    OmegaConf.save(OmegaConf.merge(config, extra), file)
    command = ["--config", str(file), "--output_dir", str(directory)]
    args = DLDASRTask.get_parser().parse_args(command)
    torch.manual_seed(0)
    with without_espnets_news():
        model = DLDASRTask.build_model(args)
    with open(directory / "config.yaml", "w") as out:
        yaml_no_alias_safe_dump(vars(args), out)
    torch.save(model.state_dict(), directory / "valid.loss.best.pth")
    return model


def random_batch(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Return noise, with a random text."""
    samples, number = int(args.seconds * RATE), args.batch_size
    shape = number, args.text_length
    batch = dict(
        speech=0.1 * torch.randn(number, samples),
        speech_lengths=torch.full((number,), samples),
        text=torch.randint(1, args.vocab_size, shape),
        text_lengths=torch.full((number,), args.text_length),
    )
    return {name: value.to(args.device) for name, value in batch.items()}


def cached(
    reference: LiveReference, batch: dict[str, torch.Tensor], directory: Path
) -> dict[str, torch.Tensor]:
    """Return a batch with posteriors as ESPnet reads them from `directory`."""
    directory.mkdir()
    reference.description.save(directory)
    (directory / f"{POSTERIORS}.scp").touch()
    found = reference(batch["speech"], batch["speech_lengths"])
    stored = torch.stack([torch.from_numpy(pack(x, None)) for x in found.log_probs])
    return {
        **batch,
        "posteriors": stored.to(found.log_probs),
        "posteriors_lengths": found.lengths,
    }


class System:
    """A model in training, and the depths that its steps are timed at.

    Args:
        batch: its input.
        draws: how many depths stand for all.
    """

    def __init__(
        self, model: ESPnetASRModel, batch: dict[str, torch.Tensor], draws: int
    ):
        self.model, self.batch = model.train(), batch
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
        self.sampler = model.encoder.gates.sampler
        self.full_depth = len(model.encoder.gates)
        self.depths = self._typical_depths(draws)

    def _typical_depths(self, draws: int) -> list[int]:
        """Return the medians of as many equally likely parts of the drawn depths."""
        if self.sampler.is_full:
            return [self.full_depth]
        weights = self.sampler.weight_of_each_depth(self.full_depth).values()
        reached = list(itertools.accumulate(weights))
        middles = [(part + 0.5) / draws * reached[-1] for part in range(draws)]
        return [1 + bisect.bisect_left(reached, middle) for middle in middles]

    def loss(self, depth: int) -> torch.Tensor:
        """Run a forward in which the sampler draws `depth`."""
        fixed = DepthSampler(
            {depth: 1.0},
            min_depth=self.sampler.min_depth,
            layer_choice=self.sampler.layer_choice,
        )
        self.model.encoder.gates.open(fixed)
        return self.model(**self.batch)[0]

    def step(self, depth: int) -> None:
        """Run a training step of a depth."""
        training_step(partial(self.loss, depth), self.optimizer)

    def typical_step(self) -> None:
        """Run a training step of a depth in the middle of those that are drawn."""
        self.step(self.depths[len(self.depths) // 2])

    def arithmetic(self, depth: int) -> int:
        """Count the multiply-accumulates of a training step."""
        reference = 0
        if getattr(self.model, "reference_path", None) not in (None, "self"):
            frozen = self.model.open_reference()
            reference = counted_macs(lambda: frozen(**_without_text(self.batch)))
        forward = counted_macs(partial(self.loss, depth)) - reference
        return 3 * forward + reference

    def kept_bytes(self) -> int:
        """Return the size of what the forward at full depth keeps for the backward."""
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.loss(self.full_depth)
        del loss  # until here, no memory was used twice
        return sum(kept.values())


def _without_text(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x for name, x in batch.items() if not name.startswith("text")}


def build_systems(args: argparse.Namespace, directory: Path) -> dict[str, System]:
    """Build the static model and those that are asked for, by their names."""
    configs = [args.config, str(ROOT / "conf/systems" / f"{STATIC}.yaml")]
    model = build(merge_configs(configs), args.vocab_size, directory / STATIC)
    batch = random_batch(args)
    reference = LiveReference(directory / STATIC, args.device)
    references = dict(live=directory / STATIC, cached=directory / "cached", self="self")
    batches = dict(cached=cached(reference, batch, references["cached"]))
    systems = {STATIC: System(model.to(args.device), batch, args.draws)}
    for name in args.systems.split():
        system, _, source = name.partition(":")
        configs = [args.config, str(ROOT / "conf/systems" / f"{system}.yaml")]
        if source:
            if source not in references:
                raise UserError(f"{name}: write {system}:live, :cached or :self")
            configs += [f"model_conf.reference={references[source]}", "init_param=[]"]
        model = build(merge_configs(configs), args.vocab_size, directory / name)
        systems[name] = System(
            model.to(args.device), batches.get(source, batch), args.draws
        )
    return systems


def measure(systems: dict[str, System], rounds: int) -> dict[str, dict[str, Any]]:
    """Return what a step of each system costs."""
    static = systems[STATIC]
    others = {name: of for name, of in systems.items() if name != STATIC}
    full = static.full_depth
    full_step = partial(static.step, full)
    steps = {(STATIC, full): full_step}
    for depth in sorted({d for system in others.values() for d in system.depths}):
        steps[STATIC, depth] = full_step  # a full step beside those of each depth
        for name, system in others.items():
            if depth in system.depths:
                steps[name, depth] = partial(system.step, depth)
    seconds = times_in_turns(steps, rounds)
    full_arithmetic = static.arithmetic(full)
    found = {}
    for name, system in systems.items():
        ratios = [
            statistics.median(
                own / of_static
                for own, of_static in zip(seconds[name, depth], seconds[STATIC, depth])
            )
            for depth in system.depths
        ]
        medians = [statistics.median(seconds[name, depth]) for depth in system.depths]
        macs = [system.arithmetic(depth) / full_arithmetic for depth in system.depths]
        found[name] = dict(
            depths=system.depths,
            seconds=medians,
            times=ratios,
            arithmetic=macs,
            kept_bytes=system.kept_bytes(),
        )
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return the table of all systems."""
    rows = []
    for name, of in found.items():
        depth, seconds, time, arithmetic = (
            statistics.fmean(of[key])
            for key in ("depths", "seconds", "times", "arithmetic")
        )
        kept = f"{of['kept_bytes'] / 2**30:.2f}"
        means = (seconds, time, arithmetic, time / arithmetic)
        rows.append((name, f"{depth:.1f}", *(f"{mean:.2f}" for mean in means), kept))
    head = "system,mean depth,seconds,time / static,arithmetic / static"
    head += ",time / arithmetic,memory (GiB)"
    align = ["left", *["right"] * 6]
    return tabulate(
        rows, head.split(","), "github", colalign=align, disable_numparse=True
    )


@report_user_errors
def main(cmd: Optional[Sequence[str]] = None) -> None:
    """Measure, print a table, and write the ratios."""
    args = get_parser().parse_args(cmd)
    torch.set_num_threads(args.num_threads)
    with tempfile.TemporaryDirectory() as directory:
        systems = build_systems(args, Path(directory))
        found = measure(systems, args.rounds)
        print(table(found))
        if args.trace:
            print(trace({name: of.typical_step for name, of in systems.items()}))
    if args.output_json:
        Path(args.output_json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
