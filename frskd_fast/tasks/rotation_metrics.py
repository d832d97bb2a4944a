"""Accuracies of networks and heads that learn from the four rotations of each image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from frskd_fast.mixing import joint_labels


@torch.no_grad()
def rotation_accuracies(logits: Tensor, head_logits: Sequence[Tensor], targets: Tensor) -> dict[str, Tensor]:
    """accuracy = mean over the 4N views of [argmax = label], of the classifier and of each head l = 1, ..., L.

    | name | rows | what is compared |
    | --- | --- | --- |
    | `rotation_class_accuracy` | 4N views | the classifier's class with the image's |
    | `rotation_class_accuracy_l` | 4N views | the class by head l, argmax_c of sum_r logits[4c + r], with the image's |
    | `joint_accuracy_l` | 4N views | class and rotation together, argmax of head l's 4K logits with 4 * target + r |

    Args:
        logits: (4N, K), the classifier's, row 4n + r for image n turned r times, see `frskd_fast.mixing.rotate4`.
        head_logits: L tensors (4N, 4K).
        targets: class indices (N,).

    Returns:
        Scalars on the device, float32, by those names, for `Task.evaluate` to return.

    Example:
        >>> logits = torch.eye(2).repeat_interleave(4, 0)  # right about all views of both images
        >>> parts = rotation_accuracies(logits, [torch.eye(8)[[0, 1, 2, 3, 4, 4, 4, 4]]], torch.tensor([0, 1]))
        >>> {name: value.item() for name, value in parts.items()}
        {'rotation_class_accuracy': 1.0, 'rotation_class_accuracy_1': 1.0, 'joint_accuracy_1': 0.625}

    Source: Yang et al., IJCAI 2021 (arXiv 2107.13715), and its released code; docs/methods/hsakd.md has its names.
    """
    classes = targets.repeat_interleave(4)
    joint = joint_labels(targets)
    accuracies = {"rotation_class_accuracy": _fraction(logits, classes)}
    for number, head in enumerate(head_logits, 1):
        accuracies[f"rotation_class_accuracy_{number}"] = _fraction(head.unflatten(1, (-1, 4)).sum(2), classes)
        accuracies[f"joint_accuracy_{number}"] = _fraction(head, joint)
    return accuracies


def _fraction(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) == labels).float().mean()
