"""Backbones by name: networks of this library, of timm, or any importable function or class."""

from __future__ import annotations

from typing import Any

from torch import nn

from frskd_fast import models

from .class_paths import imported

NAMES = ("cifarresnet18", "resnet18", "resnet34", "resnet50", "wrn16x2")


def build_backbone(name: str, num_classes: int, **arguments: Any) -> nn.Module:
    """backbone = the network called `name`, with `num_classes` logits: `backbone(images) -> (features, logits)`.

    Args:
        name: one of "cifarresnet18", "resnet18", "resnet34", "resnet50", "wrn16x2"; or "timm:NAME" for a network of timm
            (installed by the extra `timm`); or the import path of a function or class, "package.module.name", which is
            called with `num_classes=num_classes`.
        num_classes: number of logits K.
        arguments: further ones of the network.

    Returns:
        A module `(images) -> (features, logits)`. What an import path gives is adapted where it has no `channels`.

    Raises:
        ValueError: when no such network is known, naming those that are.
        ImportError: when the import path or timm cannot be imported.

    Example:
        >>> build_backbone("wrn16x2", 10).channels
        [32, 64, 128]
    """
    if name in NAMES:
        backbone: nn.Module = getattr(models, name)(num_classes=num_classes, **arguments)
        return backbone
    if name.startswith("timm:"):
        return models.TimmBackbone.create(name.removeprefix("timm:"), num_classes=num_classes, **arguments)
    if "." in name:
        return _adapted(imported(name)(num_classes=num_classes, **arguments))
    raise ValueError(
        f"backbone is {name!r}, but one of {', '.join(NAMES)} was wanted, or 'timm:NAME' for a network of timm, or an "
        "import path such as 'mypackage.networks.MyNet'."
    )


def _adapted(network: Any) -> nn.Module:
    if not isinstance(network, nn.Module):
        raise TypeError(f"backbone gave a {type(network).__name__}, but a torch.nn.Module was wanted.")
    return network if hasattr(network, "channels") else models.adapt_backbone(network)
