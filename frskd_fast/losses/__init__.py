"""Distillation losses as ``nn.Module``s, one file per method."""

from frskd_fast.losses.adain import AdaINLoss, AdaINLossParts
from frskd_fast.losses.collaborative import CollaborativeTeachingLoss, CollaborativeTeachingLossParts, CTKDLoss
from frskd_fast.losses.ffl import FFLLoss, FFLLossParts
from frskd_fast.losses.frskd import FRSKDLoss, FRSKDLossParts
from frskd_fast.losses.hints import FitNetLoss, OverhaulLoss
from frskd_fast.losses.hsakd import (
    HSAKDLoss,
    HSAKDLossParts,
    HSAKDOnlineLoss,
    HSAKDOnlineLossParts,
    HSAKDTeacherLoss,
    HSAKDTeacherLossParts,
)
from frskd_fast.losses.kd import KDLoss, KDLossParts
from frskd_fast.losses.segmentation import SegmentationLoss, SegmentationLossParts
from frskd_fast.losses.sla import SLALoss, SLALossParts
from frskd_fast.losses.sskd import SSKDHeadLoss, SSKDHeadLossParts, SSKDLoss, SSKDLossParts

__all__ = [
    "AdaINLoss",
    "AdaINLossParts",
    "CTKDLoss",
    "CollaborativeTeachingLoss",
    "CollaborativeTeachingLossParts",
    "FFLLoss",
    "FFLLossParts",
    "FRSKDLoss",
    "FRSKDLossParts",
    "FitNetLoss",
    "HSAKDLoss",
    "HSAKDLossParts",
    "HSAKDOnlineLoss",
    "HSAKDOnlineLossParts",
    "HSAKDTeacherLoss",
    "HSAKDTeacherLossParts",
    "KDLoss",
    "KDLossParts",
    "OverhaulLoss",
    "SLALoss",
    "SLALossParts",
    "SSKDHeadLoss",
    "SSKDHeadLossParts",
    "SSKDLoss",
    "SSKDLossParts",
    "SegmentationLoss",
    "SegmentationLossParts",
]
