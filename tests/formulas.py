"""Plain PyTorch statements of the formulas, written apart from the package, in the original's order of operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_map(feature: Tensor, exponent: float = 2.0) -> Tensor:
    """normalize(mean_c |f|^p) over the pixels of each sample: (N, C, H, W) -> (N, H*W)."""
    powers = feature.pow(2) if exponent == 2 else feature.abs().pow(exponent)
    return F.normalize(powers.mean(1).flatten(1))


def attention_rows(students: Sequence[Tensor], teachers: Sequence[Tensor], exponent: float = 2.0) -> Tensor:
    """mean over pixels of the squared difference of the maps: (L, N)."""
    pairs = zip(students, teachers, strict=True)
    return torch.stack([(attention_map(s, exponent) - attention_map(t, exponent)).pow(2).mean(1) for s, t in pairs])


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * sum_k KL of the softmaxes at temperature T, unreduced over rows."""
    log_student = F.log_softmax(student / temperature, 1)
    target = F.softmax(teacher / temperature, 1)
    return F.kl_div(log_student, target, reduction="none").sum(1) * temperature**2


def frskd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_feats: Sequence[Tensor],
    teacher_feats: Sequence[Tensor],
    targets: Tensor | None,
    alpha: float,
    beta: float,
    temperature: float,
) -> Tensor:
    """CE + CE + alpha * KD + beta * sum_l AT_l as the original adds them up."""
    kd = divergence(student_logits, teacher_logits.detach(), temperature).sum() / student_logits.shape[0]
    loss = alpha * kd
    for student, teacher in zip(student_feats, teacher_feats, strict=True):
        loss = loss + beta * (attention_map(student) - attention_map(teacher.detach())).pow(2).mean()
    if targets is not None:
        loss = loss + F.cross_entropy(student_logits, targets) + F.cross_entropy(teacher_logits, targets)
    return loss


def fusion_weights(weight: Tensor, weighting: str, epsilon: float) -> Tensor:
    """w^ (K,): ones, softmax(w), or relu(w) / (sum relu(w) + epsilon)."""
    if weighting == "sum":
        return torch.ones_like(weight)
    if weighting == "softmax":
        return weight.exp() / weight.exp().sum()
    return F.relu(weight) / (F.relu(weight).sum() + epsilon)


def weighted_fusion(
    inputs: Sequence[Tensor], normalised_weight: Tensor, resample: Sequence[str], pre: str, size: Sequence[int]
) -> Tensor:
    """sum_i w^_i * pre( resample_i(x_i) ) of maps that have been through their BatchNorm."""
    functions = {"none": lambda x: x, "relu": F.relu, "silu": F.silu}
    maps = []
    for x, name in zip(inputs, resample, strict=True):
        if name == "up":
            x = F.interpolate(x, tuple(size), mode="nearest")
        elif name == "pool":
            x = F.max_pool2d(F.pad(x, (x.shape[3] % 2, 1, x.shape[2] % 2, 1)), 3, stride=2)
        maps.append(functions[pre](x))
    return torch.stack([w * x for w, x in zip(normalised_weight, maps, strict=True)]).sum(0)
