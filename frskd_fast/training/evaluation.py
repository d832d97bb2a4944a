"""What the trainer measures of a task's output, by what the task predicts: a class for each image, or for each pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from frskd_fast.tasks import Task


class Evaluation(nn.Module):
    """Metrics of validation and test, and what is measured of the output in training. Sums stay on the device.

    Attributes:
        score: name of the metric by which epochs are compared; larger is better.
        title: the score in words.
        in_training: name of what `correct` measures.
    """

    score: str
    title: str
    in_training: str

    def name_classes(self, names: Sequence[str] | None) -> None:
        """Take the names of the data's classes, where they have some, for metrics of a class each."""

    def correct(self, output: Tensor, targets: Any) -> Tensor:
        """The share that is right in a batch of the training, a scalar on the device."""
        raise NotImplementedError

    def update(self, output: Tensor, targets: Tensor) -> Tensor:
        """Add a batch; returns its cross-entropy, a mean over images."""
        raise NotImplementedError

    def prediction(self, output: Tensor, size: Sequence[int]) -> dict[str, Tensor]:
        """What the output says of each image, whose targets have this size: what `frskd-fast predict` writes down."""
        raise NotImplementedError

    def compute(self) -> dict[str, Tensor]:
        """The metrics by name, over all processes."""
        raise NotImplementedError

    def reset(self) -> None:
        """Begin anew."""
        raise NotImplementedError


class EvaluationOfClasses(Evaluation):
    """Accuracy, top-5 accuracy and calibration error of logits (N, K) against class indices (N,)."""

    score, title, in_training = "accuracy", "accuracy", "accuracy"

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(num_classes, average="micro", validate_args=False),
                "accuracy_top5": MulticlassAccuracy(
                    num_classes, top_k=min(5, num_classes), average="micro", validate_args=False
                ),
                "calibration_error": MulticlassCalibrationError(num_classes, n_bins=15, validate_args=False),
            },
            compute_groups=False,
        )

    def correct(self, output: Tensor, targets: Any) -> Tensor:
        return fraction_correct(output, targets)

    def update(self, output: Tensor, targets: Tensor) -> Tensor:
        self.metrics.update(output, targets)
        return nn.functional.cross_entropy(output, targets)

    def prediction(self, output: Tensor, size: Sequence[int]) -> dict[str, Tensor]:
        probability, classes = output.softmax(1).max(1)
        return {"class": classes, "probability": probability}

    def compute(self) -> dict[str, Tensor]:
        return dict(self.metrics.compute())

    def reset(self) -> None:
        self.metrics.reset()


class EvaluationOfMaps(Evaluation):
    """IoU_c = diag / (row + column - diag) of one confusion matrix [target, prediction] over all pixels, and their mean.

    Maps (N, K, h, w) are brought to the size of the targets (N, H, W), bilinearly, one image at a time, so that the maps of
    a batch are never in memory at that size. Pixels whose target is outside 0..K-1 do not count. A class that is neither in
    the targets nor predicted has no IoU (nan) and is left out of `miou`; one that is only predicted has an IoU of 0.

    Args:
        num_classes: K.

    Example:
        >>> evaluation = EvaluationOfMaps(3)
        >>> loss = evaluation.update(torch.eye(3)[[0, 1, 1]].T.reshape(1, 3, 1, 3), torch.tensor([[[0, 1, 255]]]))
        >>> {name: value.item() for name, value in evaluation.compute().items()}
        {'miou': 1.0, 'pixel_accuracy': 1.0, 'iou_0': 1.0, 'iou_1': 1.0, 'iou_2': nan}

    Source: the evaluation of FRSKD's released segmentation code.
    """

    score, title, in_training = "miou", "mIoU", "pixel_accuracy"

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.names = [str(number) for number in range(num_classes)]
        self.confusion = Confusion(num_classes)

    def name_classes(self, names: Sequence[str] | None) -> None:
        words = ["_".join(str(name).split()) for name in names or ()]
        if len(set(words)) == len(words) == self.num_classes:
            self.names = words

    def correct(self, output: Tensor, targets: Any) -> Tensor:
        return fraction_of_pixels(output, targets)

    def update(self, output: Tensor, targets: Tensor) -> Tensor:
        counted = (targets >= 0) & (targets < self.num_classes)
        losses = []
        for maps, labels, valid in zip(output.split(1), targets.split(1), counted.split(1), strict=True):
            maps = resized(maps, labels.shape[-2:])
            self.confusion.update(maps.argmax(1), labels, valid)
            total = nn.functional.cross_entropy(
                maps, torch.where(valid, labels, -100), ignore_index=-100, reduction="sum"
            )
            losses.append(total / valid.sum().clamp(min=1))
        return torch.stack(losses).mean()

    def prediction(self, output: Tensor, size: Sequence[int]) -> dict[str, Tensor]:
        return {"mask": torch.cat([resized(maps, size).argmax(1) for maps in output.split(1)])}

    def compute(self) -> dict[str, Tensor]:
        return measures_of(self.confusion.compute().double(), self.names)

    def reset(self) -> None:
        self.confusion.reset()


class Confusion(Metric):
    """counts[t, p] = number of valid pixels of class t that are predicted as class p, exactly, over all processes.

    In place of torchmetrics' matrix, whose `bincount` waits for the device, and which compares every pixel with every pair of
    classes where deterministic algorithms are asked for: 48 GB for 256 x 256 pixels of 150 classes.

    Args:
        num_classes: K.

    Example:
        >>> confusion = Confusion(2)
        >>> confusion.update(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 7]), torch.tensor([True, True, False]))
        >>> confusion.compute().tolist()
        [[1, 1], [0, 0]]
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        # A row more, for the pixels that do not count: to leave them out would wait for the device.
        self.add_state("counts", torch.zeros(num_classes + 1, num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, targets: Tensor, valid: Tensor) -> None:
        """Add pixels, in tensors of one shape: classes (int64) and whether they count."""
        cells = (torch.where(valid, targets, self.num_classes) * self.num_classes + predictions).flatten()
        self.counts.view(-1).index_add_(0, cells, torch.ones_like(cells))

    def compute(self) -> Tensor:
        """The matrix [target, prediction] (K, K), int64."""
        return self.counts[:-1]


def evaluation_for(task: Task, num_classes: int) -> Evaluation:
    """What is measured of what the task predicts."""
    known = {"classes": EvaluationOfClasses, "maps": EvaluationOfMaps}
    if task.predicts not in known:
        raise ValueError(f"{type(task).__name__}.predicts is {task.predicts!r}, but 'classes' or 'maps' was wanted.")
    return known[task.predicts](num_classes)


def measures_of(confusion: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """`miou`, `pixel_accuracy` and `iou_NAME` of a confusion matrix [target, prediction] (K, K), floating.

    Example:
        >>> {name: value.item() for name, value in measures_of(torch.tensor([[3.0, 1.0], [0.0, 0.0]]), ["a", "b"]).items()}
        {'miou': 0.375, 'pixel_accuracy': 0.75, 'iou_a': 0.75, 'iou_b': 0.0}
    """
    right = confusion.diagonal()
    iou = right / (confusion.sum(0) + confusion.sum(1) - right)
    return {
        "miou": iou.nanmean(),
        "pixel_accuracy": right.sum() / confusion.sum(),
        **{f"iou_{name}": value for name, value in zip(names, iou.unbind(), strict=True)},
    }


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (N, K, h, w) at size (H, W), bilinearly with align_corners=False."""
    return nn.functional.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def fraction_of_pixels(maps: Tensor, targets: Tensor) -> Tensor:
    """Share of the pixels of maps (N, K, h, w) whose largest class is the target at their centre; 0 where none counts.

    At the resolution of the maps: to bring all classes of a training batch to the targets' size costs as much as a loss.

    Example:
        >>> maps = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
        >>> fraction_of_pixels(maps, torch.tensor([[[0, 0, 255, 255], [0, 0, 255, 255]]])).item()
        1.0
    """
    (height, width), (rows, columns) = maps.shape[-2:], targets.shape[-2:]
    targets = targets[:, _centres(height, rows, targets.device)][:, :, _centres(width, columns, targets.device)]
    counted = (targets >= 0) & (targets < maps.shape[1])
    return ((maps.argmax(1) == targets) & counted).sum() / counted.sum().clamp(min=1)


def _centres(count: int, length: int, device: torch.device) -> Tensor:
    """Of `length` pixels the one at the middle of each of `count` equal parts."""
    return ((2 * torch.arange(count, device=device) + 1) * length).div(2 * count, rounding_mode="floor")


def fraction_correct(logits: Tensor, targets: Any) -> Tensor:
    """Mean over the images of [argmax_k logits = target], for mixup and cutmix of both labels, mixed by lam.

    Example:
        >>> fraction_correct(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 1])).item()
        0.5
    """
    if isinstance(targets, tuple | list):
        *labels, mix = targets
        first, second = (fraction_correct(logits, one) for one in labels)
        mixed: Tensor = mix * first + (1 - mix) * second
        return mixed
    correct: Tensor = logits.argmax(1) == targets
    return correct.float().mean()
