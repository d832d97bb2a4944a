"""Attention transfer over pyramids of feature maps in Triton: raw functions."""

from .attention_backward import backward
from .attention_forward import attention_map, forward

__all__ = ["attention_map", "backward", "forward"]
