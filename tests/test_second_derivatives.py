"""A second derivative through the fused kernels is refused, by whichever route it is asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from frskd_fast import functional, losses
from frskd_fast.losses.hints import feature_distance
from frskd_fast.models import EfficientDetSeg
from frskd_fast.ops import _autograd

LABELS = torch.tensor([0, 2, 1, 0])
MASKS = LABELS.view(4, 1, 1).expand(4, 6, 5)

NETWORK = EfficientDetSeg(0, num_classes=3)

Case = Callable[[Tensor], Tensor]  # of x (4, 3, 4, 4), float32


def logits(x: Tensor) -> Tensor:
    return x.mean((2, 3))


CASES: dict[str, Case] = {
    "kd_loss": lambda x: functional.kd_loss(logits(x), torch.ones(4, 3), impl="cpu"),
    "cross_entropy": lambda x: functional.cross_entropy_kd(logits(x), None, LABELS, impl="cpu").ce_student,
    "attention_transfer": lambda x: functional.attention_transfer([x], [torch.ones(4, 2, 4, 4)], impl="cpu"),
    "attention_map": lambda x: functional.attention_map(x, impl="cpu").square().sum(),
    "weighted_fusion": lambda x: functional.weighted_fusion([x, x.exp()], torch.ones(2), impl="cpu").square().sum(),
    "channel_moments": lambda x: functional.channel_moments(x, impl="cpu").std.square().sum(),
    "adain": lambda x: functional.adain(x, *functional.channel_moments(x.exp(), impl="cpu"), impl="cpu").square().sum(),
    "pairwise_cosine": lambda x: functional.pairwise_cosine(logits(x), logits(x).exp(), impl="cpu").square().sum(),
    "frskd": lambda x: losses.FRSKDLoss(impl="cpu")(logits(x), logits(x).exp(), [x], [torch.ones(4, 2, 4, 4)], LABELS),
    "upsampled_kd_loss": lambda x: sum(functional.upsampled_kd_loss(x, x.exp(), MASKS, impl="cpu"), x.new_zeros(())),
    "upsampled_kd_loss of pixels": lambda x: (
        functional.upsampled_kd_loss(x, x.exp(), MASKS, reduction="none", impl="cpu").kd.square().sum()
    ),
    "segmentation network": lambda x: NETWORK.student_maps(F.interpolate(x, size=(32, 32))).square().mean(),
    "feature_distance": lambda x: feature_distance((1.0,), False, [x], [torch.ones(4, 3, 4, 4)]),
    "ffl": lambda x: losses.FFLLoss(impl="cpu")([logits(x), logits(x).exp()], logits(x).cos(), LABELS),
    "hsakd": lambda x: losses.HSAKDTeacherLoss(impl="cpu")(logits(x), [torch.cat([logits(x)] * 4, 1)], LABELS[:1]),
    "sskd_head": lambda x: losses.SSKDHeadLoss(impl="cpu")(torch.cat([logits(x), logits(x).exp()])),
    "sskd": lambda x: losses.SSKDLoss(impl="cpu")(
        logits(x), torch.ones(4, 3), logits(x).exp(), torch.eye(4, 5), LABELS[:1]
    ),
}


def images() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(4, 3, 4, 4, generator=generator, requires_grad=True)


REFUSED = pytest.raises(RuntimeError, match="no second derivative")


@pytest.mark.parametrize("name", CASES)
def test_every_route_is_refused(name: str) -> None:
    case = CASES[name]
    x = images()
    loss = case(x)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    penalised = loss + gradient.square().sum()
    with REFUSED:
        torch.autograd.grad(penalised, x, retain_graph=True)
    with REFUSED:
        penalised.backward()  # type: ignore[no-untyped-call]
    with REFUSED:
        torch.autograd.functional.hessian(case, images().detach())  # type: ignore[no-untyped-call]
    with REFUSED:
        torch.autograd.functional.hvp(case, images().detach(), torch.ones(4, 3, 4, 4))  # type: ignore[no-untyped-call]
    with REFUSED:
        # The upstream gradient alone: the trick of two backward passes.
        torch.autograd.functional.jvp(case, images().detach(), torch.ones(4, 3, 4, 4))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("name", CASES)
def test_a_gradient_with_its_graph_can_still_be_used(name: str) -> None:
    x = images()
    (expected,) = torch.autograd.grad(CASES[name](x), x)
    (gradient,) = torch.autograd.grad(CASES[name](x), x, create_graph=True)
    assert torch.equal(gradient, expected)


def test_the_cases_above_reach_every_function(monkeypatch: pytest.MonkeyPatch) -> None:
    reached: set[str] = set()
    apply = torch.autograd.Function.apply.__func__

    def recorded(cls: type, *args: object) -> object:
        reached.add(cls.__name__)
        return apply(cls, *args)

    monkeypatch.setattr(torch.autograd.Function, "apply", classmethod(recorded))
    for case in CASES.values():
        case(images())
    refusing = {
        function.__name__
        for function in torch.autograd.Function.__subclasses__()
        if function.__module__.startswith("frskd_fast") and hasattr(function.backward, "__wrapped__")
    }
    assert len(refusing) > 8
    assert refusing <= reached


def test_a_checkpointed_call_reads_its_saved_tensors_once() -> None:
    def total(x: Tensor) -> Tensor:
        return functional.kd_loss(logits(x.sin()), torch.ones(4, 3), impl="cpu")

    x = images()
    (expected,) = torch.autograd.grad(total(x), x)
    again = torch.utils.checkpoint.checkpoint(total, x, use_reentrant=False)
    assert isinstance(again, Tensor)
    (gradient,) = torch.autograd.grad(again, x, create_graph=True)
    assert torch.equal(gradient, expected)


def test_an_anchor_keeps_nothing_alive() -> None:
    x = images()
    anchored = _autograd.anchor(x)
    assert anchored.requires_grad
    assert anchored.untyped_storage().nbytes() == 0
