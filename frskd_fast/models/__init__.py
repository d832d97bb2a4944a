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
from .mobilenet import MobileNetV2, mobilenetv2
from .projection import ProjectionHead
from .registry import create_model, list_models, register_model
from .resnet import ResNet, cifarresnet18, resnet18, resnet34, resnet50
from .self_teacher import BiFPN, BiFPNc
from .shufflenet import ShuffleNetV1, ShuffleNetV2, shufflenetv1, shufflenetv2
from .wide_resnet import WideResNet, wrn16x2

__all__ = [
    "AdaptedBackbone",
    "BiFPN",
    "BiFPNc",
    "ExtractorBackbone",
    "HookedBackbone",
    "MobileNetV2",
    "OutputBackbone",
    "ProjectionHead",
    "ResNet",
    "ShuffleNetV1",
    "ShuffleNetV2",
    "TimmBackbone",
    "WideResNet",
    "adapt_backbone",
    "cifarresnet18",
    "create_model",
    "list_models",
    "mobilenetv2",
    "register_model",
    "resnet18",
    "resnet34",
    "resnet50",
    "shufflenetv1",
    "shufflenetv2",
    "wrn16x2",
]
