"""SSKD's projection head on any classifier.

Xu et al., "Knowledge Distillation Meets Self-Supervision", ECCV 2020.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .last_linear import last_linear


class _ClassifierInput:
    """A forward pre-hook that keeps the input of its layer while `recording`. An object, so that copies have their own."""

    def __init__(self) -> None:
        self.recording = False
        self.value: Tensor | None = None

    def __call__(self, module: nn.Module, arguments: Any) -> None:
        if self.recording:
            self.value = arguments[0]


class ProjectionHead(nn.Module):
    """logits = backbone(images); features = the input of its last linear layer; projections = W2 relu(W1 features + b1) + b2.

    Args:
        backbone: any network that ends in a `torch.nn.Linear` and returns logits (N, K), or `(feature maps, logits)` as
            those of this library. It is used, not copied.
        classifier: name of that linear layer; None takes the backbone's `classifier_name`, else the one registered last.

    Attributes:
        backbone, proj_head: the parts; checkpoints hold them under these names, as the original's do.
        num_classes: number of logits, K.
        num_features: length of features and projections, D, the `in_features` of the linear layer.

    Calling `network(images, detach_features=False)` returns `(logits, projections, features)` of shapes (N, K), (N, D) and
    (N, D). With `detach_features=True` no gradient passes from projections and features to the backbone. A forward
    pre-hook of the linear layer reads the features. It is registered here: wrap the backbone first and compile afterwards.

    Raises:
        ValueError: when the linear layer is missing, or makes something else than the logits.
        TypeError: when the backbone returns no logits.

    Example:
        >>> import torch
        >>> from frskd_fast.models import wrn16x2
        >>> logits, projections, features = ProjectionHead(wrn16x2(num_classes=10))(torch.zeros(2, 3, 16, 16))
        >>> tuple(logits.shape), tuple(projections.shape), tuple(features.shape)
        ((2, 10), (2, 128), (2, 128))

    Source: the wrapper of SSKD's release. It takes the last child of the backbone, which has to be a linear layer.
    """

    def __init__(self, backbone: nn.Module, classifier: str | None = None) -> None:
        super().__init__()
        if not isinstance(backbone, nn.Module):
            raise TypeError(f"backbone is a {type(backbone).__name__}, but a torch.nn.Module was wanted.")
        self.classifier_name = f"backbone.{last_linear(backbone, classifier)}"
        self.backbone = backbone
        layer: Any = self.get_submodule(self.classifier_name)
        self.num_classes: int = layer.out_features
        self.num_features: int = layer.in_features
        like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        self.proj_head = nn.Sequential(
            nn.Linear(self.num_features, self.num_features, **like),
            nn.ReLU(),
            nn.Linear(self.num_features, self.num_features, **like),
        )
        self._input = _ClassifierInput()
        layer.register_forward_pre_hook(self._input)

    def forward(self, images: Tensor, detach_features: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        self._input.recording = True
        try:
            output = self.backbone(images)
            features = self._input.value
        finally:
            # Nothing is kept alive, and nothing is recorded when the backbone is called alone.
            self._input.recording, self._input.value = False, None
        logits = output if isinstance(output, Tensor) else output[1]
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise TypeError(
                f"backbone ({type(self.backbone).__name__}) returned a {type(output).__name__}, but logits (N, K) or (list of "
                "feature maps, logits) was wanted; wrap it with frskd_fast.models.adapt_backbone."
            )
        if features is None or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"{self.classifier_name} was taken for the layer that makes the logits, but "
                + ("it was not called" if features is None else f"there are {logits.shape[1]}, not {self.num_classes}")
                + "; name the right one: ProjectionHead(backbone, classifier=...)."
            )
        features = features.flatten(1)
        if detach_features:
            features = features.detach()
        return logits, self.proj_head(features), features

    def extra_repr(self) -> str:
        """What was found, shown by ``print(module)``."""
        return (
            f"classifier_name={self.classifier_name}, num_classes={self.num_classes}, num_features={self.num_features}"
        )
