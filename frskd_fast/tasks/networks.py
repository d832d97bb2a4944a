"""What tasks do with the networks that they are given: check them, adapt them, move them, freeze a teacher."""

from __future__ import annotations

import copy
import inspect
from typing import Any, Literal

import torch
from torch import Tensor, nn

from frskd_fast.losses.base import channels_of
from frskd_fast.models import AuxiliaryNetwork, ProjectionHead, adapt_backbone
from frskd_fast.models.teachers import loaded_teacher
from frskd_fast.ops.labels import is_mix

from .base import FrozenTeacher


def check_module(module: Any, name: str) -> None:
    """Raise unless `module`, which the error calls `name`, is one."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name} is a {type(module).__name__}, but a torch.nn.Module was wanted.")


def with_channels(backbone: nn.Module) -> nn.Module:
    """`backbone`, adapted where it does not say what channels its maps have."""
    return backbone if isinstance(getattr(backbone, "channels", None), list | tuple) else adapt_backbone(backbone)


@torch.no_grad()
def with_shuffled_weights(network: nn.Module) -> nn.Module:
    """A copy of `network` with the values of each parameter that trains in another order: other weights, alike distributed.

    Running statistics belong to the old weights; where a layer's parameters train, they begin anew.

    Example:
        >>> network = nn.Linear(2, 3)
        >>> twin = with_shuffled_weights(network)
        >>> sorted(twin.bias.tolist()) == sorted(network.bias.tolist())
        True
    """
    twin = copy.deepcopy(network)
    for parameter in twin.parameters():
        if parameter.requires_grad:
            order = torch.randperm(parameter.numel(), device=parameter.device)
            parameter.copy_(parameter.flatten()[order].view(parameter.shape))
    for module in twin.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and all(p.requires_grad for p in module.parameters()):
            module.reset_running_stats()
    return twin


def like(backbone: nn.Module, module: nn.Module) -> nn.Module:
    """`module` on the backbone's device and in its dtype."""
    for parameter in backbone.parameters():
        if parameter.is_floating_point():
            return module.to(parameter.device, parameter.dtype)
    return module


def check_takes_preact(module: nn.Module, name: str, loss: nn.Module) -> None:
    """Raise unless `module(images, preact=True)` can be called, as `loss` wants it."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return  # nothing can be said of a forward without a signature
    if not any(parameter.name == "preact" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        raise TypeError(
            f"{name} ({type(module).__name__}) takes no argument preact, but loss ({type(loss).__name__}) wants feature maps "
            f"before their last ReLU; let its forward take preact=False and hand them out for preact=True, as the networks "
            "of frskd_fast.models do, or choose FRSKDLoss or FitNetLoss."
        )


def frozen_teacher(
    teacher: nn.Module | str,
    name: str | None,
    backbone: nn.Module,
    heads: Literal["auxiliary", "projection"] | None = None,
    argument: str = "teacher",
) -> FrozenTeacher:
    """What `load_teacher` gives, frozen, without heads unless they are wanted; out of a file, where the `backbone` is.

    Errors call the teacher `argument` and its name `argument`_name.

    Raises:
        ValueError: when the teacher has parameters of the `backbone`.
    """
    if isinstance(teacher, FrozenTeacher):
        check_apart(teacher.network, backbone, (argument, "backbone"))
        return teacher
    network = loaded_teacher(teacher, name, None, heads, {}, (argument, f"{argument}_name"))
    if heads is None and isinstance(network, AuxiliaryNetwork | ProjectionHead):
        network = network.backbone
    check_apart(network, backbone, (argument, "backbone"))
    if isinstance(teacher, nn.Module):
        return FrozenTeacher(network)
    frozen = FrozenTeacher(network, str(teacher))  # its checksum is that of the file, whatever the backbone's dtype
    like(backbone, frozen)
    return frozen


def check_apart(teacher: nn.Module, backbone: nn.Module, names: tuple[str, str]) -> None:
    """Raise where the first network, which will be frozen, has parameters of the second; errors call them `names`."""
    learns = {id(parameter) for parameter in backbone.parameters()}
    if any(id(parameter) in learns for parameter in teacher.parameters()):
        raise ValueError(
            f"{names[0]} ({type(teacher).__name__}) and {names[1]} ({type(backbone).__name__}) have parameters in common, but "
            f"the {names[0]} is frozen and the {names[1]} learns; give two networks, such as copy.deepcopy({names[1]}) for the "
            f"{names[0]}."
        )


def check_same_classes(student: nn.Module, teacher: nn.Module, name: str = "teacher") -> None:
    """Raise where both networks say how many classes they score and the numbers differ; errors call the second `name`."""
    counts = [getattr(network, "num_classes", None) for network in (student, teacher)]
    if None not in counts and counts[0] != counts[1]:
        raise ValueError(
            f"{name} ({type(teacher).__name__}) scores {counts[1]} classes, but backbone ({type(student).__name__}) scores "
            f"{counts[0]} and the same classes were wanted; is it a network for another data set?"
        )


def check_same_levels(student: nn.Module, teacher: nn.Module, names: tuple[str, str] = ("backbone", "teacher")) -> None:
    """Raise unless both networks hand out as many feature maps; errors call them `names`."""
    counts = [len(channels_of(network)) for network in (student, teacher)]
    if counts[0] != counts[1]:
        raise ValueError(
            f"{names[1]} ({type(teacher).__name__}) has {counts[1]} feature maps, but {names[0]} ({type(student).__name__}) "
            f"has {counts[0]} and the same number was wanted; choose some with frskd_fast.models.adapt_backbone(network, "
            "levels=[...])."
        )


def check_rotated(images: Tensor, targets: Any) -> None:
    """Raise unless there are four rows of images for each row of targets."""
    labels = targets[0] if is_mix(targets) else targets
    if isinstance(labels, Tensor) and labels.dim() > 0 and images.shape[0] != 4 * labels.shape[0]:
        raise ValueError(
            f"images has {images.shape[0]} rows and targets {labels.shape[0]}, but the four rotations of each image were "
            "wanted: call task(frskd_fast.mixing.rotate4(images), targets)."
        )


def in_order(outputs: dict[str, Tensor], name: str) -> list[Tensor]:
    """The entries `name_1`, `name_2`, ... of a teacher's outputs, in whatever order these were kept."""
    found: list[Tensor] = []
    while f"{name}_{len(found) + 1}" in outputs:
        found.append(outputs[f"{name}_{len(found) + 1}"])
    return found


def upright(rows: Tensor) -> Tensor:
    """(4N, K) -> (N, K), the rows 4n; a copy, because FSDP takes a view among a module's outputs for a danger."""
    return rows[::4].clone()
