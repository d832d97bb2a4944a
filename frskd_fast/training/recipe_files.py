"""Recipes: YAML files of the package or of the user, each a few differences to the one it builds on."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

FOLDER = "recipes"
BASE = "base"
HANDED_TO_TASK = ("teacher", "expert")  # under the same names
NEEDED = (*HANDED_TO_TASK, "weights")  # recipes whose runs come before that of the recipe which names them
CONFIG = "config.yaml"  # the settings of a run, in its folder


class RecipeError(ValueError):
    """A recipe that is not there or cannot be read, as a sentence."""


def recipe_names() -> dict[str, str]:
    """Names of the recipes in the package, each with the folder that it lies in: its method.

    Example:
        >>> "digits" in recipe_names()
        True
    """
    methods = sorted((resources.files(__package__) / FOLDER).iterdir(), key=lambda folder: folder.name)
    return {
        name.removesuffix(".yaml"): method.name
        for method in methods
        if method.is_dir()
        for name in sorted(entry.name for entry in method.iterdir() if entry.name.endswith(".yaml"))
    }


def recipe_text(name: str, beside: Path | None = None) -> tuple[str, Path | None]:
    """The text of a recipe, and its file where it is not one of the package's.

    Args:
        name: a path to a YAML file, absolute or relative to `beside` or to the working directory; else the name of a
            recipe in the package, with or without ".yaml".
        beside: the folder of the file that names this one.

    Raises:
        RecipeError: when it cannot be read, or there is none, naming those with a similar spelling.
    """
    for folder in (beside, Path()):
        if folder is not None and os.path.isfile(folder / name):
            path = folder / name
            try:
                return path.read_text(encoding="utf-8"), path
            except (OSError, UnicodeDecodeError) as error:
                raise RecipeError(f"The recipe {str(path)!r} cannot be read ({error}).") from error
    names, bare = recipe_names(), name.removesuffix(".yaml")
    if bare in names:
        entry = resources.files(__package__) / FOLDER / names[bare] / f"{bare}.yaml"
        return entry.read_text(encoding="utf-8"), None
    close = difflib.get_close_matches(bare, names, n=3)
    meant = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise RecipeError(
        f"The recipe {name!r} is neither a file nor one of the package's; `frskd-fast recipes METHOD` lists those of "
        f"{', '.join(dict.fromkeys(names.values()))}.{meant}"
    )


def recipe(name: str, beside: Path | None = None, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """settings = those of its `base`, overridden by its own.

    A mapping is merged key by key, everything else (lists too) is replaced. Where a `class_path` changes, the old class's
    `init_args` are dropped.

    Args:
        name, beside: as for `recipe_text`.
        seen: the recipes that lead here.

    Returns:
        The settings, without `base`.

    Raises:
        RecipeError: on an unknown recipe, on a circle of bases, or on a file that holds no settings.

    Example:
        >>> recipe("cifar100_resnet18_frskd")["task"]["init_args"]["beta"]
        100.0
    """
    text, path = recipe_text(name, beside)
    own = settings_in(text, f"The recipe {name!r}")
    for key in NEEDED:
        # Relative to the file that says so, wherever a recipe that builds on it lies.
        if path is not None and own.get(key) is not None and (path.parent / str(own[key])).is_file():
            own[key] = str(path.parent / str(own[key]))
    base = own.pop(BASE, None)
    if base is None:
        return own
    if base in seen:
        raise RecipeError(
            f"The recipe {name!r} is built on {base!r}, which is built on it: {' -> '.join((*seen, name))}."
        )
    return merged(recipe(str(base), None if path is None else path.parent, (*seen, name)), own)


def settings_in(text: str, what: str) -> dict[str, Any]:
    """The settings in a text of YAML, which are plain values: no tags, dates or sets.

    Raises:
        RecipeError: beginning with `what`, when the text holds something else.

    Example:
        >>> settings_in("trainer: {max_epochs: 3}", "The recipe")
        {'trainer': {'max_epochs': 3}}
    """
    yaml = yaml_module()
    try:
        settings = yaml.safe_load(text) or {}
        json.dumps(settings)
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise RecipeError(f"{what} cannot be read as settings in YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(settings, dict):
        raise RecipeError(f"{what} holds a {type(settings).__name__}, but a mapping of settings was wanted.")
    return settings


def yaml_module() -> Any:
    """PyYAML, which the extra `train` installs."""
    try:
        import yaml
    except ImportError as error:
        raise RecipeError("yaml cannot be imported; pip install 'frskd_fast[train]'.") from error
    return yaml


def merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`base` overridden by `own`, see `recipe`.

    Example:
        >>> merged({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"c": 5}})
        {'a': 1, 'b': {'c': 5, 'd': 3}}
    """
    result = dict(base)
    if own.get("class_path", base.get("class_path")) != base.get("class_path"):
        result.pop("init_args", None)
    for key, value in own.items():
        before = result.get(key)
        result[key] = merged(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return result


def summary(name: str) -> str:
    """The first line of a recipe's comment."""
    first = recipe_text(name)[0].split("\n", 1)[0]
    return first.removeprefix("#").strip()
