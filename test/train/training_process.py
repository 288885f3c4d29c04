"""asr_train in a process that records what it does, or is killed at a given moment."""

import argparse
import io
import os
import pathlib
import signal
from typing import Optional

import torch

import dldkit.train.stacking
from dldkit.bin.asr_train import main
from dldkit.depth.layers import GatedLayers
from dldkit.tasks.asr import DLDASRTask


def train(command: list[str], kill: str = "", record: Optional[str] = None) -> None:
    """Run asr_train.

    Args:
        kill: the moment of a real SIGKILL. `step N`: after the N-th backward pass;
            `write NAME`: half of the file is written; `before NAME`: nothing is;
            `link NAME`: before a symbolic link gets its name; `grow N`: before the
            N-th growth of this process; `grown N`: right after it.
        record: file for the drawn layers and the gradients of each step. A file next
            to it, `.weights`, gets the model's parameters at the end.
    """
    moment, _, name = kill.partition(" ")
    steps = []
    save, clip = torch.save, torch.nn.utils.clip_grad_norm_
    draw, symlink_to = GatedLayers.layers_of_step, pathlib.Path.symlink_to
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

    def recording_draw(self):
        drawn.append(draw(self))
        return drawn[-1]

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

    torch.set_num_threads(1)
    dldkit.train.stacking.grow = killing_grow
    torch.save, torch.nn.utils.clip_grad_norm_ = killing_save, recording_clip
    GatedLayers.layers_of_step = recording_draw
    pathlib.Path.symlink_to = killing_symlink_to
    main(command)
    if record is not None:
        save(steps, record)
        save([weight.detach() for weight in weights], f"{record}.weights")


def work(args: argparse.Namespace, record: str) -> None:
    """Be a child of ESPnet's multi-GPU launcher, and write down its trainer."""
    DLDASRTask.main_worker(args)
    trainer = DLDASRTask.trainer
    pathlib.Path(record).write_text(f"{trainer.__module__}.{trainer.__name__}")


def die() -> None:
    """End without any chance to clean up."""
    os.kill(os.getpid(), signal.SIGKILL)
