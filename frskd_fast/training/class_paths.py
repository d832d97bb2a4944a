"""Objects from settings: `{"class_path": "package.Class", "init_args": {...}}`, or the path alone."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from frskd_fast.models.registry import imported, is_own_network
from frskd_fast.models.teachers import TIMM

from .recipe_files import HANDED_TO_TASK

Settings = str | Mapping[str, Any]
# The parts of a training that are chosen by class, besides the data; with the argument that the trainer gives.
PARTS = {"task": "backbone", "optimizer": "params", "lr_scheduler": "optimizer"}

# What settings in a file may name without being trusted, besides networks of this package: classes and functions that were
# made to be built from settings.
KNOWN = ("frskd_fast.tasks", "frskd_fast.losses", "frskd_fast.training.schedules", "torch.optim")


def class_path(settings: Settings) -> str:
    """The import path in the settings."""
    return settings if isinstance(settings, str) else str(settings["class_path"])


def arguments_in(settings: Settings) -> dict[str, Any]:
    """The arguments in the settings; none where they are left out or null."""
    if isinstance(settings, str):
        return {}
    return {**(settings.get("init_args") or {}), **(settings.get("dict_kwargs") or {})}


def build(settings: Settings, *arguments: Any, **defaults: Any) -> Any:
    """object = class_path(*arguments, **init_args).

    Args:
        settings: the import path of a class or function; or a mapping with `class_path` and `init_args`, whose own values
            may be such mappings, or lists of them.
        arguments: come first in the call.
        defaults: for arguments that the class or function takes and that the settings leave out or leave at None.

    Raises:
        ImportError: as a sentence, when nothing has this path.

    Example:
        >>> build({"class_path": "fractions.Fraction", "init_args": {"denominator": 3}}, 2)
        Fraction(2, 3)
    """
    function = imported(class_path(settings))
    keywords = {name: _resolved(value) for name, value in arguments_in(settings).items()}
    for name, value in defaults.items():
        if keywords.get(name) is None and name in inspect.signature(function).parameters:
            keywords[name] = value
    return function(*arguments, **keywords)


def _resolved(value: Any) -> Any:
    if isinstance(value, list):
        return [_resolved(item) for item in value]
    return build(value) if isinstance(value, Mapping) and "class_path" in value else value


def unknown_names(settings: Any) -> Iterator[str]:
    """All that settings from a file name which runs code of others or starts a download: import paths, networks of timm.

    Paths of a teacher do neither. Every other text with a dot counts.

    Example:
        >>> list(unknown_names({"task": "frskd_fast.tasks.FRSKDTask", "backbone": "package.Net", "lr_monitor": "loss"}))
        ['package.Net']
    """
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            is_path = key in HANDED_TO_TASK and isinstance(value, str) and not value.startswith(TIMM)
            yield from () if is_path else unknown_names(value)
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from unknown_names(value)
    elif isinstance(settings, str) and (settings.startswith(TIMM) or "." in settings) and not _is_known(settings):
        yield settings


def _is_known(path: str) -> bool:
    if is_own_network(path):
        return True
    module, _, _ = path.rpartition(".")
    if not any(module == known or module.startswith(f"{known}.") for known in KNOWN):
        return False
    try:
        found = imported(path)
    except ImportError:
        return False
    # Not what its module has imported from elsewhere.
    return str(getattr(found, "__module__", "")).startswith(KNOWN)
