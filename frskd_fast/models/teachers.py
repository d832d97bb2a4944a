"""Trained networks out of whatever holds them: a file, the folder of a run, timm."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from .adapters import TimmBackbone
from .auxiliary import with_auxiliary_heads
from .checkpoints import LAST, PREVIOUS, CheckpointError, classes_in, load_file, load_weights, without_heads
from .projection import ProjectionHead
from .registry import create_model, created, is_own_network

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
    trusted: bool = False,
) -> Described:
    """The network in a checkpoint, as given, else as the trainer of this library wrote it down, else as the weights show.

    A checkpoint makes no code run and starts no download: a name in it that would do either has to be given, too, and
    arguments that say where timm finds weights are left out, as the weights are in the file.

    Args:
        content, path: what `load_file(path)` gave.
        name, num_classes, arguments: of `create_model`. Arguments in the file are those of the network that it names.
        options: what errors call name and num_classes.
        trusted: take any name that the file gives.

    Raises:
        CheckpointError: when the file says nothing, or names what has to be given.
        ValueError, TypeError, ImportError: of `create_model`.
    """
    settings = content.get("hyper_parameters")
    settings = settings if isinstance(settings, Mapping) else {}
    named, its_arguments = settings.get("backbone"), settings.get("backbone_args") or {}
    if not isinstance(named, str | None) or not isinstance(its_arguments, Mapping):
        raise CheckpointError(
            f"The checkpoint {path} has {named!r} as its backbone with the arguments {its_arguments!r}, but a name and a "
            "mapping were wanted; was it written by another program?"
        )
    arguments = dict(arguments or {})
    if name in (None, named):
        arguments = {**{key: value for key, value in its_arguments.items() if not _names_weights(key)}, **arguments}
    if name is None:
        name = named
        if name is None:
            raise CheckpointError(
                f"The checkpoint {path} does not say which network it holds; give {options[0]} a name that "
                "frskd_fast.models.create_model knows."
            )
        if not trusted and needs_trust(name):
            raise CheckpointError(
                f"The checkpoint {path} names {name} as its network, which runs code or is downloaded; if you trust the file, "
                f"give {options[0]} the same."
            )
    if num_classes is None:
        num_classes = settings.get("num_classes")
    if num_classes is None:
        num_classes = classes_in(content, _without_values(name, arguments))
    if num_classes is None:
        raise CheckpointError(f"The number of classes in {path} was not found; give {options[1]}.")
    return Described(name, arguments, int(num_classes))


def needs_trust(name: str) -> bool:
    """Whether to make the network called `name` calls what an import path outside of this package leads to, or asks a hub."""
    return ":" in name.removeprefix(TIMM) if name.startswith(TIMM) else "." in name and not is_own_network(name)


def _names_weights(argument: str) -> bool:
    """Whether timm reads by this argument what to load, and from where."""
    return argument.startswith("pretrained") or argument in ("checkpoint_path", "cache_dir")


def _without_values(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The network without values in its tensors, which takes no time, where its constructor reads none of them."""
    try:
        with torch.device("meta"):
            return create_model(name, **arguments)
    except RuntimeError:
        return create_model(name, **arguments)


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

    Files of `frskd-fast fit` and `frskd-fast export` say themselves which network they hold; where that is the import path of
    a network of your own, give the same `name`, as no file makes code run by itself. For weights that were fine-tuned with
    timm, give their file and `name="timm:NAME"`. Files are read with `weights_only=True`, and of a folder of shards the
    tensors alone.

    Args:
        source: see the table.
        name: of the network, see `create_model`, where the source does not say it.
        num_classes: number of classes K; None reads it from the source.
        heads: return the network with its heads, trained: "auxiliary" as an `AuxiliaryNetwork` (HSAKD), "projection" as a
            `ProjectionHead` (SSKD). None: those that `name` says ("wrn_40_2_aux"), else none, even where the file has some.
            HSAKD's MobileNetV2 has another stride than the others', which its weights do not show: "auxiliary" and
            "mobilenetv2_aux" give HSAKD's network, "mobilenetv2" alone that of RepDistiller and SSKD.
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
    return loaded_teacher(source, name, num_classes, heads, arguments)


def loaded_teacher(
    source: Any,
    name: str | None,
    num_classes: int | None,
    heads: str | None,
    arguments: Mapping[str, Any],
    called: tuple[str, str] = ("source", "name"),
) -> nn.Module:
    """`load_teacher` for callers whose own arguments have other names: `called` are those of source and name in errors."""
    if heads not in (None, "auxiliary", "projection"):
        raise ValueError(f'heads is {heads!r}, but "auxiliary", "projection" or None was wanted.')
    if isinstance(source, nn.Module):
        if name is not None or num_classes is not None or arguments:
            raise ValueError(
                f"{called[0]} is a module ({type(source).__name__}), which is used as it is, so {called[1]}, num_classes and "
                "arguments of the network say nothing; leave them out."
            )
        return source
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"{called[0]} is a {type(source).__name__}, but a module, a path or 'timm:NAME' was wanted.")
    if str(source).startswith(TIMM):
        return _from_timm(str(source), name, num_classes, heads, arguments, called)
    path = _checkpoint(Path(source), called)
    content = load_file(path)
    if heads == "auxiliary" and name is not None and not _names_network(content) and not {".", ":"} & {*name}:
        name = name.removesuffix("_aux") + "_aux"  # another network than the one without heads, where one is registered
    found = described(content, path, name, num_classes, arguments, (called[1], "num_classes"))
    network = created(found.name, found.num_classes, found.arguments, called[1])
    if heads is not None or name is None:
        network = _with_heads(network, heads)
    load_weights(network, content, path)
    return network.eval()


def _names_network(content: Mapping[str, Any]) -> bool:
    settings = content.get("hyper_parameters")
    return isinstance(settings, Mapping) and settings.get("backbone") is not None


def _with_heads(network: nn.Module, heads: str | None) -> nn.Module:
    """The network with fresh heads of one kind; with none, the backbone."""
    if heads == "auxiliary":
        return with_auxiliary_heads(network)
    return ProjectionHead(without_heads(network)) if heads == "projection" else without_heads(network)


def _checkpoint(path: Path, called: tuple[str, str]) -> Path:
    """The checkpoint itself: the last one of a run where `path` is its folder."""
    if not path.exists():
        raise CheckpointError(
            f"{called[0]} is {str(path)!r}, which is neither a file nor a folder; a network that has learned was wanted: a "
            f"checkpoint (with {called[1]}=..., the name of its network), the folder of a run, 'timm:NAME', or a module."
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
    source: str,
    name: str | None,
    num_classes: int | None,
    heads: str | None,
    arguments: Mapping[str, Any],
    called: tuple[str, str],
) -> nn.Module:
    if name is not None or heads is not None:
        raise ValueError(
            f"{called[0]} is {source!r}, timm's weights, but {called[1]} is {name!r} and heads {heads!r}, which say something "
            f"of files; leave them out, or give the file of the weights as {called[0]} and {called[1]}={source!r}."
        )
    network = TimmBackbone.create(source.removeprefix(TIMM), pretrained=True, **arguments)
    if num_classes not in (None, network.num_classes):
        raise ValueError(
            f"num_classes is {num_classes}, but {source} was trained for {network.num_classes} classes, and with another "
            f"number its classifier would know nothing; give the file of fine-tuned weights as {called[0]} and "
            f"{called[1]}={source!r}."
        )
    return network.eval()
