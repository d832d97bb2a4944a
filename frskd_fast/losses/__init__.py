"""Distillation losses as ``nn.Module``s, one file per method."""

from frskd_fast.losses.frskd import FRSKDLoss, FRSKDLossParts

__all__ = ["FRSKDLoss", "FRSKDLossParts"]
