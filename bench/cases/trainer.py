"""What the trainer costs: its step beside the bare step, and the time from the command to the first step.

The bare step is the task's forward pass, backward, SGD's step and the clearing of the gradients, on one batch in memory.
The trainer's step is all that happens between the ends of two batches under Lightning: reading, cropping, flipping and
normalising images, hooks, records, the bar. The two take turns within one run, each with a copy of the same task, so that
a change of the machine's speed meets both.

Steps of seconds vary by more than the trainer adds. What it adds does not depend on the network, so it is measured on a
network of almost nothing with the same images, over many turns: the median of the differences is the trainer's own time.
In relation to the bare step of cifarresnet18 it is the overhead.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.case import Program, Selection
from bench.results import ROOT
from bench.timing import synchronise

ONLY_BY_NAME = True
CLASSES = 100
WARM_UP = 1


class AlmostNothing(torch.nn.Module):
    """Two levels of a few numbers each: what is left of a step when the network costs nothing."""

    channels = (2, 2)

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.first = torch.nn.Conv2d(3, 2, 8, 8)
        self.second = torch.nn.Conv2d(2, 2, 2, 2)
        self.fc = torch.nn.Linear(2, num_classes)

    def forward(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        first = self.first(images)
        second = self.second(first)
        return [first, second], self.fc(second.mean((2, 3)))


def noise(batches: int, batch_size: int) -> Any:
    """Random bytes as images of CIFAR's size, cropped and flipped as CIFAR-100 is."""
    from frskd_fast.training.data import ArrayReader, ImageData

    class Noise(ImageData):
        num_classes, image_size, channels = CLASSES, (32, 32), 3
        mean, std, padding = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 4

        def make_reader(self, part: str) -> ArrayReader | None:
            if part != "train":
                return None
            count = batches * batch_size
            generator = torch.Generator().manual_seed(0)
            images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
            return ArrayReader(images, torch.arange(count) % CLASSES, self.padding, 0.5)

    return Noise(batch_size=batch_size)


def turns(task: Any) -> Any:
    """A callback: after each of the trainer's steps one bare step of `task`; both are timed."""
    import lightning.pytorch as pl

    from frskd_fast.training.module import SGD

    class Turns(pl.Callback):
        def __init__(self) -> None:
            self.optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], **SGD["init_args"])
            self.since = 0.0
            self.trainer_ms: list[float] = []
            self.bare_ms: list[float] = []

        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            self.since = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            synchronise(module.device.type)
            started = time.perf_counter()
            self.trainer_ms.append(1e3 * (started - self.since))
            images, targets = batch
            task(images, targets)["loss"].backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            synchronise(module.device.type)
            self.since = time.perf_counter()
            self.bare_ms.append(1e3 * (self.since - started))

    return Turns()


def steps(backbone: str, images: int, rounds: int, compiled: bool, settings: Any) -> dict[str, list[float]]:
    """Milliseconds of both steps in every round, and their differences."""
    import lightning.pytorch as pl

    from frskd_fast.training import DistillationModule, ProgressBar, Records

    module = DistillationModule(CLASSES, "frskd_fast.tasks.build_frskd", backbone)
    bare = copy.deepcopy(module.task).train().to(settings.device)
    for task in (module.task, bare) if compiled else ():
        task.compile()
    both = turns(bare)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    rounds = settings.repeats or rounds
    # The progress bar writes to standard output, which is the result's.
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_epochs=1,
            default_root_dir=folder,
            accelerator="gpu" if settings.device == "cuda" else "cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            log_every_n_steps=1,
            # The records and the bar come after the turns: they belong to the trainer's step of the next turn.
            callbacks=[both, Records(), ProgressBar(every_n_steps=1)],
        )
        trainer.fit(module, noise(rounds + WARM_UP, images))
    ours, theirs = both.trainer_ms[WARM_UP:], both.bare_ms[WARM_UP:]
    differences = [one - other for one, other in zip(ours, theirs, strict=True)]
    return {"bare step": theirs, "trainer's step": ours, "difference": differences}


def starts(settings: Any) -> dict[str, list[float]]:
    """Milliseconds from `frskd-fast fit --config digits` to the record of the first step."""
    times = []
    for _ in range(settings.repeats or 3):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            command = [sys.executable, "-m", "frskd_fast.training", "fit", "--config", "digits", "--run_dir", str(run)]
            command += ["--trainer.max_epochs", "1", "--panels.enabled", "false"]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
            quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            begin = time.perf_counter()
            with subprocess.Popen(command, env=environment, **quiet) as running:
                while not (run / "steps.csv").is_file():
                    if running.poll() is not None and not (run / "steps.csv").is_file():
                        raise RuntimeError(f"the run ended with status {running.returncode} before its first step.")
                    time.sleep(0.005)
                times.append(1e3 * (time.perf_counter() - begin))
    return {"frskd-fast fit": times}


def cases(selection: Selection) -> list[Program]:
    """The start, almost nothing, cifarresnet18 and, in a full run, both steps compiled."""
    images = selection.batch or 128

    def turns_of(backbone: str, rounds: int, compiled: bool = False) -> Program:
        shape = f"{backbone.rsplit('.', 1)[-1]} N={images}{' compiled' if compiled else ''}"
        return Program("trainer", shape, partial(steps, backbone, images, rounds, compiled))

    return [
        Program("trainer", "command to first step, digits", starts),
        turns_of("bench.cases.trainer.AlmostNothing", 20 if selection.quick else 100),
        turns_of("cifarresnet18", 5),
        *([turns_of("cifarresnet18", 5, compiled=True)] if selection.full else []),
    ]
