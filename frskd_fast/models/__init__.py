"""Backbones and self-teachers: `model(x, preact=False) -> (features, logits)`, finest feature map first.

`create_model` makes one by its name; `adapt_backbone` turns other networks into backbones.
"""

from .adapters import (
    AdaptedBackbone,
    ExtractorBackbone,
    HookedBackbone,
    OutputBackbone,
    TimmBackbone,
    adapt_backbone,
)
from .projection import ProjectionHead
from .registry import create_model, list_models, register_model
from .resnet import ResNet, cifarresnet18, resnet18, resnet34, resnet50
from .self_teacher import BiFPN, BiFPNc
from .wide_resnet import WideResNet, wrn16x2

__all__ = [
    "AdaptedBackbone",
    "BiFPN",
    "BiFPNc",
    "ExtractorBackbone",
    "HookedBackbone",
    "OutputBackbone",
    "ProjectionHead",
    "ResNet",
    "TimmBackbone",
    "WideResNet",
    "adapt_backbone",
    "cifarresnet18",
    "create_model",
    "list_models",
    "register_model",
    "resnet18",
    "resnet34",
    "resnet50",
    "wrn16x2",
]
