"""What all tasks share: compilation with a dynamic batch, the student to take away, the layout of images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from frskd_fast.losses._targets import is_mix
from frskd_fast.ops import _checks


class Task(nn.Module):
    """Networks and loss of one method in one module: `task(images, targets)` returns a dict with the loss.

    A subclass sets `backbone` and `channels_last` and defines `forward(images, targets=None)`.
    """

    backbone: nn.Module
    channels_last: bool

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile this module's calls: one graph for forward, loss and backward, and one for every batch size.

        `fullgraph=True` is the default here, so that a graph break is an error, and only the batch dimension of images and
        targets is dynamic (a batch of a single image, and each of training and evaluation mode, has a graph of its own).
        Inductor's CPU code generator adds one condition of its own: where the batch decides whether a sum has more than
        4096 terms, which takes tiny batches of tiny maps, it compiles once more.
        With `(targets_a, targets_b, lam)` the mixing weight is an input of the graph, not a constant. Register hooks and
        build adapters before; copies and pickles of the task are not compiled.

        Args:
            args, kwargs: as for `torch.compile`.

        Example:
            >>> from frskd_fast.models import wrn16x2
            >>> from frskd_fast.tasks import FRSKDTask
            >>> task = FRSKDTask(wrn16x2(num_classes=10))
            >>> task.compile()  # the first call will compile
        """
        kwargs.setdefault("fullgraph", True)
        super().compile(*args, **kwargs)
        compiled = self._compiled_call_impl
        assert compiled is not None
        self._compiled_call_impl = functools.partial(self._call_with_dynamic_batch, compiled)

    def _call_with_dynamic_batch(
        self, compiled: Callable[..., dict[str, Tensor]], images: Tensor, targets: Any = None
    ) -> dict[str, Tensor]:
        """Call the compiled task; the batch dimension is marked dynamic, other sizes stay constants of the graph."""
        if not self.training:
            targets = None  # unused there, and one graph will do
        if is_mix(targets):
            first, second, mix = targets
            if not isinstance(mix, Tensor):
                # Written on the device by a kernel: a copy from the host would wait for the device.
                mix = torch.full((), _checks.unit_interval(mix, "targets[2] (lam)"), device=images.device)
            targets = (first, second, mix)
        for tensor in (images, *(targets if isinstance(targets, tuple) else (targets,))):
            if isinstance(tensor, Tensor) and tensor.dim() > 0:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(images, targets)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimiser is built with: groups of the parameters that train, with settings of their own if need be."""
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad]}]

    def start_epoch(self, epoch: int, epochs: int | None) -> None:
        """Told before the first step of `epoch`, counted from 0, of `epochs` (None: not known); for weights that ramp up."""

    def student(self) -> Student:
        """The student alone, `student(images) -> logits`; it shares the task's modules.

        Its `.eval()` reaches the backbone of the task: call `task.train()` before training on, or `copy.deepcopy` it.

        Example:
            >>> from frskd_fast.models import wrn16x2
            >>> from frskd_fast.tasks import FRSKDTask
            >>> student = FRSKDTask(wrn16x2(num_classes=10)).student().eval()
            >>> student(torch.zeros(2, 3, 16, 16)).shape
            torch.Size([2, 10])
        """
        return Student(self.backbone, self.channels_last)

    def get_eval_model(self) -> Student:
        """`student()` under the name that timm's training tasks give it."""
        return self.student()


class Student(nn.Module):
    """logits = backbone(images)[1]: what is left of a task at test time.

    Args:
        backbone: `backbone(images) -> (features, logits)`, or `-> logits`; checkpoints hold it under `backbone.`, as the
            task's do.
        channels_last: whether to bring images to `torch.channels_last`.

    Calling `student(images)` with images (N, C, H, W) returns logits (N, K).

    Example:
        >>> from frskd_fast.models import wrn16x2
        >>> Student(wrn16x2(num_classes=10)).eval()(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 10])
    """

    def __init__(self, backbone: nn.Module, channels_last: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.channels_last = channels_last
        self.training = backbone.training  # not train(), which would wake frozen parts

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return logits_of(self.backbone, laid_out(images, self.channels_last))


def laid_out(images: Tensor, channels_last: bool) -> Tensor:
    """`images`, in `torch.channels_last` where that is wanted."""
    if channels_last and isinstance(images, Tensor) and images.dim() == 4:
        return images.contiguous(memory_format=torch.channels_last)
    return images


def features_and_logits(backbone: nn.Module, images: Tensor, preact: bool = False) -> tuple[list[Tensor], Tensor]:
    """The backbone's feature maps, before their last ReLU where `preact` says so, and its logits."""
    output = backbone(images, preact=True) if preact else backbone(images)
    if (
        isinstance(output, tuple | list)
        and len(output) == 2
        and isinstance(output[0], tuple | list)
        and isinstance(output[1], Tensor)
    ):
        return list(output[0]), output[1]
    raise TypeError(
        f"backbone ({type(backbone).__name__}) returned a {type(output).__name__}, but (list of feature maps, logits) was "
        "wanted; wrap it with frskd_fast.models.adapt_backbone."
    )


def logits_of(backbone: nn.Module, images: Tensor) -> Tensor:
    """The backbone's logits, whether or not feature maps come with them."""
    output = backbone(images)
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple | list) and len(output) == 2 and isinstance(output[1], Tensor):
        return output[1]
    raise TypeError(
        f"backbone ({type(backbone).__name__}) returned a {type(output).__name__}, but logits or (list of feature maps, "
        "logits) was wanted; wrap it with frskd_fast.models.adapt_backbone."
    )


def one_dtype(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in the widest of their dtypes: under autocast a LayerNorm leaves float32 among half-precision maps."""
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]
