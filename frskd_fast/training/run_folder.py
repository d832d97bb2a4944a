"""The folder of a run: whose it is, and whether a command with these settings may go on in it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from .checkpoints import Progress, find_checkpoint
from .class_paths import PARTS
from .errors import Refusal
from .recipe_files import CONFIG, RecipeError, settings_in

# What a run that goes on must have in common with its beginning.
KEPT = ("seed_everything", "model", "data", *PARTS)
# Settings of the data that change how fast batches come, not which.
HARMLESS = ("root", "verify", "workers", "pin_memory", "persistent_workers", "evaluation_batch_size")


def check_same_run(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse to go on with a run whose task, model, optimiser, schedule, data or seed were set differently."""
    before = settings_of(folder)
    if before is None:
        return
    if "task" not in before:
        raise Refusal(
            f"{folder} holds a run of an earlier version of frskd_fast, whose settings had other names. Finish it with that "
            "version, or give --run_dir another folder, or --fresh to begin anew; its student can be exported by this one."
        )
    differences = [
        difference
        for part in KEPT
        for difference in _differences(part, before.get(part), settings.get(part))
        if difference[0].removeprefix("data.init_args.") not in HARMLESS
    ]
    if differences:
        listed = "; ".join(f"{name} was {old!r} and is {new!r}" for name, old, new in differences[:4])
        raise Refusal(
            f"{folder} holds a run with other settings: {listed}. Give --run_dir another folder, or --fresh to begin anew."
        )
    length, now = ((part.get("trainer") or {}).get("max_epochs") for part in (before, settings))
    if length_matters(settings) and length not in (None, now):
        raise Refusal(
            f"The learning rate of the run in {folder} follows {settings['lr_scheduler']['class_path']} over {length} epochs, "
            f"but trainer.max_epochs is {now}, and the steps so far would have been others. Give {length} again, or "
            "--run_dir another folder, or --fresh to begin anew; runs whose schedule does not depend on the length can be "
            "prolonged."
        )


def settings_of(folder: Path) -> dict[str, Any] | None:
    """The settings of the run in a folder, None where there are none.

    Raises:
        Refusal: when the file is damaged.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        settings = settings_in(path.read_text(encoding="utf-8"), str(path))
        trainer = settings.get("trainer", {})
        lengths = [trainer.get(name) for name in ("max_epochs", "max_steps")]
    except (RecipeError, UnicodeDecodeError, AttributeError) as error:
        raise _damaged(path, error) from error
    if not settings or not all(isinstance(length, int | None) for length in lengths):
        raise _damaged(path, "it lacks settings")
    return settings


def _damaged(path: Path, why: object) -> Refusal:
    return Refusal(
        f"{path}, the settings of the run there, is damaged ({why}). Mend it, or give --run_dir another folder, or --fresh to "
        "begin anew."
    )


def length_matters(settings: dict[str, Any]) -> bool:
    """Whether the schedule takes its length from the trainer."""
    arguments = (settings.get("lr_scheduler") or {}).get("init_args") or {}
    return "max_epochs" in arguments and arguments["max_epochs"] is None


def is_over(done: Progress, epochs: int | None, steps: int) -> bool:
    """Whether a run that is to take so many epochs and steps (None, -1: no limit) has nothing left to train."""
    return done.stopped or (epochs is not None and 0 <= epochs <= done.epochs) or 0 <= steps <= done.steps


def finished(folder: Path) -> Progress | None:
    """How long the run in a folder took, None where there is none or it has not come to its end.

    Raises:
        Refusal: when none of its checkpoints can be read.
    """
    settings = settings_of(folder)
    if settings is None:
        return None
    try:
        found = find_checkpoint(folder)
    except RuntimeError as error:
        raise Refusal(str(error)) from error
    trainer = settings.get("trainer") or {}
    epochs, steps = trainer.get("max_epochs"), trainer.get("max_steps")
    if found is None or not is_over(found.progress, epochs, -1 if steps is None else steps):
        return None
    return found.progress


def _differences(name: str, before: Any, now: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in dict.fromkeys([*before, *now]):
            found += _differences(f"{name}.{key}", before.get(key), now.get(key))
        return found
    return [] if before == now else [(name, before, now)]


def set_aside(folder: Path) -> Path | None:
    """Rename a folder that is there to FOLDER.old-1, -2, ..., the first that is free; None where there is none."""
    if not folder.is_dir():
        return None
    number = 1
    while (target := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(target)
    return target


def leave_nothing(folder: Path, there: set[Path]) -> None:
    """After a start that failed: remove the loggers' folder, and the run's, where they were not there before."""
    if (folder / CONFIG).exists():
        return  # of a run that has begun, perhaps in other processes
    if folder / "tensorboard" not in there:
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    if folder not in there and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
