"""A linear classifier on frozen features: what a network has learnt that helps with other data."""

from __future__ import annotations

from typing import Self

from torch import nn

from frskd_fast.models.last_linear import last_linear

from .classification import ClassificationTask


class LinearProbeTask(ClassificationTask):
    """loss = CE(W f(x) + b), where f, all of the network before its last linear layer, stays as it is.

    Whatever `train()` is called on, the network stays in evaluation mode, so that its BatchNorms keep their statistics; the
    last linear layer is all that requires gradients. Load weights into the network first (`model.weights` of a recipe).

    Args:
        backbone: the trained network, `backbone(images) -> (features, logits)` or `-> logits`. It is used, not copied.
        classifier: name of its last linear layer; None takes its `classifier_name`, else the one registered last.
        label_smoothing, ignore_index, channels_last: as `ClassificationTask` takes them; so are the call and its dict.

    Raises:
        TypeError, ValueError: a sentence naming the argument, what came and what was wanted.

    Example:
        >>> from frskd_fast.models import wrn16x2
        >>> task = LinearProbeTask(wrn16x2(num_classes=10)).train()
        >>> [name for name, parameter in task.named_parameters() if parameter.requires_grad], task.backbone.training
        (['backbone.fc.weight', 'backbone.fc.bias'], False)

    Source: Yang et al., IJCAI 2021 (arXiv 2107.13715), and its released code.
    """

    def __init__(
        self,
        backbone: nn.Module,
        classifier: str | None = None,
        label_smoothing: float = 0.0,
        *,
        ignore_index: int = -100,
        channels_last: bool = True,
    ) -> None:
        super().__init__(backbone, label_smoothing, ignore_index=ignore_index, channels_last=channels_last)
        name = last_linear(backbone, classifier)
        backbone.requires_grad_(False)
        backbone.get_submodule(name).requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """`mode` for the task, evaluation mode for its network."""
        super().train(mode)
        self.backbone.eval()
        return self
