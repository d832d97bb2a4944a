"""Backbones and self-teachers: `model(x, preact=False) -> (features, logits)`, finest feature map first.

`create_model` makes one by its name; `adapt_backbone` turns other networks into backbones; `with_auxiliary_heads` gives
them the auxiliary classifiers of HSAKD. Segmentation networks, `EfficientDetSeg` and `SegmentationNetwork`, return
`(student_feats, teacher_feats, student_maps, teacher_maps)`.
"""

from .adapters import (
    AdaptedBackbone,
    ExtractorBackbone,
    HookedBackbone,
    OutputBackbone,
    TimmBackbone,
    adapt_backbone,
)
from .auxiliary import AuxiliaryClassifier, AuxiliaryNetwork, remaining_stages, with_auxiliary_heads
from .checkpoints import CheckpointError, load_backbone_weights
from .cifar_resnet import (
    CIFARResNet,
    cifar_resnet50,
    resnet8,
    resnet8x4,
    resnet14,
    resnet20,
    resnet32,
    resnet32x4,
    resnet44,
    resnet56,
    resnet110,
)
from .cifar_wide_resnet import CIFARWideResNet, wrn_16_1, wrn_16_2, wrn_40_1, wrn_40_2
from .efficientdet_seg import EfficientDetSeg, efficientdet_seg_d0, efficientdet_seg_d1, efficientdet_seg_d2
from .ffl import FFLResNet, FusionModule
from .mobilenet import MobileNetV2, mobilenetv2, mobilenetv2_aux
from .projection import ProjectionHead
from .registry import create_model, list_models, register_model
from .resnet import ResNet, cifarresnet18, resnet18, resnet34, resnet50
from .segmentation import SegmentationNetwork
from .self_teacher import BiFPN, BiFPNc
from .shufflenet import ShuffleNetV1, ShuffleNetV2, shufflenetv1, shufflenetv2
from .small_segmentation import resnet10_seg
from .tails import tail
from .teachers import load_teacher
from .vgg import VGG, vgg8, vgg11, vgg13, vgg16, vgg19
from .wide_resnet import WideResNet, wrn16x2

__all__ = [
    "VGG",
    "AdaptedBackbone",
    "AuxiliaryClassifier",
    "AuxiliaryNetwork",
    "BiFPN",
    "BiFPNc",
    "CIFARResNet",
    "CIFARWideResNet",
    "CheckpointError",
    "EfficientDetSeg",
    "ExtractorBackbone",
    "FFLResNet",
    "FusionModule",
    "HookedBackbone",
    "MobileNetV2",
    "OutputBackbone",
    "ProjectionHead",
    "ResNet",
    "SegmentationNetwork",
    "ShuffleNetV1",
    "ShuffleNetV2",
    "TimmBackbone",
    "WideResNet",
    "adapt_backbone",
    "cifar_resnet50",
    "cifarresnet18",
    "create_model",
    "efficientdet_seg_d0",
    "efficientdet_seg_d1",
    "efficientdet_seg_d2",
    "list_models",
    "load_backbone_weights",
    "load_teacher",
    "mobilenetv2",
    "mobilenetv2_aux",
    "register_model",
    "remaining_stages",
    "resnet8",
    "resnet8x4",
    "resnet10_seg",
    "resnet14",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet32x4",
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet56",
    "resnet110",
    "shufflenetv1",
    "shufflenetv2",
    "tail",
    "vgg8",
    "vgg11",
    "vgg13",
    "vgg16",
    "vgg19",
    "with_auxiliary_heads",
    "wrn16x2",
    "wrn_16_1",
    "wrn_16_2",
    "wrn_40_1",
    "wrn_40_2",
]
