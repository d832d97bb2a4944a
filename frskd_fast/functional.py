"""The stateless public functions. Student first, teacher second; raw logits in; float32 arithmetic whatever the dtype."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from frskd_fast.ops import attention as _attention
from frskd_fast.ops import fusion as _fusion
from frskd_fast.ops import logit_maps as _logit_maps
from frskd_fast.ops import logits as _logits
from frskd_fast.ops import moments as _moments
from frskd_fast.ops import ranking as _ranking
from frskd_fast.ops import similarity as _similarity
from frskd_fast.ops.moments import ChannelMoments

__all__ = [
    "ChannelMoments",
    "CrossEntropyKD",
    "adain",
    "attention_map",
    "attention_transfer",
    "channel_moments",
    "cross_entropy_kd",
    "kd_loss",
    "pairwise_cosine",
    "ranked_kd_loss",
    "upsampled_kd_loss",
    "weighted_fusion",
]


class CrossEntropyKD(NamedTuple):
    """What ``cross_entropy_kd`` and ``upsampled_kd_loss`` return; each part is differentiable and carries no weight."""

    ce_student: Any
    ce_teacher: Any
    kd: Any


def attention_map(feature: Tensor, exponent: float = 2.0, *, impl: str = "auto") -> Tensor:
    """q = a / max(||a||_2, 1e-12) per sample, with a = mean_c |f|^exponent.

    Args:
        feature: (N, C, H, W) float32, bfloat16, float16 or float64, any strides.
        exponent: p >= 1.
        impl: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Returns:
        (N, H * W) float32 (float64 for float64 input); ``.unflatten(1, (H, W))`` makes a picture of it.

    Raises:
        TypeError, ValueError: wrong rank, dtype or exponent.
        RuntimeError: when ``impl`` cannot run here.

    Example:
        >>> import torch
        >>> attention_map(torch.tensor([[[[3.0, 2.0]], [[-3.0, 2.0]]]])).mul(97**0.5).round()
        tensor([[9., 4.]])

    Source: Zagoruyko and Komodakis, ICLR 2017, eq. 1, in FRSKD's form (arXiv 2103.08273).
    """
    return _attention.attention_map(feature, exponent, impl)


def attention_transfer(
    student_feats: Any,
    teacher_feats: Any,
    exponent: float = 2.0,
    reduction: str = "mean",
    *,
    resize: str | None = None,
    detach_teacher: bool = True,
    impl: str = "auto",
) -> Tensor:
    """sum_l mean_{n,hw} (q_student - q_teacher)^2 over all pyramid levels l in one call, q = ``attention_map``.

    Args:
        student_feats: list, tuple or dict of L maps (N, C_l, H_l, W_l), or one map; one dtype, any strides.
        teacher_feats: L maps (N, D_l, H_l, W_l), same dtype and device; the channels may differ.
        exponent: p >= 1 of the maps.
        reduction: ``"mean"`` sums the levels' means over batch and pixels; ``"levels"`` gives those means, (L,); ``"sum"`` sums
            over levels and samples the mean over pixels; ``"none"`` gives it for each level and sample, (L, N).
        resize: ``None``, or ``"pool"`` to average-pool the larger of two maps to the smaller one's size.
        detach_teacher: no gradient to the teacher (as FRSKD); ``False`` differentiates both sides.
        impl: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Returns:
        float32 (float64 for float64 inputs), of the shape ``reduction`` says.

    Raises:
        TypeError, ValueError: levels, batch, pixels, dtype or device do not match; the sentence names the level.
        RuntimeError: when ``impl`` cannot run here.

    Example:
        >>> import torch
        >>> student, teacher = torch.rand(2, 8, 4, 4, requires_grad=True), torch.rand(2, 16, 4, 4)
        >>> attention_transfer([student], [teacher]).backward()
        >>> attention_transfer([student, student], [3 * student, teacher], reduction="levels").shape
        torch.Size([2])

    Source: FRSKD (arXiv 2103.08273) as released: the mean over pixels of the squared difference, not an L2 norm.
    """
    return _attention.attention_transfer(
        student_feats, teacher_feats, exponent, reduction, resize, detach_teacher, impl
    )


def channel_moments(x: Tensor, eps: float = 1e-5, unbiased: bool = True, *, impl: str = "auto") -> ChannelMoments:
    """mean = mean_hw x, std = sqrt(var_hw x + eps) of each channel of each image.

    Args:
        x: (N, C, H, W) float32, bfloat16, float16 or float64, any strides.
        eps: > 0, added to the variance.
        unbiased: the variance divides by H*W - 1, which takes two pixels or more; ``False`` divides by H*W.
        impl: ``"reference"`` is the formula, differentiable twice; with all others the gradient is written out.

    Returns:
        ``ChannelMoments(mean, std)``, each (N, C) float32 (float64 for float64), computed in that dtype.

    Raises:
        TypeError, ValueError: wrong rank, dtype or eps, or one pixel where ``unbiased``.

    Example:
        >>> import torch
        >>> mean, std = channel_moments(torch.tensor([[[[1.0, 3.0]]]]))
        >>> mean.item(), round(std.item(), 3)
        (2.0, 1.414)

    Source: the statistics of adaptive instance normalisation (Huang and Belongie, ICCV 2017), as style transfer computes them.
    """
    return _moments.channel_moments(x, eps, unbiased, impl)


def adain(
    content: Tensor,
    mean: Tensor,
    std: Tensor,
    eps: float = 1e-5,
    unbiased: bool = True,
    *,
    moments: ChannelMoments | None = None,
    impl: str = "auto",
) -> Tensor:
    """std * (content - m) / s + mean with (m, s) = ``channel_moments(content)``: content with other statistics.

    Its mean over the pixels is ``mean`` exactly, and its standard deviation ``std`` but for what ``eps`` adds.

    Args:
        content: (N, C, H, W) float32, bfloat16, float16 or float64, any strides.
        mean, std: (N, C), of any floating dtype.
        eps, unbiased: as in ``channel_moments``.
        moments: those of ``content``, where they are known already.
        impl: as in ``channel_moments``.

    Returns:
        (N, C, H, W) in the dtype and layout of ``content``. Gradients go to all three tensors.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or settings do not fit.

    Example:
        >>> import torch
        >>> moved = adain(torch.rand(1, 2, 4, 4), torch.tensor([[5.0, -5.0]]), torch.ones(1, 2))
        >>> moved.mean(dim=(2, 3)).round()
        tensor([[ 5., -5.]])

    Source: Huang and Belongie, ICCV 2017 (arXiv 1703.06868).
    """
    return _moments.adain(content, mean, std, eps, unbiased, moments, impl)


def kd_loss(
    student_logits: Any,
    teacher_logits: Any,
    temperature: float = 4.0,
    reduction: str = "batchmean",
    *,
    detach_teacher: bool = True,
    impl: str = "auto",
) -> Any:
    """T^2 * sum_k p_t (log p_t - log p_s) with p = softmax(z / T), averaged over the rows.

    Args:
        student_logits: (N, K), (N, K, W) or (N, K, H, W) raw logits, classes on axis 1, any strides; or a list of heads.
        teacher_logits: the same shape, dtype and device; or as many heads.
        temperature: T > 0.
        reduction: ``"batchmean"`` divides by the number of rows (N, or N * H * W for maps), ``"sum"``, or ``"none"`` (N, ...).
        detach_teacher: no gradient to the teacher; ``False`` differentiates both sides.
        impl: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Returns:
        float32 (float64) scalar; (heads,) for a list of heads; per row (a list of them for heads) when unreduced.

    Raises:
        TypeError, ValueError: shapes, classes, dtypes or devices differ, or the temperature is not positive.
        RuntimeError: when ``impl`` cannot run here.

    Example:
        >>> import torch
        >>> z = torch.randn(4, 10)
        >>> abs(kd_loss(z, z + 3.0).item()) < 1e-5  # a shift of all logits changes no probability
        True

    Source: Hinton et al., 2015 (arXiv 1503.02531), in FRSKD's and RepDistiller's form.
    """
    return _logits.logit_losses(
        student_logits, teacher_logits, None, temperature, 0.0, -100, reduction, detach_teacher, impl
    )[2]


def cross_entropy_kd(
    student_logits: Any,
    teacher_logits: Any,
    targets: Any = None,
    *,
    temperature: float = 4.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "batchmean",
    detach_teacher: bool = True,
    impl: str = "auto",
) -> CrossEntropyKD:
    """(CE(student), CE(teacher), KD) from one read of each raw logit row; KD as in ``kd_loss``.

    CE = -sum_k t_k log softmax(z)_k with t = (1 - label_smoothing) * target + label_smoothing / K.

    Args:
        student_logits: (N, K), (N, K, W) or (N, K, H, W) raw logits, classes on axis 1, any strides; or a list of heads.
        teacher_logits: the same shape, dtype and device, or as many heads; ``None`` leaves CE(teacher) and KD at 0.
        targets: ``None`` (both CE are 0); class indices (N,), (N, W) or (N, H, W); ``(targets_a, targets_b, lam)`` for
            lam * CE(., a) + (1 - lam) * CE(., b), where an ignored label takes its weight out of the mean (a traced graph
            holds lam as a constant: compiled code with a new lam each step passes probabilities instead);
            probabilities of the logits' shape; or a list with one entry per head.
        temperature: T > 0 of the KD term; the cross-entropies are at temperature 1.
        label_smoothing: in [0, 1].
        ignore_index: class index whose rows count in neither CE; the KD term keeps them, as FRSKD does.
        reduction: ``"batchmean"`` (CE over the rows that count, KD over all rows), ``"sum"`` or ``"none"``.
        detach_teacher: no gradient of KD to the teacher; CE(teacher) always has one.
        impl: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Returns:
        ``CrossEntropyKD(ce_student, ce_teacher, kd)``, shapes as in ``kd_loss``. With all labels ignored both CE are 0.

    Raises:
        TypeError, ValueError: shapes, classes, dtypes, devices or labels do not fit. On a GPU a label out of range
            gives NaN instead of an error, because looking at it would stop the device.
        RuntimeError: when ``impl`` cannot run here.

    Example:
        >>> import torch
        >>> parts = cross_entropy_kd(torch.zeros(4, 10), torch.zeros(4, 10), torch.arange(4))
        >>> round(parts.ce_student.item(), 4), parts.kd.item()
        (2.3026, 0.0)

    Source: the terms of FRSKD's objective (arXiv 2103.08273).
    """
    ce_student, ce_teacher, kd = _logits.logit_losses(
        student_logits,
        teacher_logits,
        targets,
        temperature,
        label_smoothing,
        ignore_index,
        reduction,
        detach_teacher,
        impl,
    )
    return CrossEntropyKD(ce_student, ce_teacher, kd)


def pairwise_cosine(x: Tensor, y: Tensor, eps: float = _similarity.EPSILON, *, impl: str = "auto") -> Tensor:
    """c[i, j] = <x_i, y_j> / (max(||x_i||, eps) * max(||y_j||, eps)): all pairs by one matrix product.

    The numbers of ``F.cosine_similarity(x.unsqueeze(1), y, dim=2)``, which writes tensors of shape (M, N, D) for them.

    Args:
        x: (M, D) float32, bfloat16, float16 or float64, any strides.
        y: (N, D), same dtype and device.
        eps: the least length > 0 that is divided by. A vector that is shorter gets the gradient of its inner products alone,
            so a zero vector has a finite one.
        impl: ``"reference"`` is the formula, differentiable twice; with all others the gradient is written out.

    Returns:
        (M, N) float32 (float64 for float64), computed in that dtype also under autocast.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit.

    Example:
        >>> import torch
        >>> pairwise_cosine(torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])).tolist()
        [[1.0, 0.0], [0.0, 0.0]]

    Source: the similarity of SSKD (arXiv 2006.07114) and its released code.
    """
    return _similarity.pairwise_cosine(x, y, eps, impl)


def ranked_kd_loss(
    student_scores: Tensor,
    teacher_scores: Tensor,
    correct: Tensor,
    temperature: float = 4.0,
    ratio: float = 1.0,
    *,
    impl: str = "auto",
) -> Tensor:
    """T^2 / |kept| * sum over kept rows of sum_k p_t (log p_t - log p_s), p = softmax(scores / T); the teacher is detached.

    A row is correct if the teacher's score of its column ``correct`` is the largest. Kept are all correct rows and
    floor(wrong * ratio) of the others, those in which that column has the best rank. Equal scores rank by column, equal ranks
    by row, the first before the others. Nothing waits for the device, and with ratio 1 nothing is ranked.

    Args:
        student_scores: (M, K) raw logits or similarities, any strides.
        teacher_scores: (M, K), same dtype and device.
        correct: (M,) index of each row's correct column; -100 where there is none: such a row is wrong and ranks last.
        temperature: T > 0.
        ratio: share of the wrong rows that is kept, in [0, 1].
        impl: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Returns:
        float32 (float64) scalar; 0 where no row is kept.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or settings do not fit; on the CPU also an index out of range, which
            on a device counts as none.
        RuntimeError: when ``impl`` cannot run here.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
        >>> student = teacher + torch.tensor([[0.0], [0.0], [1.0]]) * torch.tensor([5.0, 0.0, 0.0])
        >>> correct = torch.tensor([0, 1, 2])  # ranks 0, 1 and 2: of two wrong rows the last is left out
        >>> abs(ranked_kd_loss(student, teacher, correct, 1.0, 0.5).item()) < 1e-6
        True

    Source: SSKD (arXiv 2006.07114), as released: a share of the wrong rows, by rank.
    """
    return _ranking.ranked_kd_loss(student_scores, teacher_scores, correct, temperature, ratio, impl)


def upsampled_kd_loss(
    student_maps: Tensor,
    teacher_maps: Tensor | None,
    targets: Tensor | None = None,
    *,
    size: Any = None,
    temperature: float = 1.0,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = 255,
    reduction: str = "mean",
    detach_teacher: bool = True,
    impl: str = "auto",
) -> CrossEntropyKD:
    """(CE(student), CE(teacher), KD) of the pixels of z = bilinear(maps), which is never in memory.

    The maps are interpolated to the labels' size as ``F.interpolate(maps, size, mode="bilinear", align_corners=False)`` does.
    CE is that of ``F.cross_entropy`` with its class weights, label smoothing and ignored labels, and KD = T^2 * sum_k p_t
    (log p_t - log p_s) with p = softmax(z / T), averaged over all pixels, ignored ones included.

    Args:
        student_maps: (N, K, h, w) raw logits in float32, bfloat16, float16 or float64, any strides.
        teacher_maps: the same shape, dtype and device; ``None`` leaves CE(teacher) and KD at 0.
        targets: (N, H, W) class indices, H >= h and W >= w; ``None`` leaves both CE at 0.
        size: (H, W); needed only without ``targets``.
        temperature: T > 0 of the KD term; the cross-entropies are at temperature 1.
        class_weights: (K,) weight w of each class in both CE, whose mean divides by the sum of the valid pixels' w.
        label_smoothing: in [0, 1].
        ignore_index: class index whose pixels count in neither CE.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (three maps (N, H, W), whose backward pass computes them again).
        detach_teacher: no gradient of KD to the teacher; CE(teacher) always has one.
        impl: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Returns:
        ``CrossEntropyKD(ce_student, ce_teacher, kd)`` in float32 (float64). With all labels ignored both CE are 0.

    Raises:
        TypeError, ValueError: shapes, classes, dtypes, devices or labels do not fit, or the maps are larger than the labels.
            On a GPU a label out of range gives NaN instead of an error, because looking at it would stop the device.
        RuntimeError: when ``impl`` cannot run here.

    Example:
        >>> import torch
        >>> masks = torch.randint(21, (2, 16, 16))
        >>> parts = upsampled_kd_loss(torch.zeros(2, 21, 4, 4), torch.ones(2, 21, 4, 4), masks)
        >>> round(parts.ce_student.item(), 4), parts.kd.item()
        (3.0445, 0.0)

    Source: the segmentation losses of FRSKD (arXiv 2103.08273), as released.
    """
    return CrossEntropyKD(
        *_logit_maps.logit_map_losses(
            student_maps,
            teacher_maps,
            targets,
            size,
            temperature,
            class_weights,
            label_smoothing,
            ignore_index,
            reduction,
            detach_teacher,
            impl,
        )
    )


def weighted_fusion(
    inputs: Any,
    weight: Tensor | None = None,
    *,
    resample: Any = None,
    pre: str = "relu",
    weighting: str = "relu",
    epsilon: float = 1e-6,
    size: Any = None,
    batch_norms: Any = None,
    impl: str = "auto",
) -> Tensor:
    """sum_i w^_i * pre( resample_i( batch_norm_i(x_i) ) ): one node of a BiFPN in one operation each way.

    Args:
        inputs: list of K = 1 to 4 maps (N, C, H_i, W_i); one dtype (float32, bfloat16, float16 or float64), any strides.
        weight: (K,) raw weights w of any floating dtype; may be None for ``weighting="sum"``.
        resample: K of ``"none"``, ``"up"`` (nearest neighbour to the output's size) and ``"pool"`` (3x3 maximum of stride 2
            over the zero-padded map, size halved and rounded up); None: nothing is resampled.
        pre: ``"none"``, ``"relu"`` or ``"silu"``, applied to each input.
        weighting: w^ = ``"relu"``: relu(w) / (sum relu(w) + epsilon), ``"softmax"``: softmax(w), ``"sum"``: 1.
        epsilon: 1e-6 in FRSKD, 1e-4 in EfficientDet.
        size: (H, W) of the output; None: that of the first input that is not up-sampled.
        batch_norms: K of nn.BatchNorm2d or None, folded into the reading of raw convolution outputs: batch statistics and
            running updates in training mode, running statistics in eval mode. Other modules (SyncBatchNorm) run as they are.
        impl: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Returns:
        (N, C, H, W) in the inputs' dtype, channels_last if the first input is. Arithmetic is float32 (float64).

    Raises:
        TypeError, ValueError: inputs, sizes or settings do not fit; the sentence names the input.
        RuntimeError: when ``impl`` cannot run here.

    Example:
        >>> import torch
        >>> fine, coarse = torch.ones(1, 2, 4, 4), torch.full((1, 2, 2, 2), 3.0)
        >>> fused = weighted_fusion([fine, coarse], torch.ones(2), resample=["none", "up"])
        >>> tuple(fused.shape), round(fused[0, 0, 0, 0].item(), 3)
        ((1, 2, 4, 4), 2.0)

    Source: Tan et al., CVPR 2020, section 3.3; FRSKD (arXiv 2103.08273), section 3.1, whose ReLU comes before the weight.
    """
    return _fusion.weighted_fusion(inputs, weight, resample, pre, weighting, epsilon, size, batch_norms, impl)
