"""Runs of the trainer, killed at random moments and started again: their end has to be that of a run that nobody killed.

Recipes are not listed: every one in the package whose data need no files takes part, with the runs that it needs before it.
"""

from __future__ import annotations

import inspect
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from training_utils import MEASURED, SCHEDULES, epochs, process, steps

from frskd_fast.models.registry import imported
from frskd_fast.training.recipe_files import NEEDED, recipe, recipe_names

# Whatever is trained is short, written down in every step, and slow enough to be hit.
SHORT = {
    "trainer.max_epochs": 3,
    "trainer.limit_train_batches": 4,
    "trainer.limit_val_batches": 1,
    "trainer.log_every_n_steps": 1,
    "trainer.check_val_every_n_epoch": 1,
    "trainer.enable_progress_bar": False,
    "trainer.enable_model_summary": False,
    "trainer.accelerator": "cpu",
    "trainer.callbacks": "training_utils.Slow",
    "checkpoint.every_n_epochs": 1,
    "panels.enabled": False,
    "tensorboard": False,
}
# By a parameter of the data module.
SHORT_DATA = {"labels_per_class": {"batch_size": 20}, "training_scenes": {"training_scenes": 16, "batch_size": 4}}
# One of each is drawn for a run.
SETTINGS: dict[str, tuple[Any, ...]] = {
    "data.workers": (0, 0, 1),
    "trainer.max_steps": (-1, -1, 7),
    "trainer.accumulate_grad_batches": (1, 1, 2),
    "trainer.gradient_clip_val": (None, 1.0),
    "trainer.precision": ("32-true", "32-true", "bf16-mixed"),
    "trainer.val_check_interval": (1.0, 1.0, 2),
    "checkpoint.every_n_steps": (0, 1, 3),
    "lr_scheduler": (None, f"{SCHEDULES}.multistep"),
}
LIMIT_S = 600


class Outcome(NamedTuple):
    """What became of a run.

    Attributes:
        recipe: its name.
        kills: how often it was killed.
        finding: what is wrong, in a sentence; "" where nothing is.
    """

    recipe: str
    kills: int
    finding: str = ""


def recipes() -> list[str]:
    """Those whose data are made in memory, of all methods."""
    found = []
    for name in recipe_names():
        data = imported(recipe(name)["data"]["class_path"])
        if "root" not in inspect.signature(data).parameters:
            found.append(name)
    return found


def settings_of(name: str) -> dict[str, Any]:
    """What makes a run of a recipe short."""
    parameters = inspect.signature(imported(recipe(name)["data"]["class_path"])).parameters
    short = dict(SHORT)
    for key, more in SHORT_DATA.items():
        if key in parameters:
            short |= {f"data.{option}": value for option, value in more.items()}
    return short


def words_of(name: str, folder: Path, settings: dict[str, Any]) -> list[str]:
    """The command line of a run."""
    words = ["fit", "--config", name, "--run_dir", str(folder)]
    for option, value in settings.items():
        words += [f"--{option}", "null" if value is None else str(value)]
    return words


def provided(name: str, beside: Path) -> None:
    """Train, shortly, what a recipe needs, where it looks for it."""
    for needed in (recipe(name).get(kind) for kind in NEEDED):
        if needed is not None and not (beside / needed).exists():
            provided(needed, beside)
            run(words_of(needed, beside / needed, settings_of(needed)))


def run(words: list[str]) -> float:
    """Run to the end; seconds from the first file in its folder to the end.

    Raises:
        RuntimeError: with what it printed, when it fails.
    """
    running = process(words)
    begun = began(running, Path(words[words.index("--run_dir") + 1]))
    out, error = running.communicate(timeout=LIMIT_S)
    if running.returncode != 0:
        raise RuntimeError(f"frskd-fast {' '.join(words)} ends with {running.returncode}: {(out + error)[-2000:]}")
    return time.monotonic() - begun


def began(running: Any, folder: Path) -> float:
    """When a run has its table of steps, or is over."""
    file = folder / "steps.csv"
    while running.poll() is None and not file.is_file():
        time.sleep(0.01)
    return time.monotonic()


def trial(seed: int, name: str, beside: Path) -> Outcome:
    """One run of a recipe with settings drawn from `seed`, killed once or twice on its way."""
    draw = random.Random(seed)
    chosen = {option: draw.choice(values) for option, values in SETTINGS.items()}
    settings = settings_of(name) | {option: value for option, value in chosen.items() if value is not None}
    provided(name, beside)
    whole, folder = beside / f"whole-{seed}", beside / f"killed-{seed}"
    seconds = run(words_of(name, whole, settings))
    kills, told = 0, []
    for _ in range(draw.choice((1, 2))):
        running = process(words_of(name, folder, settings), group=True)
        began(running, folder)
        moment, number = draw.uniform(0, 0.8 * seconds), draw.choice((signal.SIGKILL, signal.SIGTERM))
        time.sleep(moment)
        if running.poll() is None:
            kills += 1
            told.append(f"{number.name} after {moment:.2f} s")
            os.killpg(running.pid, number)
        running.communicate(timeout=LIMIT_S)
        if running.returncode not in (0, -number, 128 + number):
            return Outcome(name, kills, f"{', '.join(told)}: the status is {running.returncode}. {json.dumps(chosen)}")
    try:
        run(words_of(name, folder, settings))
    except RuntimeError as error:
        return Outcome(name, kills, f"{', '.join(told)}: {error}")
    differing = ", ".join(differences(whole, folder))
    finding = f"{', '.join(told)}: {differing} differ. {json.dumps(chosen)}" if differing else ""
    return Outcome(name, kills, finding)


def differences(one: Path, other: Path) -> Iterator[str]:
    """Which of the files of two runs differ."""
    if steps(one) != steps(other):
        yield "steps.csv"
    if epochs(one) != epochs(other):
        yield "epochs.csv"
    yield from unequal(*(torch.load(run / "last.ckpt", weights_only=True) for run in (one, other)), "last.ckpt")


def unequal(one: Any, other: Any, where: str) -> Iterator[str]:
    """The places at which two checkpoints differ, in a tensor's bits or in anything that no clock measured."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({**one, **other}.keys() - MEASURED, key=str):
            if key not in one or key not in other:
                yield f"{where}[{key!r}]"
            else:
                yield from unequal(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        for number, pair in enumerate(zip(one, other, strict=True)):
            yield from unequal(*pair, f"{where}[{number}]")
    elif isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.dtype != other.dtype or not torch.equal(one, other):
            yield where
    elif type(one) is not type(other) or one != other:
        yield where
