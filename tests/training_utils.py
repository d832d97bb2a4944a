"""A small network and the command line for the tests of the trainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from frskd_fast.training.tables import read_table

TESTS = Path(__file__).resolve().parent
MEASURED = ("seconds", "images_per_second")
SCHEDULES = "frskd_fast.training.schedules"
# The two kinds of task that most tests train.
PLAIN, DISTILLING = "frskd_fast.tasks.ClassificationTask", "frskd_fast.tasks.build_frskd"


class SmallNet(nn.Module):
    """Two levels with BatchNorm, and dropout: a network whose training draws random numbers."""

    def __init__(
        self, num_classes: int, dropout: float = 0.3, normalisation: Callable[[int], nn.Module] = nn.BatchNorm2d
    ) -> None:
        super().__init__()
        self.channels, self.num_classes = [8, 16], num_classes
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), normalisation(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, 2, 1), normalisation(16)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, images: Tensor, preact: bool = False) -> tuple[list[Tensor], Tensor]:
        first = self.bn1(self.conv1(images))
        second = self.bn2(self.conv2(F.relu(first)))
        logits = self.fc(self.dropout(F.relu(second).mean((2, 3))))
        return [first, second] if preact else [F.relu(first), F.relu(second)], logits


class Masked(SmallNet):
    """The same with a buffer of infinities, as attention masks have them."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))


class NormalisedByGroups(SmallNet):
    """The same without random numbers, and without statistics of the batch."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, dropout=0.0, normalisation=partial(nn.GroupNorm, 4))


class Adapted(nn.Module):
    """A network that hands out features when it is asked as RepDistiller asks, and so has to be adapted."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, images: Tensor, is_feat: bool = False) -> Any:
        first = F.relu(self.conv1(images))
        second = F.relu(self.conv2(first))
        pooled = second.mean((2, 3))
        logits = self.fc(pooled)
        return ([first, second, pooled], logits) if is_feat else logits


class Slow(Callback):
    """Leaves a tenth of a second after each step, so that another process can end this one where it wants to."""

    def on_train_batch_start(self, *arguments: Any) -> None:
        time.sleep(0.1)


class PoisonedGradients(Callback):
    """Gradients that are no numbers in the third step."""

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fit_loop.total_batch_idx == 2:
            for parameter in pl_module.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(float("nan"))


class PoisonedImage(Callback):
    """An image that is no number in the third batch, and so are its loss, its gradients and the statistics of BatchNorms."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop.total_batch_idx == 2:
            batch[0][0, 0, 0, 0] = float("nan")


class Frozen(Callback):
    """Keeps BatchNorms at their running statistics."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for module in pl_module.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


class Witness(Frozen):
    """Writes the gradients of every step into the run's folder besides."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = Path(trainer.default_root_dir) / f"gradients-{trainer.global_rank}-from{len(self.gradients)}.pt"
        torch.save(self.gradients, path)


def small_run(folder: Path, **overrides: Any) -> list[str]:
    """Words of a short `fit`: 4 batches an epoch, every loss written down, a checkpoint every 3 steps."""
    settings = {
        "model": {"backbone": "training_utils.SmallNet"},
        "lr_scheduler": {"class_path": f"{SCHEDULES}.multistep", "init_args": {"milestones": [2, 3]}},
        "data": {"init_args": {"batch_size": 25, "mixup": 0.2}},
        "trainer": {
            "max_epochs": 4,
            "log_every_n_steps": 1,
            "check_val_every_n_epoch": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "accelerator": "cpu",
        },
        "checkpoint": {"every_n_steps": 3, "every_n_epochs": 1},
        "panels": {"enabled": False},
        "run_dir": str(folder),
        "tensorboard": False,
    }
    recipe = folder.parent / f"{folder.name}.yaml"
    recipe.write_text(json.dumps({"base": "digits", **settings}), encoding="utf-8")
    words = ["fit", "--config", str(recipe)]
    for name, value in overrides.items():
        words += [f"--{name.replace('__', '.')}", str(value)]
    return words


def process(
    words: list[str], limit: int | None = None, processes: int = 1, group: bool = False
) -> subprocess.Popen[str]:
    """`frskd-fast WORDS` in a process of its own, that leads a group with `group`, as the command of a terminal does.

    `limit` is the largest file that it may write, in bytes;
    several `processes` are started by torchrun."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = [sys.executable, "-m", "frskd_fast.training", *words]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *launcher, "-m", "frskd_fast.training", *words]
        environment["OMP_NUM_THREADS"] = "1"
    if limit is not None:
        program = (
            "import resource, sys, runpy\n"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
            "sys.argv[0] = 'frskd-fast'\n"
            "from frskd_fast.training.cli import main\n"
            "sys.exit(main())\n"
        )
        command = [sys.executable, "-c", program, *words]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=TESTS,
        start_new_session=group,
    )


def steps(folder: Path) -> list[dict[str, str]]:
    """Rows of `steps.csv`, as text: equal text is equal bits."""
    return read_table(folder / "steps.csv")[1]


def epochs(folder: Path) -> list[dict[str, str]]:
    """Rows of `epochs.csv` without what a clock measured."""
    return [
        {name: value for name, value in row.items() if name not in MEASURED}
        for row in read_table(folder / "epochs.csv")[1]
    ]


def weights(folder: Path, name: str = "last.ckpt") -> dict[str, Tensor]:
    """The weights in a checkpoint."""
    state: dict[str, Tensor] = torch.load(folder / name, map_location="cpu", weights_only=True)["state_dict"]
    return state


def same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether all tensors are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
