"""Objects from settings: `{"class_path": "package.Class", "init_args": {...}}`, or the path alone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from frskd_fast.models.registry import imported

Settings = str | Mapping[str, Any]
# The parts of a training that are chosen by class, besides the data; with the argument that the trainer gives.
PARTS = {"task": "backbone", "optimizer": "params", "lr_scheduler": "optimizer"}


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
