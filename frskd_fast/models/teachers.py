"""Trained networks out of whatever holds them: a file, the folder of a run, timm."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import nn

from .adapters import TimmBackbone
from .auxiliary import with_auxiliary_heads
from .checkpoints import LAST, PREVIOUS, CheckpointError, classes_in, load_file, load_weights, without_heads
from .projection import ProjectionHead
from .registry import create_model, makes

TIMM = "timm:"


class Described(NamedTuple):
    """What `create_model` makes the network of a checkpoint from."""

    name: str
    arguments: dict[str, Any]
    num_classes: int


def described(
    content: Mapping[str, Any],
    path: str | os.PathLike[str],
    name: str | None = None,
    num_classes: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    options: tuple[str, str] = ("name", "num_classes"),
) -> Described:
    """The network in a checkpoint, as given, else as the trainer of this library wrote it down, else as the weights show.

    Args:
        content, path: what `load_file(path)` gave.
        name, num_classes, arguments: of `create_model`. Arguments in the file are those of the network that it names.
        options: what errors call name and num_classes.

    Raises:
        CheckpointError: when the file says nothing, or names something that makes no network.
        ValueError, TypeError, ImportError: of `create_model`.
    """
    settings = content.get("hyper_parameters")
    settings = settings if isinstance(settings, Mapping) else {}
    arguments = dict(arguments or {})
    if name in (None, settings.get("backbone")):
        arguments = {**(settings.get("backbone_args") or {}), **arguments}
    if name is None:
        name = settings.get("backbone")
        if name is None:
            raise CheckpointError(
                f"The checkpoint {path} does not say which network it holds; give {options[0]} a name that "
                "frskd_fast.models.create_model knows."
            )
        # A file from elsewhere could name anything that Python can call.
        if "." in name and not name.startswith(TIMM) and not makes(name, nn.Module):
            raise CheckpointError(
                f"The checkpoint {path} names {name} as its network, of which nothing says that it makes a torch.nn.Module; if "
                f"you trust the file, give {options[0]} the same."
            )
    classes = num_classes or settings.get("num_classes") or classes_in(content, create_model(name, **arguments))
    if classes is None:
        raise CheckpointError(f"The number of classes in {path} was not found; give {options[1]}.")
    return Described(name, arguments, int(classes))


def load_teacher(
    source: nn.Module | str | os.PathLike[str],
    name: str | None = None,
    num_classes: int | None = None,
    *,
    heads: Literal["auxiliary", "projection"] | None = None,
    **arguments: Any,
) -> nn.Module:
    """teacher = the trained network in `source`, in evaluation mode.

    | `source` | what is taken |
    | --- | --- |
    | a module | the module itself, as it is |
    | a file | its weights, in any of the forms of `load_backbone_weights`, in the network called `name` |
    | the folder of a run of `frskd-fast fit` | those of its `last.ckpt`, which says which network it holds |
    | `"timm:NAME"` | timm's network with timm's weights, which timm may download |

    Files of `frskd-fast fit` and `frskd-fast export` say themselves which network they hold. For weights that were
    fine-tuned with timm, give their file and `name="timm:NAME"`. Files are read with `weights_only=True`.

    Args:
        source: see the table.
        name: of the network, see `create_model`, where the source does not say it.
        num_classes: number of classes K; None reads it from the source.
        heads: return the network with its heads, trained: "auxiliary" as an `AuxiliaryNetwork` (HSAKD), "projection" as a
            `ProjectionHead` (SSKD). None: those that `name` says ("wrn_40_2_aux"), else none, even where the file has some.
        arguments: further arguments of the network.

    Raises:
        CheckpointError: a sentence on what is wrong with the file, or what it lacks, heads for example.
        ValueError, TypeError, ImportError: on an unknown network or arguments that do not suit the source.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from frskd_fast.models import wrn16x2
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"model": wrn16x2(num_classes=10).state_dict(), "epoch": 240}, f"{folder}/teacher.pth")
        ...     load_teacher(f"{folder}/teacher.pth", "wrn16x2").num_classes
        10
    """
    if heads not in (None, "auxiliary", "projection"):
        raise ValueError(f'heads is {heads!r}, but "auxiliary", "projection" or None was wanted.')
    if isinstance(source, nn.Module):
        if name is not None or num_classes is not None or arguments:
            raise ValueError(
                f"source is a module ({type(source).__name__}), which is used as it is, so name, num_classes and arguments of "
                "the network say nothing; leave them out."
            )
        return source
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source is a {type(source).__name__}, but a module, a path or 'timm:NAME' was wanted.")
    if str(source).startswith(TIMM):
        return _from_timm(str(source), name, num_classes, heads, arguments)
    path = _checkpoint(Path(source))
    content = load_file(path)
    found = described(content, path, name, num_classes, arguments)
    network = create_model(found.name, found.num_classes, **found.arguments)
    if heads is not None or name is None:
        network = _with_heads(network, heads)
    load_weights(network, content, path)
    return network.eval()


def _with_heads(network: nn.Module, heads: str | None) -> nn.Module:
    """The network with fresh heads of one kind; with none, the backbone."""
    if heads == "auxiliary":
        return with_auxiliary_heads(network)
    return ProjectionHead(without_heads(network)) if heads == "projection" else without_heads(network)


def _checkpoint(path: Path) -> Path:
    """The checkpoint itself: the last one of a run where `path` is its folder."""
    if not path.exists():
        raise CheckpointError(
            f"source is {str(path)!r}, which is neither a file nor a folder; a network that has learned was wanted: a "
            "checkpoint (with name=..., the name of its network), the folder of a run, 'timm:NAME', or a module."
        )
    if not path.is_dir() or (path / ".metadata").exists():  # a file, or shards
        return path
    # Between two renames of the trainer there is no last one.
    for checkpoint in (path / LAST, path / PREVIOUS):
        if checkpoint.exists():
            return checkpoint
    raise CheckpointError(
        f"The folder {path} holds no {LAST}, so it is no folder of a run, or of one that has saved nothing yet; train the "
        "teacher first, or give the checkpoint itself."
    )


def _from_timm(
    source: str, name: str | None, num_classes: int | None, heads: str | None, arguments: Mapping[str, Any]
) -> nn.Module:
    if name is not None or heads is not None:
        raise ValueError(
            f"source is {source!r}, timm's weights, but name is {name!r} and heads {heads!r}, which say something of files; "
            f"leave them out, or give the file of the weights as source and name={source!r}."
        )
    network = TimmBackbone.create(source.removeprefix(TIMM), pretrained=True, **arguments)
    if num_classes not in (None, network.num_classes):
        raise ValueError(
            f"num_classes is {num_classes}, but {source} was trained for {network.num_classes} classes, and with another "
            f"number its classifier would know nothing; give the file of fine-tuned weights as source and name={source!r}."
        )
    return network.eval()
