"""Draws hostile arguments for the compiled entry points."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def shrunk(tensor: Tensor) -> Tensor:
    """A copy with half of its storage given back, as sharding frees what it does not need for the moment."""
    copy = tensor.clone()
    storage = copy.untyped_storage()
    storage.resize_(storage.nbytes() // 2)
    return copy


class Hostile:
    """Draws arguments that are right most of the time and wrong in one or two ways otherwise."""

    def __init__(self, seed: int | str) -> None:
        self.random = random.Random(seed)
        self.right = 0.93  # how often one argument is right

    def often(self, value: Any, *others: Any) -> Any:
        return value if self.random.random() < self.right else self.random.choice(others)

    def size(self) -> int:
        return self.random.choice([0, 1, 1, 2, 3, 5, 8, 9, 17, 33])

    def layout(self, tensor: Tensor) -> Tensor:
        """The same shape by other strides: permuted, sliced out of larger storage, or expanded."""
        choice = self.random.randrange(5)
        if choice == 1 and tensor.dim() > 1:
            order = list(range(tensor.dim()))
            self.random.shuffle(order)
            inverse = [order.index(axis) for axis in range(len(order))]
            return tensor.permute(order).contiguous().permute(inverse)
        if choice == 2 and tensor.numel():
            storage = torch.zeros([2 * size + 1 for size in tensor.shape], dtype=tensor.dtype)
            return storage[tuple(slice(1, None, 2) for _ in tensor.shape)].copy_(tensor)
        if choice == 3 and tensor.dim() and tensor.shape[0]:
            return tensor[:1].expand(tensor.shape)
        if choice == 4 and tensor.dim() == 4 and tensor.numel():
            return tensor.contiguous(memory_format=torch.channels_last)
        return tensor

    def tensor(self, shape: list[int], dtype: torch.dtype) -> Tensor:
        shape = [self.often(size, size + 1, max(size - 1, 0)) for size in shape]
        shape = self.often(shape, shape[:-1], [*shape, 2])
        dtype = self.often(dtype, *FLOATING, torch.int64, torch.bool)
        tensor = torch.randn(shape).mul(self.often(1.0, 1e30)).to(dtype)
        return self.often(self.layout(tensor), tensor.to("meta"), shrunk(tensor))

    def working(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Numbers to be written, or those of a pass before."""
        sizes = [*shape[:-1], *(self.often(size, size + 1, max(size - 1, 0), 0) for size in shape[-1:])]
        dtype = self.often(dtype, torch.float32, torch.float64, torch.bfloat16)
        tensor = torch.full(self.often(sizes, [*sizes, 1]), float("nan"), dtype=dtype)
        return self.often(tensor, torch.stack([tensor, tensor], -1)[..., 0], shrunk(tensor))

    def number(self, value: float) -> float:
        return self.often(value, float("nan"), float("inf"), -1.0, 0.0)
