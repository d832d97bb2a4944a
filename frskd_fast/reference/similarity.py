"""Cosines between two sets of vectors, as a formula."""

from __future__ import annotations

import torch
from torch import Tensor

from frskd_fast.reference.dtypes import accumulate_dtype


def pairwise_cosine(x: Tensor, y: Tensor, eps: float) -> Tensor:
    """<x_i, y_j> / (max(||x_i||, eps) max(||y_j||, eps)); (M, D), (N, D) -> (M, N)."""
    dtype = accumulate_dtype(x.dtype)

    def normalised(vectors: Tensor) -> Tensor:
        wide = vectors.to(dtype)
        lengths: Tensor = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
        return wide / lengths.clamp_min(eps)

    cosines: Tensor = normalised(x) @ normalised(y).t()
    return cosines
