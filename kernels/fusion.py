"""Weighted fusion of feature maps (one node of a BiFPN) in Triton, with each input's BatchNorm folded in: raw functions."""

from .fusion_backward import backward
from .fusion_forward import forward
from .fusion_statistics import batch_statistics
from .fusion_sums import backward_sums

__all__ = ["backward", "backward_sums", "batch_statistics", "forward"]
