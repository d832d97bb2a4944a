"""Backbones and self-teachers: `model(x, preact=False) -> (features, logits)`, finest feature map first."""

from .resnet import ResNet, cifarresnet18, resnet18, resnet34, resnet50
from .self_teacher import BiFPN, BiFPNc
from .wide_resnet import WideResNet, wrn16x2

__all__ = [
    "BiFPN",
    "BiFPNc",
    "ResNet",
    "WideResNet",
    "cifarresnet18",
    "resnet18",
    "resnet34",
    "resnet50",
    "wrn16x2",
]
