"""A network's weights out of checkpoints of this library and of other programs."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import AdaptedBackbone
from .last_linear import last_linear

# Keys and files of a checkpoint: what Lightning does not save by itself, and what it keeps beside the tensors of shards.
STATE, SHARDED = "frskd_fast", "meta.pt"
# The newest checkpoint in the folder of a run, and the one before.
LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
# Where other trainers put the weights in a checkpoint, and what they put in front of the names.
CONTAINERS = ("state_dict", "net", "model", "student", "model_state_dict")
PREFIXES = ("module.", "_orig_mod.", "task.", "backbone.", "student.", "network.", "net.", "net1.", "net2.", "model.")
# The parts of a network with heads that a checkpoint may lack, and what trains them.
HEADS = {"auxiliary_classifier": "HSAKDTeacherTask", "proj_head": "SSKDHeadTask"}


class CheckpointError(ValueError):
    """Why weights cannot be taken from a checkpoint, as a sentence."""


def load_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of a checkpoint: a file of PyTorch, read with `weights_only=True`, or of safetensors, or a folder of shards.

    No code in it is run: of shards the tensors alone are read, and their `.metadata` with the few names that it needs.

    Raises:
        CheckpointError: when it is missing, torn, or holds more than tensors and plain values.
    """
    path = Path(path)
    if path.is_dir():
        return _load_shards(path)
    if not path.is_file():
        raise CheckpointError(f"The checkpoint {path} does not exist.")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"The checkpoint {path} cannot be loaded ({brief(error)}). It is torn, or holds Python objects besides tensors; "
            "in that case save its state_dict() alone with the program that made it."
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"The checkpoint {path} holds a {type(content).__name__}, but a state dict was wanted.")
    # torch.load does not compare the CRC-32 of the entries. Other programs may have switched them off.
    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\3\4"  # PyTorch's older format is none
    damage = damage_in_archive(path) if STATE in content and is_archive else None
    if damage is not None:
        raise CheckpointError(f"The checkpoint {path} is damaged: {damage}.")
    return dict(content)


def damage_in_archive(path: str | os.PathLike[str]) -> str | None:
    """What is wrong with a zip archive, as half a sentence, or None. Reads all of it and compares the CRC-32 of its entries."""
    try:
        with zipfile.ZipFile(path) as archive:
            entry = archive.testzip()
    except MemoryError:
        raise
    except (
        Exception
    ) as error:  # after a flipped bit of the directory nearly any: an entry seems compressed, or encrypted
        return f"it is torn or no file of PyTorch ({brief(error)})"
    return None if entry is None else f"its entry {entry} has changed since it was written"


def checksum_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values, on any device the same."""
    digest = hashlib.sha256()
    for name, value in tensors.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def checksum_of_export(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """SHA-256 of an exported .safetensors file: its tensors, and what it says about them under other keys than "sha256"."""
    values = checksum_of({name: tensors[name] for name in sorted(tensors)})
    said = sorted((key, value) for key, value in about.items() if key != "sha256")
    return hashlib.sha256(json.dumps([values, said]).encode()).hexdigest()


def _load_safetensors(path: Path) -> dict[str, Any]:
    """The tensors, and as "hyper_parameters" what `frskd-fast export` wrote about their network."""
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise CheckpointError(f"The checkpoint {path} needs safetensors ({error}); pip install safetensors.") from error
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            content = {name: file.get_tensor(name) for name in file.keys()}
        if "sha256" in about and about["sha256"] != checksum_of_export(content, about):
            raise CheckpointError("its content is not that of its checksum")
        if "backbone" not in about:
            return content
        settings = {
            "backbone": about["backbone"],
            "backbone_args": json.loads(about.get("backbone_args", "{}")),
            "num_classes": int(about["num_classes"]),
        }
    except Exception as error:
        raise CheckpointError(
            f"The checkpoint {path} cannot be loaded ({brief(error)}). It is torn or damaged."
        ) from error
    return {**content, "hyper_parameters": settings}


def _load_shards(folder: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint.api import CheckpointException

    from .shards import load_tensors

    about = folder / SHARDED
    try:
        content = load_tensors(folder)
        return {**content, **(torch.load(about, weights_only=True) if about.is_file() else {})}
    except (Exception, CheckpointException) as error:
        raise CheckpointError(
            f"The checkpoint {folder} cannot be loaded ({brief(error)}). It is torn, or no folder of shards of "
            "torch.distributed.checkpoint."
        ) from error


def brief(error: BaseException) -> str:
    """The kind of an error and the first line of what it says, if it says anything."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def backbone_weights(
    content: Mapping[str, Any], wanted: Sequence[str], other_names: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """The tensors of a checkpoint that have the backbone's own names (`wanted`) behind one and the same prefix.

    The content is a state dict, or has one inside "state_dict", "net", "model" or "student"; prefixes are several of
    "module.", "task.backbone.", "model." and so on. `other_names` are names that layers have in other programs' files, with
    the backbone's own.

    Raises:
        CheckpointError: when no prefix leads to the backbone's names, or when there is more below the backbone's layers than
            it has, as in a deeper network; naming some of what is there.

    Example:
        >>> list(backbone_weights({"net": {"module.fc.weight": torch.zeros(2, 3)}}, ["fc.weight"]))
        ['fc.weight']
    """
    for container in CONTAINERS:
        inner = content.get(container)
        if isinstance(inner, Mapping):
            return backbone_weights(inner, wanted, other_names)
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    names, layers = set(wanted), {name.split(".", 1)[0] for name in wanted if "." in name}
    best: dict[str, Tensor] = {}
    more: list[str] = []
    for prefix in _prefixes(tensors):
        under = {
            _own_name(name.removeprefix(prefix), other_names or {}): value
            for name, value in tensors.items()
            if name.startswith(prefix)
        }
        found = {name: value for name, value in under.items() if name in names}
        others = [name for name in under if name not in names and "." in name and name.split(".", 1)[0] in layers]
        # Of two networks in one file the deeper has all names of the other.
        if (len(found), -len(others)) > (len(best), -len(more)) and found:
            best, more = found, others
    if not best:
        some = ", ".join(list(content)[:5])
        raise CheckpointError(
            f"The checkpoint holds none of the backbone's weights. It has {len(content)} entries such as {some}; wanted "
            f"were names such as {', '.join(list(wanted)[:3])}, perhaps behind a prefix like 'module.'. Is it another network?"
        )
    if more:
        raise CheckpointError(
            f"The checkpoint has {len(more)} tensors below the backbone's layers that the backbone has not, such as "
            f"{', '.join(more[:3])}; is it another network?"
        )
    return best


def _own_name(name: str, other_names: Mapping[str, str]) -> str:
    for other, own in other_names.items():
        if name.startswith(f"{other}."):
            return own + name.removeprefix(other)
    return name


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
    return sorted(found, key=lambda prefix: (len(prefix), prefix))


def load_backbone_weights(
    backbone: nn.Module, path: str | os.PathLike[str], *, skip_other_classifier: bool = False
) -> None:
    """Load a network's weights from a checkpoint in any of the known forms, in place.

    | who wrote it | where the weights are |
    | --- | --- |
    | `frskd-fast fit`, `frskd-fast export` | `state_dict`; a .safetensors file |
    | RepDistiller, mdistiller | `model` |
    | SSKD | `state_dict`, with heads under `backbone.` and `proj_head.` |
    | HSAKD | `net`, under `backbone.` and `auxiliary_classifier.`; of an online pair the first, `net1.` |
    | torchvision, timm, `torch.save(network.state_dict(), path)` | the file itself |
    | efficientnet-pytorch, timm: an EfficientNet for `EfficientDetSeg` | the file itself; the rest of the network stays |

    Names may stand behind `module.` (DataParallel), `_orig_mod.` (torch.compile) and the like.

    Args:
        backbone: the network. One with heads (`AuxiliaryNetwork`, `ProjectionHead`) wants them from the file, too.
        path: the file, or a folder of shards, see `load_file`.
        skip_other_classifier: leave the last linear layer as it is where the file's has another number of classes.

    Raises:
        CheckpointError: naming what is missing or has another shape.

    Example:
        >>> import tempfile
        >>> from frskd_fast.models import wrn16x2
        >>> network = wrn16x2(num_classes=10)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"model": network.state_dict(), "epoch": 240}, f"{folder}/teacher.pth")
        ...     load_backbone_weights(network, f"{folder}/teacher.pth")
    """
    load_weights(backbone, load_file(path), path, skip_other_classifier=skip_other_classifier)


def load_weights(
    backbone: nn.Module,
    content: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    skip_other_classifier: bool = False,
) -> None:
    """As `load_backbone_weights`, with what `load_file(path)` gave."""
    backbone = _under_own_names(backbone)
    own = backbone.state_dict()
    try:
        weights = _network_weights(backbone, content)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace("The checkpoint", f"The checkpoint {path}", 1)) from error
    part = _names_of_part(backbone, content)
    own = {name: value for name, value in own.items() if name in part} if part else own
    other = [name for name, value in weights.items() if value.shape != own[name].shape]
    if skip_other_classifier:
        last = _classifier(backbone)
        classifier = [name for name in other if name.rpartition(".")[0] == last]
        weights = {name: value for name, value in weights.items() if name not in classifier}
        own = {name: value for name, value in own.items() if name not in classifier}
        other = [name for name in other if name not in classifier]
    # A counter that older files lack; the network keeps its own, 0 in a fresh one.
    missing = [name for name in own if name not in weights and not name.endswith("num_batches_tracked")]
    heads = {name.partition(".")[0] for name in missing}
    if heads and heads <= {*HEADS} and heads.isdisjoint(name.partition(".")[0] for name in weights):
        head = heads.pop()
        raise CheckpointError(
            f"The checkpoint {path} holds the network without its heads, of which {missing[0]} was wanted; train them first "
            f"(task {HEADS[head]}), or give the file that holds both."
        )
    if missing:
        raise CheckpointError(
            f"The checkpoint {path} lacks {len(missing)} of the backbone's {len(own)} tensors, {', '.join(missing[:3])} among "
            "them; is it another network?"
        )
    if other:
        name = other[0]
        raise CheckpointError(
            f"{name} in {path} has shape {tuple(weights[name].shape)}, but the backbone's has {tuple(own[name].shape)}; "
            "another network, or another number of classes?"
        )
    backbone.load_state_dict(weights, strict=False)


def classes_in(content: Mapping[str, Any], backbone: nn.Module) -> int | None:
    """The number of classes of the backbone in a checkpoint: the rows of its last linear layer, heads left aside."""
    backbone = _under_own_names(without_heads(backbone))
    weight = _network_weights(backbone, content).get(f"{_classifier(backbone)}.weight")
    return None if weight is None else len(weight)


def without_heads(network: nn.Module) -> nn.Module:
    """The backbone of a network with heads, `AuxiliaryNetwork` or `ProjectionHead`; another network as it is."""
    return network.get_submodule("backbone") if any(hasattr(network, head) for head in HEADS) else network


def _under_own_names(backbone: nn.Module) -> nn.Module:
    """The network in an adapter, which has no state besides: files have its own names, perhaps behind "model."."""
    model: nn.Module = backbone.model if isinstance(backbone, AdaptedBackbone) else backbone
    return model


def _network_weights(network: nn.Module, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """`backbone_weights` with the names of the network; those of its backbone where the file has no heads."""
    part = _names_of_part(network, content)
    if part:
        own_names = {other: own for own, other in part.items()}
        return {own_names[name]: value for name, value in backbone_weights(content, list(own_names)).items()}
    other_names = {
        f"{path}.{other}".lstrip("."): f"{path}.{own}".lstrip(".")
        for path, module in network.named_modules()
        for other, own in getattr(module, "other_names", {}).items()
    }
    try:
        return backbone_weights(content, list(network.state_dict()), other_names)
    except CheckpointError:
        backbone = without_heads(network)
        if backbone is network:
            raise
        try:
            alone = _network_weights(_under_own_names(backbone), content)
        except CheckpointError:
            alone = {}
        if not alone:
            raise
        prefix = "backbone." if _under_own_names(backbone) is backbone else "backbone.model."
        return {f"{prefix}{name}": value for name, value in alone.items()}


def _names_of_part(network: nn.Module, content: Mapping[str, Any]) -> Mapping[str, str]:
    """The names in the file of the network's own tensors, where it holds a part of the network under other names; or {}."""
    for container in CONTAINERS:
        inner = content.get(container)
        if isinstance(inner, Mapping):
            return _names_of_part(network, inner)
    forms: Sequence[Mapping[str, str]] = getattr(network, "names_of_part", ())
    for names in forms:
        first = next(iter(names.values()))
        if any(name == first or name.endswith(f".{first}") for name in content):
            return names
    return {}


def _classifier(backbone: nn.Module) -> str | None:
    """The name of the last linear layer, where there is one."""
    try:
        return last_linear(backbone)
    except ValueError:
        return None
