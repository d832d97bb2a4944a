"""What the benchmark feeds to the losses: features and logits of a network on digit images, or random ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# (channels, side) of cifarresnet18's feature maps on 32 x 32 images; the self-teacher BiFPNc is TEACHER_WIDTH as wide.
PYRAMID = ((64, 32), (128, 16), (256, 8), (512, 4))
TEACHER_WIDTH = 2
CLASSES = 100
SEED = 10


@dataclass(frozen=True)
class DistillationInputs:
    """What one training step hands to the loss: all float32, NCHW, on the CPU."""

    student_features: tuple[Tensor, ...]  # (N, C_l, H_l, W_l)
    teacher_features: tuple[Tensor, ...]  # (N, 2 * C_l, H_l, W_l)
    student_logits: Tensor  # (N, CLASSES)
    teacher_logits: Tensor  # (N, CLASSES)
    targets: Tensor  # (N,)
    source: str  # a sentence for the report


def drawn_digits(count: int) -> np.ndarray:
    """`count` digit-like 8 x 8 images in [0, 1]: a ring, an upright or a level stroke of random thickness and place."""
    generator = np.random.default_rng(SEED)
    rows, columns = np.mgrid[0:8, 0:8].astype(np.float64)
    images = np.empty((count, 8, 8))
    for index in range(count):
        centre_row, centre_column = generator.uniform(3.0, 4.0, 2)
        thickness = generator.uniform(0.6, 1.2)
        ring = np.hypot((rows - centre_row) / 1.3, columns - centre_column) - generator.uniform(1.2, 2.4)
        upright = columns - centre_column + generator.uniform(-0.4, 0.4) * (rows - centre_row)
        level = rows - generator.uniform(1.0, 6.0)
        distance = (ring, upright, level)[index % 3]
        images[index] = np.exp(-((distance / thickness) ** 2)) * (np.abs(columns - 3.5) < 3.5)
    return images


def digit_images(count: int) -> tuple[Tensor, Tensor, str]:
    """`count` images (count, 3, 32, 32) with labels (count,), and a sentence that says which images they are."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        small = torch.from_numpy(drawn_digits(count)).float()
        labels = torch.arange(count) % 3
        source = "digit-like images drawn by numpy (scikit-learn, whose digits are the usual input, is not installed)"
    else:
        digits = load_digits()
        choice = np.arange(count) % len(digits.images)
        small = torch.from_numpy(digits.images[choice] / 16.0).float()
        labels = torch.from_numpy(digits.target[choice]).long()
        source = "scikit-learn's handwritten digits"
    images = F.interpolate(small[:, None], size=(32, 32), mode="bilinear", align_corners=False)
    return (images.expand(-1, 3, -1, -1) - 0.5) / 0.5, labels, source


@lru_cache(maxsize=1)
def network_inputs(batch: int) -> DistillationInputs:
    """Features and logits of a freshly initialised cifarresnet18 and its self-teacher BiFPNc, in training mode.

    In the original's order of operations, so that two commits that round differently get the same.
    """
    from bench.cases.self_teacher import original
    from frskd_fast.models import BiFPNc, cifarresnet18

    images, labels, source = digit_images(batch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        backbone = cifarresnet18(num_classes=CLASSES)
        self_teacher = BiFPNc(backbone.channels, num_classes=CLASSES, width=TEACHER_WIDTH)
    with torch.no_grad():
        student_features, student_logits = backbone(images)
        teacher_features, teacher_logits = original(self_teacher, student_features)
    sentence = f"features and logits of an untrained cifarresnet18 with BiFPNc on {source}, 32 x 32 x 3"
    return DistillationInputs(
        tuple(student_features), tuple(teacher_features), student_logits, teacher_logits, labels, sentence
    )


@lru_cache(maxsize=1)
def random_inputs(batch: int) -> DistillationInputs:
    """The shapes of `network_inputs` with values relu(standard normal) for features and `random_logits` for logits."""
    generator = torch.Generator().manual_seed(SEED)

    def level(channels: int, side: int) -> Tensor:
        return torch.randn(batch, channels, side, side, generator=generator).relu_()

    student_features = tuple(level(channels, side) for channels, side in PYRAMID)
    teacher_features = tuple(level(TEACHER_WIDTH * channels, side) for channels, side in PYRAMID)
    student_logits, teacher_logits, targets = random_logits((batch, CLASSES))
    sentence = "random features (rectified normal) and random logits"
    return DistillationInputs(student_features, teacher_features, student_logits, teacher_logits, targets, sentence)


def distillation_inputs(batch: int, kind: str) -> DistillationInputs:
    """The inputs of `kind` "features" or "random" for a batch of `batch` images."""
    return network_inputs(batch) if kind == "features" else random_inputs(batch)


def random_logits(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher logits of `shape` (N, K, ...) and labels (N, ...).

    Both networks have seen the same image, so their logits are correlated; the label's logit is higher, the teacher's
    more so, which gives peaked rows as a trained network does.
    """
    generator = torch.Generator().manual_seed(SEED)
    rows = (shape[0], *shape[2:])
    shared = torch.randn(shape, generator=generator)
    targets = torch.randint(shape[1], rows, generator=generator)
    label = torch.zeros(shape).scatter_(1, targets.unsqueeze(1), 1.0)
    student = shared + 0.5 * torch.randn(shape, generator=generator) + 2.0 * label
    teacher = shared + 0.5 * torch.randn(shape, generator=generator) + 6.0 * label
    return student, teacher, targets


def tiny_pyramid(width: int) -> tuple[Tensor, ...]:
    """Four levels so small that a call's time is what the host spends on it."""
    generator = torch.Generator().manual_seed(SEED)
    return tuple(torch.rand(2, 4 * width, side, side, generator=generator) for side in (4, 2, 2, 1))
