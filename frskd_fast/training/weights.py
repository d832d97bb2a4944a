"""A backbone's weights out of checkpoints of this library and of other programs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Keys and files of a checkpoint: what Lightning does not save by itself, and what it keeps beside the tensors of shards.
STATE, SHARDED = "frskd_fast", "meta.pt"
# Where other trainers put the weights in a checkpoint, and what they put in front of the names.
CONTAINERS = ("state_dict", "net", "model", "student", "model_state_dict")
PREFIXES = ("module.", "_orig_mod.", "task.", "backbone.", "student.", "net.", "model.")


class ExportError(Exception):
    """What kept the student from being exported, as a sentence."""


def load_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of a checkpoint: a file of PyTorch, read with `weights_only=True`, or of safetensors, or a folder of shards.

    PyTorch unpickles the `.metadata` of shards, which can run code: read only those that you trust.

    Raises:
        ExportError: when it is missing, torn, or holds more than tensors and plain values.
    """
    path = Path(path)
    if path.is_dir():
        return _load_shards(path)
    if not path.is_file():
        raise ExportError(f"The checkpoint {path} does not exist.")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file as load_safetensors

        return dict(load_safetensors(path))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ExportError(
            f"The checkpoint {path} cannot be loaded ({brief(error)}). It is torn, or holds Python objects besides tensors; "
            "in that case save its state_dict() alone with the program that made it."
        ) from error
    if not isinstance(content, Mapping):
        raise ExportError(f"The checkpoint {path} holds a {type(content).__name__}, but a state dict was wanted.")
    return dict(content)


def _load_shards(folder: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    about = folder / SHARDED
    try:
        with tempfile.TemporaryDirectory() as scratch:
            whole = Path(scratch) / "whole.pt"
            dcp_to_torch_save(folder, whole)
            content = torch.load(whole, map_location="cpu", weights_only=True)
        return {**content, **(torch.load(about, weights_only=True) if about.is_file() else {})}
    except (Exception, CheckpointException) as error:
        raise ExportError(
            f"The checkpoint {folder} cannot be loaded ({brief(error)}). It is torn, or no folder of shards of "
            "torch.distributed.checkpoint."
        ) from error


def brief(error: BaseException) -> str:
    """The kind of an error and the first line of what it says, if it says anything."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def backbone_weights(content: Mapping[str, Any], wanted: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint that have the backbone's own names (`wanted`) behind one and the same prefix.

    The content is a state dict, or has one inside "state_dict", "net", "model" or "student"; prefixes are several of
    "module.", "task.backbone.", "model." and so on.

    Raises:
        ExportError: when no prefix leads to the backbone's names, or when there is more below the backbone's layers than
            it has, as in a deeper network; naming some of what is there.

    Example:
        >>> list(backbone_weights({"net": {"module.fc.weight": torch.zeros(2, 3)}}, ["fc.weight"]))
        ['fc.weight']
    """
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    for container in CONTAINERS:
        inner = content.get(container)
        if not tensors and isinstance(inner, Mapping):
            return backbone_weights(inner, wanted)
    best: dict[str, Tensor] = {}
    best_prefix = ""
    names = set(wanted)
    for prefix in _prefixes(tensors):
        found = {
            name.removeprefix(prefix): value
            for name, value in tensors.items()
            if name.startswith(prefix) and name.removeprefix(prefix) in names
        }
        if len(found) > len(best):
            best, best_prefix = found, prefix
    if not best:
        some = ", ".join(list(content)[:5])
        raise ExportError(
            f"The checkpoint holds none of the backbone's weights. It has {len(content)} entries such as {some}; wanted "
            f"were names such as {', '.join(list(wanted)[:3])}, perhaps behind a prefix like 'module.'. Is it another network?"
        )
    layers = {name.split(".", 1)[0] for name in wanted if "." in name}
    others = [name.removeprefix(best_prefix) for name in tensors if name.startswith(best_prefix)]
    more = [name for name in others if name not in names and "." in name and name.split(".", 1)[0] in layers]
    if more:
        raise ExportError(
            f"The checkpoint has {len(more)} tensors below the backbone's layers that the backbone has not, such as "
            f"{', '.join(more[:3])}; is it another network?"
        )
    return best


def _prefixes(tensors: Mapping[str, Any]) -> list[str]:
    """Every sequence of known prefixes that some name begins with, the empty one first."""
    found = {""}
    for name in tensors:
        prefix = ""
        while True:
            following = [known for known in PREFIXES if name.startswith(prefix + known)]
            if not following:
                break
            prefix += following[0]
            found.add(prefix)
    return sorted(found, key=len)


def load_backbone_weights(
    backbone: nn.Module, path: str | os.PathLike[str], *, skip_other_classifier: bool = False
) -> None:
    """Load a backbone's weights from a checkpoint in any of the known forms, in place.

    Args:
        backbone: the network.
        path: the file, see `backbone_weights`.
        skip_other_classifier: leave the last linear layer as it is where the file's has another number of classes.

    Raises:
        ExportError: naming what is missing or has another shape.
    """
    own = backbone.state_dict()
    weights = backbone_weights(load_file(path), list(own))
    other = [name for name, value in weights.items() if value.shape != own[name].shape]
    if skip_other_classifier:
        last = _classifier(backbone)
        classifier = [name for name in other if name.rpartition(".")[0] == last]
        weights = {name: value for name, value in weights.items() if name not in classifier}
        own = {name: value for name, value in own.items() if name not in classifier}
        other = [name for name in other if name not in classifier]
    if other:
        name = other[0]
        raise ExportError(
            f"{name} in {path} has shape {tuple(weights[name].shape)}, but the backbone's has {tuple(own[name].shape)}; "
            "another network, or another number of classes?"
        )
    # A counter that older files lack; it starts from 0.
    missing = [name for name in own if name not in weights and not name.endswith("num_batches_tracked")]
    if missing:
        raise ExportError(
            f"{path} lacks {len(missing)} of the backbone's {len(own)} tensors, {', '.join(missing[:3])} among them; is it "
            "another network?"
        )
    backbone.load_state_dict(weights, strict=False)


def classes_in(content: Mapping[str, Any], backbone: nn.Module) -> int | None:
    """The number of classes of the backbone in a checkpoint: the rows of its last linear layer."""
    weight = backbone_weights(content, list(backbone.state_dict())).get(f"{_classifier(backbone)}.weight")
    return None if weight is None else len(weight)


def _classifier(backbone: nn.Module) -> str | None:
    """The name of the last linear layer."""
    return next((name for name, layer in reversed([*backbone.named_modules()]) if isinstance(layer, nn.Linear)), None)
