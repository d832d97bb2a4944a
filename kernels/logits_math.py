"""What the forward and the backward kernel of the class-logit losses share: exponentials, and labels dense in the classes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exponentials(
    z,  # logits relative to a point near the row's maximum
    inverse_temperature,
    POWER: tl.constexpr,
):
    """exp(z / T) and exp(z)."""
    tempered = tl.exp(z * inverse_temperature)
    if POWER == 1:
        plain = tempered
    elif POWER == 2:
        plain = tempered * tempered
    elif POWER == 4:
        plain = tempered * tempered
        plain = plain * plain
    else:
        plain = tl.exp(z)
    return tempered, plain


@triton.jit
def label_weights(
    target,  # pointer to class probabilities, or unused
    offset,  # (rows, classes)
    mask,  # (rows, classes)
    smoothing,
    classes,
    LABELS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """The part of the label distribution that is dense in the classes; 0 outside the mask."""
    uniform = smoothing / classes
    if LABELS == 3:
        probability = tl.load(target + offset, mask=mask, other=0.0).to(ACCUMULATE)
        weight = tl.where(mask, (1.0 - smoothing) * probability + uniform, 0.0)
    else:
        weight = tl.where(mask, uniform, 0.0)
    return weight
