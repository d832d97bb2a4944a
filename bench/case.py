"""What a case of the benchmark is, and what the command line leaves of every suite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.names import FLOAT_BYTES, LAYOUTS

__all__ = ["DTYPES", "FLOAT_BYTES", "LAYOUTS", "Case", "Operands", "Program", "Selection"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Upstream gradient of the loss. float16 is trained with a scaled loss (GradScaler): this lifts the gradients above its
# subnormal numbers and keeps FRSKD's beta = 100 times it below its largest number.
LOSS_SCALE = {"fp32": 1.0, "bf16": 1.0, "fp16": 256.0}

Operands = dict[str, Any]  # argument name -> Tensor, sequence of Tensor, or Module


@dataclass(frozen=True)
class Selection:
    """What the command line leaves of every suite."""

    device: str = "cpu"
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")
    layouts: tuple[str, ...] = LAYOUTS
    batch: int | None = None
    input_kind: str = "features"
    quick: bool = False
    named: bool = False  # the command line names suites: what takes minutes to compile is then wanted
    dtypes_named: bool = False
    full: bool = False  # also the settings that take minutes

    def dtypes_of_networks(self) -> tuple[str, ...]:
        """float32 and, as autocast, bfloat16, which takes minutes on most CPUs and waits until it is asked for."""
        found = tuple(dtype for dtype in self.dtypes if dtype != "fp16")
        return found if self.full or self.dtypes_named or self.device == "cuda" else found[:1]

    def compiles_network(self, dtype: str, layout: str) -> bool:
        """A minute or more: without `full` only where the suite was named, in float32 and the last layout."""
        once = self.named and not self.quick and dtype == "fp32" and layout == self.layouts[-1]
        return self.full or once


@dataclass(frozen=True)
class Case:
    """One row group of the table: an operation on one shape, dtype, layout and direction.

    `original` is the formula in the order of operations of the methods' published code; it is the eager baseline, what
    torch.compile gets, and, in float64, the truth. `ours(name)` gives a function with the same arguments. Both return
    the loss, a scalar, or a tensor that gets a fixed random upstream gradient.
    """

    suite: str
    shape: str
    dtype: str
    layout: str
    backward: bool
    bytes_moved: int  # what must be read and written at least, each pass once; 0: not counted
    operands: Callable[[], Operands]  # float32, NCHW, on the CPU
    tiny: Callable[[], Operands]
    differentiated: tuple[str, ...]
    original: Callable[..., Tensor]
    ours: Callable[[str], Callable[..., Tensor]]
    weight: float = 1.0  # of this term in a training objective; multiplies the loss scale of float16
    # operands that are parameters: as under autocast, float32 beside half-precision maps (modules always are)
    parameters: tuple[str, ...] = ()
    # a network of many layers: judged by correctness.CHAIN_SLACK, see there
    chain: bool = False
    # Where compiling takes minutes: whether this case does it. A network's tiny call is not compiled for its host time.
    compiles: bool = True
    # names as `frskd_fast.last_impl()` has them, where it is not the suite's
    operations: tuple[str, ...] = ()
    # Rows besides the implementations, which `ours` knows, too. One that begins like an implementation of ours is run
    # where that one is; any other computes something else, so there is nothing to compare it with.
    more: tuple[str, ...] = ()
    images: int = 0  # of a training step, for images per second

    @property
    def upstream(self) -> float:
        """The gradient of the scaled objective for the loss that the case computes."""
        return LOSS_SCALE[self.dtype] * (self.weight if self.dtype == "fp16" else 1.0)

    @property
    def direction(self) -> str:
        """How the rows call it."""
        return "forward+backward" if self.backward else "forward"

    @property
    def name(self) -> str:
        """Unique over all suites."""
        return f"{self.suite} {self.shape} {self.direction} {self.dtype} {self.layout}"


@dataclass(frozen=True)
class Program:
    """A case that is no function of tensors and times itself; there is nothing to compare its result with."""

    suite: str
    shape: str
    run: Callable[[Any], dict[str, list[float]]]  # measure.Settings -> what was timed: milliseconds of every run
    images: int = 0  # of a run, for images per second

    @property
    def name(self) -> str:
        """Unique over all suites."""
        return f"{self.suite} {self.shape}"
