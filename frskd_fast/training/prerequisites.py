"""The runs that a recipe needs before its own: found, or trained first, and handed on.

A recipe names them at its top, by recipe name: `teacher: NAME` and `expert: NAME` are handed to the task as its arguments of
these names (the run's folder), `weights: NAME` to the model as `weights` (the run's last checkpoint).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from frskd_fast.models.checkpoints import LAST

from .errors import Refusal
from .recipe_files import HANDED_TO_TASK, NEEDED, RecipeError, recipe
from .run_folder import finished

# The setting that takes each of them, and the options by which a user gives another one.
TAKEN_BY = {
    **{name: (("task", "init_args", name), (f"--task.{name}", f"--task.init_args.{name}")) for name in HANDED_TO_TASK},
    "weights": (("model", "weights"), ("--model.weights",)),
}
NO_PREREQUISITES = ("--no-prerequisites", "--no_prerequisites")
# What is handed on of a command line: where and how a run is trained, not what is trained; the data's only where both runs
# have the same.
HANDED_ON = (
    *("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.precision"),
    *("trainer.deterministic", "trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.benchmark"),
    *("tensorboard", "wandb", "panels.enabled", "progress.every_n_steps"),
)
OF_THE_DATA = ("root", "workers", "pin_memory", "persistent_workers", "evaluation_batch_size", "decoder")


class Needed(NamedTuple):
    """A run that another one needs.

    Attributes:
        kind: "teacher", "expert" or "weights".
        recipe: which it follows.
        folder: where it is, or will be.
        words: options that it is handed on.
    """

    kind: str
    recipe: str
    folder: Path
    words: tuple[str, ...]

    def arguments(self) -> list[str]:
        """The words that follow `frskd-fast fit` for it."""
        return ["--config", self.recipe, "--run_dir", str(self.folder), *self.words]


def split_off(words: Sequence[str], name: str) -> tuple[list[str], list[Needed], bool]:
    """The words of a command line with the paths of the runs that it needs, those runs, and whether they may be trained.

    Args:
        words: the settings of recipes as JSON behind `--config`, and the options of the user, as `cli.expanded` returns them.
        name: of the run's folder below `runs`, where nothing else is said. What is needed lies beside that folder.

    Returns:
        The words; the runs, without those in whose place the user names a path; and False with `--no-prerequisites`.

    Raises:
        RecipeError: when there is no such recipe, or runs need each other in a circle.

    Example:
        >>> settings = {"task": {"class_path": "MyTask"}, "teacher": "cifar100_resnet18_plain"}
        >>> words, (needed,), _ = split_off(["--config", json.dumps(settings), "--trainer.devices=2"], "mine")
        >>> json.loads(words[1])["task"]["init_args"]
        {'teacher': 'runs/cifar100_resnet18_plain'}
        >>> " ".join(needed.arguments())
        '--config cifar100_resnet18_plain --run_dir runs/cifar100_resnet18_plain --trainer.devices=2'
    """
    allowed = not set(words) & set(NO_PREREQUISITES)
    words = [word for word in words if word not in NO_PREREQUISITES]
    options = list(_options(words))
    places = [position + 1 for position, word in enumerate(words) if word == "--config"]
    recipes = [json.loads(words[place]) for place in places]
    settings: dict[str, Any] = {key: value for one in recipes for key, value in one.items()}
    folder = Path(settings.get("run_dir") or Path("runs", name))
    for flag, value, _ in options:
        folder = Path(value) if flag == "--run_dir" else folder
    given = {flag for flag, _, _ in options}
    needed = []
    for kind, (place, flags) in TAKEN_BY.items():
        wanted = settings.get(kind)
        for one in recipes:
            one.pop(kind, None)
        if wanted is None or given & set(flags) or any(_inner(one, place).get(place[-1]) for one in recipes):
            continue
        _refuse_circle(str(wanted))
        beside = folder.parent / Path(str(wanted)).name.removesuffix(".yaml")
        same_data = _origin(recipe(str(wanted))) == _origin(settings)
        handed_on = [word for flag, _, own in options if _is_handed_on(flag, same_data) for word in own]
        needed.append(Needed(kind, str(wanted), beside, tuple(handed_on)))
        _inner(recipes[-1], place)[place[-1]] = str(beside / LAST if kind == "weights" else beside)
    for position, one in zip(places, recipes, strict=True):
        words[position] = json.dumps(one)
    return words, needed, allowed


def provide(needed: Sequence[Needed], train: Callable[[list[str]], Any] | None, why_not: str = "") -> None:
    """Ensure that each run exists and is finished.

    Args:
        needed: as `split_off` returns them.
        train: called with the words of a run that has to be trained, or to go on; None trains nothing.
        why_not: with None: what kept it from being trained, as the beginning of a sentence.

    Raises:
        Refusal: saying what to run, where nothing is trained.
    """
    from .command_line import say

    for run in needed:
        done = finished(run.folder)
        if done is not None:
            say(f"The {run.kind} of this run: {run.folder}, finished after {done.epochs} epochs.")
        elif train is None:
            option = TAKEN_BY[run.kind][1][0]
            raise Refusal(
                f"This run needs the {run.kind} of a run by {run.recipe}, but {run.folder} holds no finished one. {why_not}: "
                f"run `frskd-fast fit {' '.join(run.arguments())}` first, or give {option} a path."
            )
        else:
            say(f"This run needs the {run.kind} of a run by {run.recipe}, which comes first, in {run.folder}.")
            train(run.arguments())


def _options(words: Sequence[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Each option of a command line: its name, its value, and the words that it takes up."""
    for position, word in enumerate(words):
        if word.startswith("--") and word != "--config":
            flag, equals, value = word.partition("=")
            following = words[position + 1 : position + 2]
            if not equals and following and not following[0].startswith("--"):
                yield flag, following[0], [word, following[0]]
            else:
                yield flag, value, [word]


def _is_handed_on(flag: str, same_data: bool) -> bool:
    name = flag.removeprefix("--")
    of_data = name.removeprefix("data.").removeprefix("init_args.")
    return name in HANDED_ON or (same_data and name.startswith("data.") and of_data in OF_THE_DATA)


def _inner(settings: dict[str, Any], place: Sequence[str]) -> dict[str, Any]:
    """The mapping that holds the last name of `place`, made where there is none."""
    for name in place[:-1]:
        inner = settings.get(name)
        if not isinstance(inner, dict):  # nothing, or the import path of a class alone
            inner = settings[name] = {} if inner is None else {"class_path": inner}
        settings = inner
    return settings


def _origin(settings: dict[str, Any]) -> list[Any]:
    """Which data a recipe trains on, and where they lie unless the user says so."""
    data = settings.get("data") or {}
    arguments = data.get("init_args") or {}
    return [data.get("class_path"), *(arguments.get(name) for name in ("root", "layout"))]


def _refuse_circle(wanted: str, seen: tuple[str, ...] = ()) -> None:
    if wanted in seen:
        raise RecipeError(f"The recipe {wanted!r} needs a run of itself first: {' -> '.join((*seen, wanted))}.")
    settings = recipe(wanted)
    for kind in NEEDED:
        if settings.get(kind) is not None:
            _refuse_circle(str(settings[kind]), (*seen, wanted))
