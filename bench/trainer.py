"""What the trainer costs: its step beside the bare step, and the time from the command to the first step.

    python bench/trainer.py                  both, on a ResNet-18 with 128 images a step
    python bench/trainer.py --json           the numbers alone

The bare step is the task's forward pass, backward, SGD's step and the clearing of the gradients, on one batch in memory.
The trainer's step is all that happens between the ends of two batches under Lightning: reading, cropping, flipping and
normalising images, hooks, records, the bar. The two take turns within one run, each with a copy of the same task, so that
a change of the machine's speed meets both.

Steps of seconds vary by more than the trainer adds. What it adds does not depend on the network, so it is measured on a
network of almost nothing with the same images, over many turns: the median of the differences is the trainer's own time,
and the overhead is that time in relation to the real network's bare step. The ratio of the real network's steps is there
as a check.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.append(str(ROOT))

import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402

from frskd_fast.training import DistillationModule, ProgressBar, Records  # noqa: E402
from frskd_fast.training.data import ArrayReader, ImageData  # noqa: E402
from frskd_fast.training.module import SGD  # noqa: E402

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


class Noise(ImageData):
    """Random bytes as images of CIFAR's size, cropped and flipped as CIFAR-100 is."""

    num_classes, image_size, channels = CLASSES, (32, 32), 3
    mean, std, padding = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 4

    def __init__(self, batches: int, batch_size: int) -> None:
        super().__init__(batch_size=batch_size)
        self.count = batches * batch_size

    def make_reader(self, part: str) -> ArrayReader | None:
        if part != "train":
            return None
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (self.count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return ArrayReader(images, torch.arange(self.count) % CLASSES, self.padding, 0.5)


class Turns(pl.Callback):
    """After each of the trainer's steps, one bare step; both are timed."""

    def __init__(self, task: torch.nn.Module) -> None:
        self.task = task
        parameters = [p for p in task.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, **SGD["init_args"])
        self.since = 0.0
        self.trainer_seconds: list[float] = []
        self.bare_seconds: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.since = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        _synchronise(module.device)
        started = time.perf_counter()
        self.trainer_seconds.append(started - self.since)
        images, targets = batch
        self.task(images, targets)["loss"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        _synchronise(module.device)
        self.since = time.perf_counter()
        self.bare_seconds.append(self.since - started)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def turns_of(backbone: str, images: int, steps: int, compiled: bool) -> dict[str, Any]:
    """Median seconds of both steps, median of their differences, and their ratios."""
    module = DistillationModule(CLASSES, "frskd_fast.tasks.build_frskd", backbone)
    bare = copy.deepcopy(module.task).train()
    if compiled:
        module.task.compile()
        bare.compile()
    accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    bare.to("cuda" if accelerator == "gpu" else "cpu")
    turns = Turns(bare)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=1,
            default_root_dir=folder,
            accelerator=accelerator,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            log_every_n_steps=1,
            # Turns comes last but one: the records and the bar belong to the trainer's step of the next turn.
            callbacks=[turns, Records(), ProgressBar(every_n_steps=1)],
        )
        trainer.fit(module, Noise(steps + WARM_UP, images))
    ours, theirs = turns.trainer_seconds[WARM_UP:], turns.bare_seconds[WARM_UP:]
    pairs = list(zip(ours, theirs, strict=True))
    return {
        "backbone": backbone,
        "images": images,
        "steps": steps,
        "compiled": compiled,
        "trainer_seconds": statistics.median(ours),
        "bare_seconds": statistics.median(theirs),
        "difference_seconds": statistics.median(one - other for one, other in pairs),
        "ratios": [one / other for one, other in pairs],
    }


def start(repetitions: int) -> dict[str, Any]:
    """Seconds from `frskd-fast fit --config digits` to the record of the first step."""
    seconds = []
    for _ in range(repetitions):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            command = [sys.executable, "-m", "frskd_fast.training", "fit", "--config", "digits", "--run_dir", str(run)]
            command += ["--trainer.max_epochs", "1", "--panels.enabled", "false"]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
            started = time.perf_counter()
            with subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
            ) as running:
                while not (run / "steps.csv").is_file():
                    if running.poll() is not None and not (run / "steps.csv").is_file():
                        sys.exit(f"The run ended with status {running.returncode} before its first step.")
                    time.sleep(0.005)
                seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds), "all": seconds}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What the trainer costs.")
    parser.add_argument("--backbone", default="cifarresnet18", help="default %(default)s")
    parser.add_argument("--images", type=int, default=128, help="images a step (default %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="turns of the network (default %(default)s)")
    parser.add_argument("--turns", type=int, default=100, help="turns of almost nothing (default %(default)s)")
    parser.add_argument("--compile", action="store_true", help="both steps compiled")
    parser.add_argument("--starts", type=int, default=3, help="repetitions of the start (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    # The progress bars write to standard output, which is the result's.
    with contextlib.redirect_stdout(sys.stderr):
        result = {
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "lightning": pl.__version__,
            "start": start(options.starts),
            "nothing": turns_of("bench.trainer.AlmostNothing", options.images, options.turns, False),
            "step": turns_of(options.backbone, options.images, options.steps, options.compile),
        }
    result["overhead"] = result["nothing"]["difference_seconds"] / result["step"]["bare_seconds"]
    if options.json:
        print(json.dumps(result, indent=1))
        return
    step = result["step"]
    print(f"From the command to the first step of digits: {result['start']['seconds']:.1f} s")
    print(
        f"{step['images']} images: the trainer's own time {1000 * result['nothing']['difference_seconds']:.1f} ms a step; bare "
        f"step of {step['backbone']} {1000 * step['bare_seconds']:.0f} ms; overhead {100 * result['overhead']:.2f} %"
    )
    print(
        f"Check: the trainer's step takes {statistics.median(step['ratios']):.2f} times the bare step (median of turns)."
    )


if __name__ == "__main__":
    main()
