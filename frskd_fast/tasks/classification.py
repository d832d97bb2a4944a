"""Plain classification, with the calls and the dict of the distilling tasks: what they are compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from frskd_fast.ops import _checks, logits

from .base import Task, laid_out, logits_of, traceable_targets


class ClassificationTask(Task):
    """loss = CE(student): a network and the cross-entropy, without distillation.

    Args:
        backbone: the network, `backbone(images) -> (features, logits)` or `-> logits`. It is used, not copied.
        label_smoothing: s in [0, 1]; the label distribution is (1 - s) * target + s / K.
        ignore_index: class index whose rows do not count.
        channels_last: keep parameters and images in `torch.channels_last`, as `FRSKDTask` does.

    Attributes:
        backbone, label_smoothing, ignore_index, channels_last: as given.

    Calling `task(images, targets=None)` with images (N, C, H, W) and targets as `FRSKDTask` takes them returns in training
    mode a dict with `loss` (scalar, float32 or float64), `output` (logits (N, K)) and `ce_student` (the loss, detached). In
    evaluation mode, or without targets, the dict is `{"output": logits}`. `compile()`, `student()` and `get_eval_model()` are
    those of `FRSKDTask`.

    Raises:
        TypeError, ValueError: a sentence naming the argument, what came and what was wanted.

    Example:
        >>> import torch
        >>> from frskd_fast.models import wrn16x2
        >>> from frskd_fast.tasks import ClassificationTask
        >>> task = ClassificationTask(wrn16x2(num_classes=10), label_smoothing=0.1)
        >>> parts = task(torch.randn(4, 3, 16, 16), torch.arange(4))
        >>> list(parts)
        ['loss', 'output', 'ce_student']
        >>> parts["loss"].backward()

    Source: label smoothing is that of Szegedy et al., CVPR 2016, section 7.
    """

    def __init__(
        self,
        backbone: nn.Module,
        label_smoothing: float = 0.0,
        *,
        ignore_index: int = -100,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, nn.Module):
            raise TypeError(f"backbone is a {type(backbone).__name__}, but a torch.nn.Module was wanted.")
        self.backbone = backbone
        self.label_smoothing = _checks.unit_interval(label_smoothing, "label_smoothing")
        self.ignore_index = _checks.whole_number(ignore_index, "ignore_index")
        self.channels_last = bool(channels_last)
        if self.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor, targets: Any = None) -> dict[str, Tensor]:
        """Return the dict described above."""
        output = logits_of(self.backbone, laid_out(images, self.channels_last))
        if targets is None or not self.training:
            return {"output": output}
        targets = traceable_targets(targets, output, self.ignore_index, self.label_smoothing)
        loss, _, _ = logits.logit_losses(
            output, None, targets, 1.0, self.label_smoothing, self.ignore_index, "batchmean", True, "auto"
        )
        return {"loss": loss, "output": output, "ce_student": loss.detach()}

    def extra_repr(self) -> str:
        """The settings, shown by ``print(module)``."""
        return f"label_smoothing={self.label_smoothing}, channels_last={self.channels_last}"
