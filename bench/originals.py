"""The methods as their published code orders the operations: the baselines of the suite `methods`, and its truth.

Rows of rotated images come as 4n + r, image n turned by 90 r degrees. Nothing here calls frskd_fast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

VIEWS = 4
HSAKD_TEMPERATURE = 3.0
CLASS_TEMPERATURE, SIMILARITY_TEMPERATURE = 4.0, 0.5
SIMILARITY_RATIO = 0.75
FFL_TEMPERATURE, FFL_OFFSET = 3.0, 1e-7
COLLABORATIVE_BETA, COLLABORATIVE_GAMMA = 1e3, 0.03
SEGMENTATION_ALPHA, SEGMENTATION_BETA, SEGMENTATION_TEMPERATURE, IGNORED = 1.0, 50.0, 1.0, 255


def rotated(images: Tensor) -> Tensor:
    """The four views of each image, one operation for each."""
    turned = [torch.rot90(images, quarter, (2, 3)) for quarter in range(1, VIEWS)]
    return torch.stack([images, *turned], 1).view(-1, *images.shape[1:])


def divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) / rows of one head."""
    log_p = F.log_softmax(student_logits / temperature, dim=1)
    p_teacher = F.softmax(teacher_logits / temperature, dim=1)
    return F.kl_div(log_p, p_teacher, reduction="batchmean") * temperature**2


def joint_labels(targets: Tensor) -> Tensor:
    """4 y + r of every row."""
    return torch.stack([VIEWS * targets + quarter for quarter in range(VIEWS)], 1).view(-1)


def hsakd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_auxiliary: Sequence[Tensor],
    teacher_auxiliary: Sequence[Tensor],
    targets: Tensor,
) -> Tensor:
    """The student's loss: cross-entropy of the upright rows, and one divergence for each head."""
    ce = F.cross_entropy(student_logits[::VIEWS], targets)
    kd = divergence(student_logits, teacher_logits.detach(), HSAKD_TEMPERATURE)
    heads = zip(student_auxiliary, teacher_auxiliary, strict=True)
    return ce + kd + sum(divergence(student, teacher.detach(), HSAKD_TEMPERATURE) for student, teacher in heads)


def hsakd_teacher(logits: Tensor, auxiliary: Sequence[Tensor], targets: Tensor) -> Tensor:
    """The teacher's loss: one cross-entropy for each head."""
    return cross_entropies(logits, auxiliary, targets, joint_labels(targets))


def cross_entropies(logits: Tensor, auxiliary: Sequence[Tensor], targets: Tensor, joint: Tensor) -> Tensor:
    """Of the upright rows, and of every head with the joint labels."""
    return F.cross_entropy(logits[::VIEWS], targets) + sum(F.cross_entropy(head, joint) for head in auxiliary)


def hsakd_online(
    logits: Sequence[Tensor], first_auxiliary: Sequence[Tensor], second_auxiliary: Sequence[Tensor], targets: Tensor
) -> Tensor:
    """Two networks that teach each other: each direction's softmaxes by themselves."""
    first, second = logits
    joint = joint_labels(targets)
    loss = cross_entropies(first, first_auxiliary, targets, joint)
    loss = loss + cross_entropies(second, second_auxiliary, targets, joint)
    heads = [(first, second), *zip(first_auxiliary, second_auxiliary, strict=True)]
    for mine, other in heads:
        loss = loss + divergence(mine, other.detach(), HSAKD_TEMPERATURE)
        loss = loss + divergence(other, mine.detach(), HSAKD_TEMPERATURE)
    return loss


def views(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The positions of the upright rows and those of the turned ones."""
    index = torch.arange(rows, device=device).view(-1, VIEWS)
    return index[:, 0], index[:, 1:].reshape(-1)


def similarities(upright: Tensor, turned: Tensor) -> Tensor:
    """Cosine of every turned row with every upright one, (3B, B); both sides are broadcast to (3B, D, B)."""
    columns = upright.unsqueeze(2).expand(-1, -1, len(turned)).transpose(0, 2)
    rows = turned.unsqueeze(2).expand(-1, -1, len(upright))
    return F.cosine_similarity(rows, columns, dim=1)


def kept(scores: Tensor, right: Tensor, ratio: float) -> Tensor:
    """The rows in which the teacher is right, and the least wrong part `ratio` of the others.

    A row's rank is the place of the right column among its sorted scores. The counts go to the host twice: for the number
    of wrong rows and as the end of a slice. The published code sorts ranks without an order of ties; here the row decides.
    """
    order = torch.argsort(scores, dim=1, descending=True)
    rank = (order == right[:, None]).int().argmax(1)
    wrong = torch.nonzero(rank, as_tuple=True)[0].numel()
    keep = len(rank) - wrong + int(wrong * ratio)
    return torch.sort(torch.argsort(rank, stable=True)[:keep])[0]


def sskd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_projections: Tensor,
    teacher_projections: Tensor,
    targets: Tensor,
) -> Tensor:
    """The student's loss: labels and knowledge of the upright rows, of the turned ones, and of the similarities."""
    upright, turned = views(len(student_logits), student_logits.device)
    log_p_upright = F.log_softmax(student_logits[upright] / CLASS_TEMPERATURE, dim=1)
    log_p_turned = F.log_softmax(student_logits[turned] / CLASS_TEMPERATURE, dim=1)
    p_upright = F.softmax(teacher_logits[upright] / CLASS_TEMPERATURE, dim=1)
    p_turned = F.softmax(teacher_logits[turned] / CLASS_TEMPERATURE, dim=1)
    kept_turned = kept(p_turned, targets.repeat_interleave(VIEWS - 1), 1.0)

    similarity = similarities(student_projections[upright], student_projections[turned])
    teacher_similarity = similarities(teacher_projections[upright], teacher_projections[turned]).detach()
    kept_similar = kept(teacher_similarity, own_columns(similarity), SIMILARITY_RATIO)
    log_p_similar = F.log_softmax(similarity / SIMILARITY_TEMPERATURE, dim=1)
    p_similar = F.softmax(teacher_similarity / SIMILARITY_TEMPERATURE, dim=1)

    ce = F.cross_entropy(student_logits[upright], targets)
    kd = F.kl_div(log_p_upright, p_upright, reduction="batchmean") * CLASS_TEMPERATURE**2
    log_p_kept, p_kept = log_p_turned[kept_turned], p_turned[kept_turned]
    transformed = F.kl_div(log_p_kept, p_kept, reduction="batchmean") * CLASS_TEMPERATURE**2
    log_p_kept, p_kept = log_p_similar[kept_similar], p_similar[kept_similar]
    similar = F.kl_div(log_p_kept, p_kept, reduction="batchmean") * SIMILARITY_TEMPERATURE**2
    return 0.1 * ce + 0.9 * kd + 2.7 * transformed + 10.0 * similar


def own_columns(similarity: Tensor) -> Tensor:
    """The column of the image that each turned row was made of."""
    return torch.arange(similarity.shape[1], device=similarity.device).repeat_interleave(VIEWS - 1)


def sskd_head(projections: Tensor) -> Tensor:
    """The projection head's loss on the teacher: which image a turned row was made of."""
    upright, turned = views(len(projections), projections.device)
    similarity = similarities(projections[upright], projections[turned])
    return F.cross_entropy(similarity, own_columns(similarity))


def ffl_divergence(logits: Tensor, target_logits: Tensor) -> Tensor:
    """T^2 KL towards probabilities with an offset, which is more than 0 for equal logits."""
    log_p = F.log_softmax(logits / FFL_TEMPERATURE, dim=1)
    target = (F.softmax(target_logits / FFL_TEMPERATURE, dim=1) + FFL_OFFSET).detach()
    return FFL_TEMPERATURE**2 * ((target * (target.log() - log_p)).sum(1).sum() / len(logits))


def ffl(logits: Sequence[Tensor], fused_logits: Tensor, targets: Tensor) -> Tensor:
    """Two networks and their fused classifier: three cross-entropies and three divergences."""
    first, second = logits
    ensemble = (first + second) / 2
    ce = F.cross_entropy(first, targets) + F.cross_entropy(second, targets) + F.cross_entropy(fused_logits, targets)
    kd = ffl_divergence(first, fused_logits) + ffl_divergence(second, fused_logits)
    return ce + kd + ffl_divergence(fused_logits, ensemble)


def attention_map(feature: Tensor) -> Tensor:
    """The mean square over channels of each pixel, of length 1 over pixels."""
    return F.normalize(feature.pow(2).mean(1).flatten(1))


def collaborative(
    student_logits: Tensor,
    scratch_logits: Tensor,
    student_feats: Sequence[Tensor],
    scratch_feats: Sequence[Tensor],
    expert_feats: Sequence[Tensor],
    targets: Tensor,
) -> Tensor:
    """Two cross-entropies, the hint and the attention, which the student learns."""
    pairs = zip(student_feats, expert_feats, strict=True)
    attention = sum((attention_map(student) - attention_map(expert)).pow(2).mean() for student, expert in pairs)
    detached = scratch_logits.detach()
    hint = ((detached - student_logits) * (detached - student_logits)).sum() / len(targets)
    ce = F.cross_entropy(scratch_logits, targets) + F.cross_entropy(student_logits, targets)
    return COLLABORATIVE_BETA * attention + ce + COLLABORATIVE_GAMMA * hint


def segmentation(student_maps: Tensor, teacher_maps: Tensor, targets: Tensor) -> Tensor:
    """Two cross-entropies and the divergence over all pixels, of maps that are brought to the masks' size first."""
    student, teacher = (
        F.interpolate(maps, targets.shape[1:], mode="bilinear", align_corners=False)
        for maps in (student_maps, teacher_maps)
    )
    ce = F.cross_entropy(student, targets, ignore_index=IGNORED) + F.cross_entropy(
        teacher, targets, ignore_index=IGNORED
    )
    log_p = F.log_softmax(student / SEGMENTATION_TEMPERATURE, dim=1)
    p_teacher = F.softmax(teacher.detach() / SEGMENTATION_TEMPERATURE, dim=1)
    kd = F.kl_div(log_p, p_teacher, reduction="sum") * SEGMENTATION_TEMPERATURE**2 / targets.numel()
    return ce + SEGMENTATION_ALPHA * kd


def segmentation_attention(student_feats: Sequence[Tensor], teacher_feats: Sequence[Tensor]) -> Tensor:
    """The attention terms of all levels, which the student learns."""
    pairs = zip(student_feats, teacher_feats, strict=True)
    terms = [(attention_map(student) - attention_map(teacher.detach())).pow(2).mean() for student, teacher in pairs]
    return SEGMENTATION_BETA * torch.stack(terms).sum()
