"""asr_train in a process that records what it does, or is killed at a given moment."""

import argparse
import io
import os
import pathlib
import signal
import sys
from typing import Optional

import torch

import dldkit.train.stacking
from dldkit.bin.asr_train import main
from dldkit.depth.layers import GatedLayers
from dldkit.errors import UserError
from dldkit.tasks.asr import DLDASRTask


def train(command: list[str], kill: str = "", record: Optional[str] = None) -> None:
    """Run asr_train.

    Args:
        kill: the moment of a real SIGKILL. `step N`: after the N-th backward pass;
            `write NAME`: half of the file is written; `before NAME`: nothing is;
            `link NAME`: before a symbolic link gets its name; `grow N`: before the
            N-th growth of this process; `grown N`: right after it; `operation N`:
            before the N-th file operation in the experiment directory since the
            checkpoint of the second epoch was begun; none if it trains the third.
        record: file for the drawn layers and the gradients of each step. A file next
            to it, `.weights`, gets the model's parameters at the end.
    """
    moment, _, name = kill.partition(" ")
    steps = []
    save, clip = torch.save, torch.nn.utils.clip_grad_norm_
    draw, symlink_to = GatedLayers.draws_of_step, pathlib.Path.symlink_to
    grow, growths = dldkit.train.stacking.grow, []
    drawn, weights = [], []

    def killing_save(states, path):
        if pathlib.Path(path).name.startswith(name):
            if moment == "before":
                die()
            if moment == "write":
                buffer = io.BytesIO()
                save(states, buffer)
                with open(path, "wb") as file:
                    file.write(buffer.getvalue()[: buffer.tell() // 2])
                    file.flush()
                    die()
        save(states, path)

    def killing_symlink_to(self, target):
        if moment == "link" and self.name == name:
            die()
        symlink_to(self, target)

    def recording_draw(self, number):
        draws = draw(self, number)
        drawn.append(draws[0])
        return draws

    def recording_clip(parameters, *args, **kwargs):
        parameters = weights[:] = list(parameters)
        flat = torch.cat(
            [
                (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                for p in parameters
            ]
        )
        steps.append((drawn[-1], flat))
        if moment == "step" and len(steps) == int(name):
            die()
        return clip(parameters, *args, **kwargs)

    def killing_grow(*args):
        growths.append(args)
        if moment == "grow" and len(growths) == int(name):
            die()
        grow(*args)
        if moment == "grown" and len(growths) == int(name):
            die()

    if moment == "operation":
        directory = command[command.index("--output_dir") + 1]
        sys.addaudithook(FileOperations(directory, int(name)))
    torch.set_num_threads(1)
    dldkit.train.stacking.grow = killing_grow
    torch.save, torch.nn.utils.clip_grad_norm_ = killing_save, recording_clip
    GatedLayers.draws_of_step = recording_draw
    pathlib.Path.symlink_to = killing_symlink_to
    main(command)
    if record is not None:
        save(steps, record)
        save([weight.detach() for weight in weights], f"{record}.weights")


class FileOperations:
    """Counts what changes files of a directory, and dies before the N-th change."""

    events = ("open", "os.rename", "os.remove", "os.symlink", "os.mkdir", "os.rmdir")

    def __init__(self, directory: str, last: int):
        self.directory, self.last = directory, last
        self.checkpoints, self.count, self.done = 0, 0, False

    def __call__(self, event: str, args: tuple) -> None:
        if event not in self.events or self.done:
            return
        names = [str(arg) for arg in args[:2]]
        if not any(name.startswith(f"{self.directory}/") for name in names):
            return
        if event == "open" and "r" in str(args[1]):
            return
        if event == "os.rename" and names[1].endswith("checkpoint.pth.pending"):
            self.checkpoints += 1
        if self.checkpoints == 2:
            self.count += 1
            if self.count == self.last:
                die()
        self.done = self.checkpoints == 3


class RefusingTask(DLDASRTask):
    """Finds that something is wrong in the processes that it spawns only."""

    @classmethod
    def check_data(cls, args: argparse.Namespace) -> None:
        if getattr(args, "local_rank", None) is not None:
            raise UserError("the data do not fit: mend them")


def work(args: argparse.Namespace, record: str) -> None:
    """Be a child of ESPnet's multi-GPU launcher, and write down its trainer."""
    DLDASRTask.main_worker(args)
    trainer = DLDASRTask.trainer
    pathlib.Path(record).write_text(f"{trainer.__module__}.{trainer.__name__}")


def die() -> None:
    """End without any chance to clean up."""
    os.kill(os.getpid(), signal.SIGKILL)
