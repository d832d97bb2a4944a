"""The transforms of torch.func go through plain PyTorch, or end in a sentence that says so."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, jvp, vmap

import frskd_fast
from frskd_fast import _extension, functional


def test_transforms_take_plain_pytorch() -> None:
    student, teacher = torch.randn(2, 3, 4, 5, dtype=torch.float64)  # three batches
    losses = vmap(functional.kd_loss)(student, teacher)
    each = [functional.kd_loss(*pair) for pair in zip(student, teacher, strict=True)]
    torch.testing.assert_close(losses, torch.stack(each))
    leaf = student[0].clone().requires_grad_()
    (wanted,) = torch.autograd.grad(functional.kd_loss(leaf, teacher[0]), leaf)
    torch.testing.assert_close(grad(functional.kd_loss)(student[0], teacher[0]), wanted)
    assert frskd_fast.last_impl()["logits"] == "reference"
    tangent = torch.ones_like(leaf)
    _, directional = jvp(lambda z: functional.kd_loss(z, teacher[0]), (student[0],), (tangent,))
    torch.testing.assert_close(directional, (wanted * tangent).sum())
    features = torch.randn(2, 3, 4, 4)
    maps = vmap(lambda one: functional.attention_map(one[None]))(features)
    torch.testing.assert_close(maps[:, 0], functional.attention_map(features))


@pytest.mark.skipif(_extension.cpu_library_problem() is not None, reason="no C++ kernels")
def test_a_kernel_asked_for_is_refused_in_a_sentence() -> None:
    logits = torch.randn(4, 5)
    with pytest.raises(
        RuntimeError, match=r"impl='cpu' was asked for, but transforms of torch\.func .* go through plain"
    ):
        grad(lambda z: functional.kd_loss(z, logits, impl="cpu"))(logits)
