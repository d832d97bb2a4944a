"""Operation ``fusion``: every implementation that runs on the CPU against float64, layouts, BatchNorm, limits, autograd."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import formulas
import pytest
import torch
import torch.nn.functional as F
from layouts import channels_last, contiguous, strided, transposed
from numerics import assert_close, largest_error
from problems import Problem
from problems.fusion import (
    ACTIVATIONS,
    DTYPES,
    LAYOUTS,
    MANY_RESAMPLES,
    NODES,
    PROBLEMS,
    RAW_PROBLEMS,
    WEIGHTINGS,
    FusionProblem,
    Results,
    Shapes,
    collect,
    compare,
    maps,
    random_batch_norm,
)
from torch import Tensor, nn

import frskd_fast
from frskd_fast import _dispatch, functional
from frskd_fast.ops import fusion as fusion_ops
from frskd_fast.ops.batch_norm import Folding, batch_statistics
from frskd_fast.reference import fusion as reference
from frskd_fast.reference.dtypes import accumulate_dtype
from frskd_fast.reference.fusion import Node, Settings

IMPLEMENTATIONS = ["reference", "cpu"]

# The reference is plain PyTorch and knows nothing of layouts.
LAYOUTS_OF = [*(("cpu", layout) for layout in LAYOUTS), ("reference", "contiguous"), ("reference", "mixed")]


def _turns(values: Sequence[Any], layout: str, dtype: torch.dtype) -> Iterator[Any]:
    """``values`` again and again, from a place that layout and dtype choose."""
    start = len(NODES) * (len(DTYPES) * list(LAYOUTS).index(layout) + DTYPES.index(dtype))
    return itertools.islice(itertools.cycle(values), start, None)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Values


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_problems(problem: FusionProblem, implementation: str) -> None:
    problem.run(implementation, "cpu")


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("problem", RAW_PROBLEMS, ids=lambda problem: problem.name)
def test_problems_of_raw_functions(problem: Problem) -> None:
    problem.run("cpu", "cpu")


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    ("impl", "layout"), [("cpu", "contiguous"), ("cpu", "channels_last"), ("reference", "contiguous")]
)
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=lambda value: value[0])
def test_every_activation_and_weighting(weighting: tuple[str, tuple[float, ...]], layout: str, impl: str) -> None:
    for pre, normalised in itertools.product(ACTIVATIONS, (False, True)):
        batch_norms = [random_batch_norm(5) for _ in range(4)] if normalised else None
        compare(impl, MANY_RESAMPLES, maps(MANY_RESAMPLES, 2, torch.float32, layout), pre, *weighting, batch_norms)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("impl", "layout"), LAYOUTS_OF)
def test_batch_norm_folded_in(layout: str, dtype: torch.dtype, training: bool, impl: str) -> None:
    """All inputs normalised or every other one; outputs, gradients of inputs, gamma and beta, and running statistics."""
    choices = itertools.product(ACTIVATIONS, (slice(0, 0), slice(0, 4, 2), slice(1, 4, 2)))
    for shapes, (pre, left_out) in zip(NODES, _turns(list(choices), layout, dtype), strict=False):
        batch_norms: list[nn.Module | None] = [random_batch_norm(shapes.channels, training) for _ in shapes.sizes]
        batch_norms[left_out] = [None] * len(batch_norms[left_out])
        compare(impl, shapes, maps(shapes, 3, dtype, layout), pre, batch_norms=batch_norms)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channel_slice"])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(
    ("shapes", "batch"),
    [
        (Shapes(1100, ((2, 3), (1, 2), (3, 5)), ("none", "up", "pool"), (2, 3)), 2),
        (Shapes(1, ((3, 2), (6, 3)), ("none", "pool"), (3, 2)), 4),
        (Shapes(6, ((2, 2), (3, 3)), ("none", "pool"), (2, 2)), 37),
        (Shapes(3, ((33, 40), (17, 20)), ("none", "up"), (33, 40)), 2),
        (Shapes(40, ((3, 300), (2, 150)), ("none", "up"), (3, 300)), 1),
        (Shapes(1, ((1, 1),), ("none",), (1, 1)), 3),
        (Shapes(2, ((257, 256),), ("none",), (257, 256)), 1),
    ],
    ids=["1100 channels", "one channel", "37 samples", "tall", "wide", "one pixel", "large plane"],
)
def test_sizes_beyond_one_block(shapes: Shapes, batch: int, normalised: bool, layout: str, impl: str) -> None:
    """More channels than a block has, more samples than there are groups, planes longer than a tile."""
    batch_norms = [random_batch_norm(shapes.channels) for _ in shapes.sizes] if normalised else None
    compare(impl, shapes, maps(shapes, batch, torch.float32, layout), batch_norms=batch_norms)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_upstream_gradients_of_any_layout(layout: str, impl: str) -> None:
    shapes = NODES[2]
    for name, changes in LAYOUTS.items():
        for batch_norms in (None, [random_batch_norm(shapes.channels) for _ in shapes.sizes]):
            grad = changes[0](torch.randn(2, shapes.channels, *shapes.size))
            assert name != "expanded" or 0 in grad.stride()
            inputs = maps(shapes, 2, torch.float32, layout)
            compare(impl, shapes, inputs, batch_norms=batch_norms, grad=grad)
    one_number = torch.tensor(0.7).expand(2, shapes.channels, *shapes.size)
    compare(impl, shapes, maps(shapes, 2, torch.float32, layout), grad=one_number)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_up_sampling_reads_the_pixels_that_interpolate_reads(layout: str, impl: str) -> None:
    """Every pixel holds its index; sizes include those where float32 rounding moves a pixel by one."""
    for source, wanted in [(5, 9), (3, 9), (2, 9), (6, 74), (26, 44), (7, 7), (1, 5), (13, 29), (41, 123), (60, 97)]:
        x = LAYOUTS[layout][0](torch.arange(source, dtype=torch.float32).view(1, 1, source, 1).repeat(1, 2, 1, 3))
        x.requires_grad_()
        out = functional.weighted_fusion([x], resample=["up"], size=(wanted, 3), weighting="sum", pre="none", impl=impl)
        assert torch.equal(out, F.interpolate(x, (wanted, 3), mode="nearest")), (source, wanted)
        grad = torch.randint(-8, 8, out.shape).float()
        (gradient,) = torch.autograd.grad(out, x, grad)
        rows = out.detach()[0, 0, :, 0].long()
        assert torch.equal(gradient, torch.zeros_like(x).index_add_(2, rows, grad)), (source, wanted)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ties_and_padding_in_pooling(dtype: torch.dtype, layout: str, impl: str) -> None:
    """The gradient goes where max_pool2d sends it, also when that is the padding; small integers are exact."""
    for size, normalised in itertools.product([(1, 1), (2, 2), (5, 5), (6, 5), (7, 8)], (False, True)):
        x = torch.randint(-2, 2, (3, 10, *size))
        x[:, 1] = -1  # the padding is the largest where there is any
        x[:, 2] = 0
        leaf = LAYOUTS[layout][0](x.to(dtype)).requires_grad_()
        batch_norm = None
        if normalised:
            # y = 2 x - 1 or -2 x + 1: the largest after normalisation, not before.
            batch_norm = random_batch_norm(10, training=False, eps=0.5)
            with torch.no_grad():
                batch_norm.weight.copy_(torch.tensor([2.0, -2.0] * 5))
                batch_norm.bias.copy_(torch.tensor([-1.0, 1.0] * 5))
                batch_norm.running_mean.zero_()  # type: ignore[union-attr]
                batch_norm.running_var.fill_(0.5)  # type: ignore[union-attr]
        for pre in ("none", "relu"):
            out = functional.weighted_fusion(
                [leaf], resample=["pool"], weighting="sum", pre=pre, batch_norms=[batch_norm], impl=impl
            )
            truth = x.double().requires_grad_()
            value = truth if batch_norm is None else copy.deepcopy(batch_norm).double()(truth)
            wanted = formulas.weighted_fusion([value], torch.ones(1), ["pool"], pre, ())
            assert torch.equal(out.double(), wanted)
            grad = torch.randint(1, 9, out.shape)
            (gradient,) = torch.autograd.grad(out, leaf, grad.to(dtype))
            (wanted_gradient,) = torch.autograd.grad(wanted, truth, grad.double())
            assert torch.equal(gradient.double(), wanted_gradient), (size, normalised, pre)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_and_gradients_have_the_memory_format_of_the_inputs(dtype: torch.dtype, impl: str) -> None:
    shapes = NODES[2]
    for layout in ("contiguous", "channels_last", "channel_slice"):
        leaves = [x.requires_grad_() for x in maps(shapes, 2, dtype, layout)]
        out = functional.weighted_fusion(leaves, torch.ones(3), resample=shapes.resample, impl=impl)
        assert out.shape == (2, 19, 4, 4) and out.dtype == dtype
        if impl == "reference":
            continue
        assert out.is_contiguous(
            memory_format=torch.contiguous_format if layout == "contiguous" else torch.channels_last
        )
        # Not .grad, which PyTorch makes contiguous for a leaf that is a slice.
        for leaf, gradient in zip(leaves, torch.autograd.grad(out, leaves, torch.ones_like(out)), strict=True):
            assert gradient.stride() == torch.empty_like(leaf).stride()


# BatchNorm


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"momentum": 0.0}, {"momentum": 1.0}],
    ids=str,
)
def test_batch_norm_settings(options: dict[str, Any], dtype: torch.dtype, impl: str) -> None:
    """Three steps of training, then evaluation, beside nn.BatchNorm2d itself."""
    ours = random_batch_norm(4, **options).to(accumulate_dtype(dtype))
    theirs = copy.deepcopy(ours).double()
    for step in range(4):
        if step == 3:
            ours.eval(), theirs.eval()
        x = (torch.randn(3, 4, 5, 3) * (step + 1) + step).to(dtype)
        leaf, truth = x.clone().requires_grad_(), x.double().requires_grad_()
        grad = torch.randn(3, 4, 5, 3).to(dtype)
        ours.zero_grad(), theirs.zero_grad()
        out = functional.weighted_fusion([leaf], weighting="sum", batch_norms=[ours], impl=impl)
        out.backward(grad)
        wanted = theirs(truth).relu()
        wanted.backward(grad.double())
        steps = 16 if dtype != torch.bfloat16 else 1
        assert largest_error(out, wanted) <= steps * torch.finfo(dtype).eps * float(wanted.detach().max())
        assert leaf.grad is not None and truth.grad is not None
        assert largest_error(leaf.grad, truth.grad) <= 2 * steps * torch.finfo(dtype).eps * float(
            truth.grad.abs().max()
        )
        for (name, buffer), (_, other) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
            torch.testing.assert_close(buffer.double(), other.double(), rtol=2e-6, atol=1e-6, msg=f"{name} {step}")
        for (name, parameter), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            assert parameter.grad is not None and other.grad is not None
            torch.testing.assert_close(parameter.grad.double(), other.grad, rtol=2e-5, atol=2e-5, msg=f"{name} {step}")
    if ours.num_batches_tracked is not None:
        assert int(ours.num_batches_tracked) == 3


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("momentum", [0.3, None])
def test_one_batch_norm_for_several_inputs(momentum: float | None, impl: str) -> None:
    """Its running statistics see the inputs one after the other."""
    ours = random_batch_norm(4, momentum=momentum).double()
    theirs = copy.deepcopy(ours)
    inputs = [torch.randn(3, 4, 5, 3, dtype=torch.float64) + k for k in range(3)]
    functional.weighted_fusion(inputs, torch.ones(3), batch_norms=[ours] * 3, impl=impl)
    for x in inputs:
        theirs(x)
    for (name, buffer), (_, other) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        torch.testing.assert_close(buffer, other, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_batch_norms_of_different_momentum_in_one_call(impl: str) -> None:
    momenta = [0.1, None, 0.7]
    ours = [random_batch_norm(4, momentum=momentum).double() for momentum in momenta]
    theirs = copy.deepcopy(ours)
    for step in range(2):
        inputs = [torch.randn(3, 4, 5, 3, dtype=torch.float64) + k + step for k in range(3)]
        functional.weighted_fusion(inputs, torch.ones(3), batch_norms=ours, impl=impl)
        for x, module in zip(inputs, theirs, strict=True):
            module(x)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(dict(mine.named_buffers()), dict(other.named_buffers()))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_half_precision_batch_norm(impl: str) -> None:
    """A module cast to bfloat16 as a whole: parameters and buffers keep that dtype."""
    ours = random_batch_norm(4).bfloat16()
    truth = copy.deepcopy(ours).double()
    x = torch.randn(3, 4, 5, 3).bfloat16()
    grad = torch.randn(3, 4, 5, 3).bfloat16()
    functional.weighted_fusion([x], weighting="sum", batch_norms=[ours], impl=impl).backward(grad)
    truth(x.double()).relu().backward(grad.double())
    for mine, other in zip([*ours.parameters(), *ours.buffers()], [*truth.parameters(), *truth.buffers()], strict=True):
        assert mine.dtype == (torch.bfloat16 if mine.dtype.is_floating_point else torch.int64)
        for value, wanted in ((mine, other), (mine.grad, other.grad)):
            if value is not None and wanted is not None:
                torch.testing.assert_close(value.double(), wanted.double(), rtol=2**-7, atol=2**-7)


class _Doubled(nn.BatchNorm2d):
    """Stands for SyncBatchNorm: a subclass whose result is its own affair."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return 2 * super().forward(x)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_subclasses_and_hooked_modules_run_as_they_are(impl: str) -> None:
    x = torch.randn(3, 4, 5, 3, dtype=torch.float64)
    hooks: dict[str, Callable[[nn.Module], Any]] = {
        "forward hook": lambda m: m.register_forward_hook(lambda module, args, out: 2 * out),
        "forward pre-hook": lambda m: m.register_forward_pre_hook(lambda module, args: (args[0].abs(),)),
        "backward hook": lambda m: m.register_full_backward_hook(lambda module, grads, outs: (3 * grads[0],)),
        "backward pre-hook": lambda m: m.register_full_backward_pre_hook(lambda module, outs: (3 * outs[0],)),
    }
    for name in ("subclass", "another module", *hooks):
        ours: nn.Module = random_batch_norm(4).double()
        if name == "subclass":
            ours = _Doubled(4).double()
        elif name == "another module":
            ours = nn.GroupNorm(2, 4).double()
        theirs = copy.deepcopy(ours)
        for module in (ours, theirs):
            hooks.get(name, lambda m: None)(module)
        leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        grad = torch.randn(3, 4, 5, 3, dtype=torch.float64)
        functional.weighted_fusion([leaf, x], torch.ones(2), batch_norms=[ours, None], impl=impl).backward(grad)
        share = 1 / (2 + 1e-6)
        (share * theirs(other).relu() + share * x.relu()).backward(grad)
        torch.testing.assert_close(leaf.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))
        torch.testing.assert_close([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])
        assert not isinstance(ours, _Doubled) or ours.calls == 1


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_one_value_per_channel_is_refused_in_training_only(impl: str) -> None:
    batch_norm = random_batch_norm(4)
    before = copy.deepcopy(batch_norm.state_dict())
    with pytest.raises(
        ValueError, match=r"training mode got an input of shape \(1, 4, 1, 1\).*more than one value"
    ) as caught:
        functional.weighted_fusion(
            [torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 1, 1)],
            torch.ones(2),
            resample=["none", "up"],
            batch_norms=[random_batch_norm(4), batch_norm],
            impl=impl,
        )
    assert str(caught.value).endswith(".")
    torch.testing.assert_close(dict(batch_norm.state_dict()), dict(before), rtol=0, atol=0)
    out = functional.weighted_fusion(
        [torch.zeros(1, 4, 1, 1)], weighting="sum", batch_norms=[batch_norm.eval()], impl=impl
    )
    torch.testing.assert_close(out, batch_norm(torch.zeros(1, 4, 1, 1)).relu())


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("shape", [(2, 3, 40, 40), (8, 65, 4, 4), (33, 5, 1, 3)], ids=str)
def test_statistics_of_a_large_mean(shape: tuple[int, ...], layout: str, impl: str) -> None:
    """Mean 1e4, deviation 1: a difference of squares would have lost the variance."""
    x = LAYOUTS[layout][0](1e4 + torch.randn(shape))
    ours = random_batch_norm(shape[1], momentum=1.0)
    grad = torch.randn(shape)

    def run(batch_norm: nn.BatchNorm2d, dtype: torch.dtype, impl: str | None) -> list[Tensor]:
        leaf = x.to(dtype).requires_grad_()
        if impl is None:
            out = batch_norm(leaf)
        else:
            out = functional.weighted_fusion([leaf], weighting="sum", pre="none", batch_norms=[batch_norm], impl=impl)
        return [out, *torch.autograd.grad(out, [leaf, batch_norm.weight, batch_norm.bias], grad.to(dtype))]

    plain, truth = copy.deepcopy(ours), copy.deepcopy(ours).double()
    found, others, wanted = run(ours, x.dtype, impl), run(plain, x.dtype, None), run(truth, torch.float64, None)
    for mine, other, true in zip(found, others, wanted, strict=True):
        # A float32 mean of 1e4 is known to half a step of 2**-10.
        assert largest_error(mine, true) <= max(largest_error(other, true), 2**-10 * float(true.detach().abs().max()))
    assert ours.running_var is not None and ours.running_mean is not None
    torch.testing.assert_close(ours.running_var.double(), truth.running_var, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.running_mean.double(), truth.running_mean, rtol=0, atol=2**-11 + 1e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_constant_channel(layout: str, impl: str) -> None:
    """Variance 0: the output is beta, and nothing is NaN."""
    x = torch.randn(2, 9, 5, 7)
    x[:, 3] = 123.456
    leaf = LAYOUTS[layout][0](x).requires_grad_()
    batch_norm = random_batch_norm(9, eps=1e-5)
    out = functional.weighted_fusion([leaf], weighting="sum", pre="none", batch_norms=[batch_norm], impl=impl)
    # Its mean may be off by a rounding step of 123.456, and that is divided by sqrt(1e-5).
    allowed = 1e-5 * 316 * float(batch_norm.weight[3].detach().abs()) + 1e-6
    assert largest_error(out[:, 3], batch_norm.bias[3].expand(2, 5, 7)) <= allowed
    out.backward(torch.randn_like(out))
    assert leaf.grad is not None and leaf.grad.isfinite().all()


# Limits


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_never_hidden(value: float, layout: str, impl: str) -> None:
    """NaN and infinity stand where the plain formula puts them, in the output and in the gradients."""
    shapes = MANY_RESAMPLES
    # silu at infinity is inf / inf or inf * 0 in PyTorch's formulas, for which an implementation may have the limit.
    names = ACTIVATIONS if value != value else ["none", "relu"]
    for place, pre in itertools.product(range(4), names):
        inputs = maps(shapes, 2, torch.float32, layout)
        inputs[place][1, 3, 0, 1] = value
        leaves = [x.clone().requires_grad_() for x in inputs]
        others = [x.clone().requires_grad_() for x in inputs]
        weight = torch.tensor([0.4, 0.3, 0.2, 0.5])
        out = functional.weighted_fusion(leaves, weight, resample=shapes.resample, pre=pre, epsilon=1e-3, impl=impl)
        normalised = formulas.fusion_weights(weight, "relu", 1e-3)
        wanted = formulas.weighted_fusion(others, normalised, shapes.resample, pre, shapes.size)
        grad = torch.randn(out.shape)
        label = (place, pre)
        torch.testing.assert_close(out, wanted, equal_nan=True, msg=lambda text, label=label: f"{label} {text}")
        out.backward(grad)
        wanted.backward(grad)
        for mine, other in zip(leaves, others, strict=True):
            assert mine.grad is not None and other.grad is not None
            torch.testing.assert_close(
                mine.grad, other.grad, equal_nan=True, msg=lambda text, label=label: f"{label} {text}"
            )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_fills_its_channel_through_batch_statistics(layout: str, impl: str) -> None:
    x = LAYOUTS[layout][0](torch.randn(2, 11, 5, 4))
    x[1, 7, 0, 1] = float("nan")
    leaf = x.clone().requires_grad_()
    batch_norm = random_batch_norm(11)
    out = functional.weighted_fusion([leaf], weighting="sum", batch_norms=[batch_norm], impl=impl)
    out.backward(torch.randn_like(out))
    others = [channel for channel in range(11) if channel != 7]
    for tensor in (out, leaf.grad):
        assert tensor is not None
        assert tensor[:, 7].isnan().all() and tensor[:, others].isfinite().all()
    for numbers in (batch_norm.running_mean, batch_norm.running_var, batch_norm.weight.grad):
        assert numbers is not None and numbers[7].isnan() and numbers[others].isfinite().all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("weighting", ["relu", "softmax"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 1])
def test_a_weight_that_is_not_finite_gives_nan(place: int, value: float, weighting: str, impl: str) -> None:
    for other in (-1.0, 1.0, float("inf")):
        weight = torch.tensor([other, other])
        weight[place] = value
        inputs = [torch.ones(1, 2, 2, 2)] * 2
        out = functional.weighted_fusion(inputs, weight, weighting=weighting, impl=impl)
        assert out.isnan().all(), other


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_variance_that_overflows_shows_in_the_running_one(impl: str) -> None:
    batch_norm = nn.BatchNorm2d(1)
    x = 1e21 * torch.tensor([-1.0, 0.5, 1.0, 2.0]).reshape(1, 1, 2, 2)
    out = functional.weighted_fusion([x], weighting="sum", pre="none", batch_norms=[batch_norm], impl=impl)
    exact = torch.batch_norm(x.double(), None, None, None, None, True, 0.0, 1e-5, False)
    assert batch_norm.running_var.isinf().all()
    assert torch.equal(out, torch.zeros_like(out)) or torch.allclose(out.double(), exact, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_silu_of_large_values(layout: str, dtype: torch.dtype, impl: str) -> None:
    """silu(v) tends to 0 on the left and to v on the right, and its slope to 0 and 1, as far as the dtype reaches."""
    values = torch.tensor([-1e38, -1e30, -1e20, -1e4, -200.0, -95.0, -88.0, -80.0, 80.0, 95.0, 200.0, 1e4, 1e30, 1e38])
    x = LAYOUTS[layout][0](values.view(1, 2, 1, 7).to(dtype)).requires_grad_()
    out = functional.weighted_fusion([x], weighting="sum", pre="silu", impl=impl)
    (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out))
    wanted = torch.where(x > 0, x, 0).double()
    torch.testing.assert_close(out.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-30)
    torch.testing.assert_close(gradient.double(), (wanted > 0).double(), rtol=torch.finfo(dtype).eps, atol=1e-30)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_softmax_of_large_weights(impl: str) -> None:
    inputs = [torch.full((1, 2, 2, 2), float(k + 1)) for k in range(3)]
    for shift in (-1e4, 0.0, 1e4, 3e38):
        weight = torch.tensor([0.0, 0.0, -1e4]) + shift
        out = functional.weighted_fusion(inputs, weight, weighting="softmax", impl=impl)
        wanted = 2.0 if shift == 3e38 else 1.5  # a difference of 1e4 is lost beside 3e38
        torch.testing.assert_close(out, torch.full_like(out, wanted))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("training", [None, False])
def test_empty_batch(training: bool | None, impl: str) -> None:
    """Nothing to compute, and gradients of 0 for what is shared by the samples."""
    shapes = MANY_RESAMPLES
    leaves = [torch.randn(0, 5, *size, requires_grad=True) for size in shapes.sizes]
    batch_norms = [None if training is None else random_batch_norm(5, training) for _ in leaves]
    weight = torch.rand(4, requires_grad=True)
    out = functional.weighted_fusion(leaves, weight, resample=shapes.resample, batch_norms=batch_norms, impl=impl)
    assert out.shape == (0, 5, *shapes.size)
    out.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.shape == leaf.shape for leaf in leaves)
    assert weight.grad is not None and torch.equal(weight.grad, torch.zeros(4))
    for batch_norm in batch_norms:
        for parameter in batch_norm.parameters() if batch_norm is not None else []:
            assert parameter.grad is not None and torch.equal(parameter.grad, torch.zeros(5))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(dtype: torch.dtype, layout: str) -> None:
    cases = [
        (MANY_RESAMPLES, 5),
        (Shapes(1100, ((2, 3), (1, 2)), ("none", "up"), (2, 3)), 1),
        (Shapes(6, ((20, 20), (40, 39)), ("none", "pool"), (20, 20)), 37),
    ]
    for (shapes, batch), normalised in itertools.product(cases, (False, True)):
        inputs = maps(shapes, batch, dtype, layout)
        grad = torch.randn(batch, shapes.channels, *shapes.size).to(dtype)
        batch_norms = [random_batch_norm(shapes.channels) if normalised else None for _ in inputs]

        def node(maps: list[Tensor], raw: Tensor, norms: list[Any], shapes: Shapes = shapes) -> Tensor:
            return functional.weighted_fusion(
                maps, raw, resample=shapes.resample, size=shapes.size, batch_norms=norms, impl="cpu"
            )

        found = []
        for threads in (1, 2, 3):
            with _threads(threads):
                found.append(collect(node, inputs, torch.rand(4)[: len(inputs)] * 0 + 0.5, batch_norms, grad, dtype))
        for name, value in found[0].items():
            assert all(torch.equal(value, other[name]) for other in found[1:]), name


# Autograd


class _Node(nn.Module):
    """A node whose parameters can be replaced by the arguments of gradcheck."""

    def __init__(self, shapes: Shapes, training: bool, impl: str, **options: Any) -> None:
        super().__init__()
        self.batch_norms = nn.ModuleList(
            random_batch_norm(shapes.channels, training, track_running_stats=not training) for _ in shapes.sizes
        )
        self.options = {**options, "resample": shapes.resample, "size": shapes.size, "impl": impl}

    def forward(self, inputs: Sequence[Tensor], weight: Tensor) -> Tensor:
        return functional.weighted_fusion(inputs, weight, batch_norms=list(self.batch_norms), **self.options)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("weighting", "pre"), [("relu", "relu"), ("softmax", "silu"), ("sum", "none")])
def test_gradcheck(weighting: str, pre: str, training: bool, impl: str) -> None:
    shapes = Shapes(1, ((3, 2), (2, 1), (5, 4)), ("none", "up", "pool"), (3, 2))
    node = _Node(shapes, training, impl, pre=pre, weighting=weighting).double()
    names = [name for name, _ in node.named_parameters()]
    inputs = [torch.randn(2, 1, *size, dtype=torch.float64, requires_grad=True) for size in shapes.sizes]
    weight = torch.tensor([0.4, 0.9, 0.6], dtype=torch.float64, requires_grad=True)
    parameters = [parameter.detach().clone().requires_grad_() for parameter in node.parameters()]

    def function(*tensors: Tensor) -> Tensor:
        replaced = dict(zip(names, tensors[4:], strict=True))
        result: Tensor = torch.func.functional_call(node, replaced, (list(tensors[:3]), tensors[3]))
        return result

    assert torch.autograd.gradcheck(function, [*inputs, weight, *parameters])


def test_double_backward_is_refused_and_the_reference_has_one() -> None:
    for batch_norm in (None, random_batch_norm(3).double()):
        x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
        out = functional.weighted_fusion([x], weighting="sum", pre="silu", batch_norms=[batch_norm], impl="cpu")
        (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.sum().backward()
        out = functional.weighted_fusion([x], weighting="sum", pre="silu", batch_norms=[batch_norm], impl="reference")
        (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        assert x.grad is not None and x.grad.abs().sum() > 0


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("training", [None, True, False], ids=["plain", "train", "eval"])
def test_any_subset_may_require_gradients(training: bool | None, impl: str) -> None:
    """What is asked for does not depend on what else is asked for."""
    shapes = Shapes(9, ((4, 6), (2, 3), (8, 11)), ("none", "up", "pool"), (4, 6))
    inputs = maps(shapes, 2, torch.float32, "channels_last")
    grad = torch.randn(2, 9, 4, 6)
    modules = [None if training is None else random_batch_norm(9, training) for _ in inputs]
    wanted: list[Tensor | None] = []
    for needs in [(True,) * 4, *itertools.product((False, True), repeat=4)]:
        leaves = [x.clone().requires_grad_(need) for x, need in zip(inputs, needs, strict=False)]
        weight = torch.tensor([0.5, 0.7, 0.2], requires_grad=needs[3])
        norms = copy.deepcopy(modules)
        for norm in norms:
            if norm is not None:
                norm.requires_grad_(all(needs))
        out = functional.weighted_fusion(leaves, weight, resample=shapes.resample, batch_norms=norms, impl=impl)
        assert out.requires_grad == any(needs)
        if not any(needs):
            continue
        out.backward(grad)
        found = [*(leaf.grad for leaf in leaves), weight.grad]
        if not wanted:
            wanted = found
        for need, gradient, other in zip(needs, found, wanted, strict=True):
            assert (gradient is not None) == need
            if gradient is not None and other is not None:
                assert torch.equal(gradient, other), needs


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_only_the_batch_norm_may_require_gradients(impl: str) -> None:
    """A frozen backbone: gamma and beta alone are trained; then neither, and there is no graph."""
    x = torch.randn(3, 4, 5, 3, dtype=torch.float64)
    grad = torch.randn(3, 4, 5, 3, dtype=torch.float64)
    ours = random_batch_norm(4).double()
    theirs = copy.deepcopy(ours)
    functional.weighted_fusion([x], weighting="sum", batch_norms=[ours], impl=impl).backward(grad)
    theirs(x).relu().backward(grad)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    ours.requires_grad_(False)
    assert not functional.weighted_fusion([x], weighting="sum", batch_norms=[ours], impl=impl).requires_grad


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_one_map_may_be_several_inputs(impl: str) -> None:
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    batch_norm = random_batch_norm(3, training=False).double()
    weight = torch.tensor([0.2, 0.5, 0.4], dtype=torch.float64)
    grad = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    out = functional.weighted_fusion([x, x, x], weight, batch_norms=[None, batch_norm, None], impl=impl)
    out.backward(grad)
    share = formulas.fusion_weights(weight, "relu", 1e-6)
    wanted = (share[0] + share[2]) * other.relu() + share[1] * batch_norm(other).relu()
    wanted.backward(grad)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(x.grad, other.grad)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_weights_of_another_dtype(weight_dtype: torch.dtype, dtype: torch.dtype, impl: str) -> None:
    """They are used as they are, in the accumulate dtype, and their gradient comes back in their own."""
    inputs = [torch.randn(2, 3, 4, 5).to(dtype) for _ in range(2)]
    weight = torch.tensor([0.5, 0.3]).to(weight_dtype).requires_grad_()
    strided = torch.stack([weight, weight], 1)[:, 0]  # not contiguous
    grad = torch.randn(2, 3, 4, 5).to(dtype)
    out = functional.weighted_fusion(inputs, strided, impl=impl)
    out.backward(grad)
    true_weight = weight.detach().double().requires_grad_()
    share = formulas.fusion_weights(true_weight, "relu", 1e-6)
    wanted = share[0] * inputs[0].double().relu() + share[1] * inputs[1].double().relu()
    wanted.backward(grad.double())
    assert out.dtype == dtype and weight.grad is not None and weight.grad.dtype == weight_dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), wanted, rtol=step, atol=step)
    step = max(torch.finfo(weight_dtype).eps, 16 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(weight.grad.double(), true_weight.grad, rtol=step, atol=step * 10)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_inputs_are_left_alone_and_backward_can_run_twice(impl: str) -> None:
    shapes = MANY_RESAMPLES
    leaves = [x.requires_grad_() for x in maps(shapes, 2, torch.float32, "channels_last")]
    weight = torch.rand(4, requires_grad=True)
    batch_norms = [random_batch_norm(5) for _ in leaves]
    parameters = [parameter for module in batch_norms for parameter in module.parameters()]
    tensors = [*leaves, weight, *parameters]
    grad = torch.randn(2, 5, 6, 9)
    before = [tensor.detach().clone() for tensor in [*tensors, grad]]
    out = functional.weighted_fusion(leaves, weight, resample=shapes.resample, batch_norms=batch_norms, impl=impl)
    first = torch.autograd.grad(out, tensors, grad, retain_graph=True)
    running = [buffer.clone() for module in batch_norms for buffer in module.buffers()]
    second = torch.autograd.grad(out, tensors, grad)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    for tensor, copied in zip([*tensors, grad], before, strict=True):
        assert torch.equal(tensor, copied)
    after = [buffer for module in batch_norms for buffer in module.buffers()]
    assert all(torch.equal(one, other) for one, other in zip(running, after, strict=True))


def test_the_kernels_save_nothing_but_the_inputs() -> None:
    shapes = NODES[2]
    leaves = [x.requires_grad_() for x in maps(shapes, 2, torch.float32, "channels_last")]
    batch_norms = [random_batch_norm(19) for _ in leaves]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        functional.weighted_fusion(
            leaves, torch.ones(3, requires_grad=True), resample=shapes.resample, batch_norms=batch_norms, impl="cpu"
        )
    saved_maps = [tensor for tensor in saved if tensor.dim() == 4]
    assert sorted(tensor.data_ptr() for tensor in saved_maps) == sorted(leaf.data_ptr() for leaf in leaves)
    assert sum(tensor.numel() for tensor in saved if tensor.dim() < 4) <= 3 * 5 * 19 + 3


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_autocast(impl: str) -> None:
    """Convolutions give bfloat16 maps; the node takes them with float32 weights and BatchNorm parameters."""
    convolution = nn.Conv2d(3, 4, 1, bias=False)
    batch_norm = random_batch_norm(4)
    weight = torch.tensor([0.6, 0.3], requires_grad=True)
    x = torch.randn(2, 3, 6, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = [convolution(x), convolution(-x)]
        out = functional.weighted_fusion(maps, weight, batch_norms=[batch_norm, None], impl=impl)
    assert maps[0].dtype == torch.bfloat16 and out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    share = formulas.fusion_weights(weight.detach().double(), "relu", 1e-6)
    true_norm = random_batch_norm(4).double()
    true_norm.load_state_dict(batch_norm.state_dict())
    values = [true_norm(maps[0].detach().double()), maps[1].detach().double()]
    wanted = formulas.weighted_fusion(values, share, ["none", "none"], "relu", (6, 5))
    torch.testing.assert_close(out.double(), wanted, rtol=2**-8, atol=2**-10)
    for parameter in (weight, convolution.weight, batch_norm.weight, batch_norm.bias):
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_grad_and_inference_mode(impl: str) -> None:
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    batch_norm = random_batch_norm(3)
    wanted = functional.weighted_fusion(
        [x], weighting="sum", batch_norms=[copy.deepcopy(batch_norm)], impl=impl
    ).detach()
    for context in (torch.no_grad(), torch.inference_mode()):
        module = copy.deepcopy(batch_norm)
        with context:
            out = functional.weighted_fusion([x], weighting="sum", batch_norms=[module], impl=impl)
        assert not out.requires_grad and torch.equal(out, wanted)
        assert int(module.num_batches_tracked) == 1  # type: ignore[arg-type]


# A convolution behind the node


class _Convolved:
    """A node and its depthwise 3x3 convolution: outputs, and gradients of inputs, both weights and BatchNorms."""

    def __init__(self, shapes: Shapes, pre: str, batch_norms: Sequence[nn.Module | None], impl: str) -> None:
        self.shapes, self.pre, self.batch_norms, self.impl = shapes, pre, batch_norms, impl

    def ours(self, leaves: list[Tensor], raw: Tensor, norms: list[Any]) -> Tensor:
        *maps, kernel = leaves
        folding = Folding(self.impl)
        found = [folding.fold(norm, x, "the norm", "the map") for norm, x in zip(norms, maps, strict=True)]
        positions = tuple(reference.RESAMPLES.index(name) for name in self.shapes.resample)
        settings = Settings(positions, ACTIVATIONS.index(self.pre), reference.WEIGHTINGS.index("relu"), 1e-3)
        normalisations = [normalisation for _, normalisation in found]
        out = fusion_ops.fuse(maps, normalisations, raw, settings, self.shapes.size, self.impl, kernel)
        folding.finish()
        return out

    def plain(self, leaves: list[Tensor], raw: Tensor, norms: list[Any]) -> Tensor:
        *maps, kernel = leaves
        values = [x if norm is None else norm(x).to(x.dtype) for x, norm in zip(maps, norms, strict=True)]
        weights = formulas.fusion_weights(raw, "relu", 1e-3)
        fused = formulas.weighted_fusion(values, weights, self.shapes.resample, self.pre, self.shapes.size)
        return F.conv2d(fused.to(kernel.dtype), kernel, padding=1, groups=kernel.shape[0])

    def compare(self, inputs: Sequence[Tensor], grad: Tensor | None = None) -> Results:
        dtype, channels = inputs[0].dtype, self.shapes.channels
        kernel = torch.randn(channels, 1, 3, 3).to(dtype)
        if grad is None:
            grad = torch.randn(inputs[0].shape[0], channels, *self.shapes.size).to(dtype)
        raw = torch.tensor(WEIGHTINGS[0][1][: len(inputs)], dtype=accumulate_dtype(dtype))
        got = collect(self.ours, [*inputs, kernel], raw, self.batch_norms, grad, dtype)
        copies, grad = [*(x.contiguous() for x in inputs), kernel], grad.contiguous()
        other = collect(self.plain, copies, raw, self.batch_norms, grad, dtype)
        truth = collect(self.plain, copies, raw, self.batch_norms, grad, torch.float64)
        largest = float(truth["out"].abs().max()) if grad.numel() else 0.0
        # What one pixel adds to a sum over the map at most; in half precision it comes from maps that are rounded.
        term = float((grad.abs().max() if grad.numel() else grad.sum()) * kernel.abs().sum((1, 2, 3)).max())
        half = dtype in (torch.bfloat16, torch.float16)
        step = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps if half else 1.0
        for name, value in got.items():
            if value.dtype.is_floating_point:
                wide = "input" in name or name == "out"
                # A weight's gradient is a small difference of sums over the map, of those values.
                terms = grad.shape[1:].numel() * largest if name == "gradient of the weight" else term
                assert_close(value, other[name], truth[name], f"{name} of {self.shapes}", 0.0 if wide else terms * step)
        return got


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "channel_slice", "mixed_last", "contiguous", "mixed"])
def test_depthwise_convolution_behind_the_node(layout: str, dtype: torch.dtype) -> None:
    """None, all or some of the inputs normalised; batches of one, a few and more than there are groups."""
    turns = itertools.cycle(
        itertools.product(("relu", "none", "silu"), (slice(0, 0), slice(0, 4), slice(1, 4, 2)), (3, 1))
    )
    for shapes, (pre, left_out, batch) in zip(NODES * 2, turns, strict=False):
        if batch * shapes.size[0] * shapes.size[1] == 1:
            continue
        batch_norms: list[nn.Module | None] = [random_batch_norm(shapes.channels) for _ in shapes.sizes]
        batch_norms[left_out] = [None] * len(batch_norms[left_out])
        inputs = maps(shapes, batch, dtype, layout)
        if any(norm is not None and x[:, 0].numel() < 2 for norm, x in zip(batch_norms, inputs, strict=True)):
            continue
        _Convolved(shapes, pre, batch_norms, "cpu").compare(inputs)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    ("shapes", "batch"),
    [
        (Shapes(1100, ((2, 3), (1, 2), (3, 5)), ("none", "up", "pool"), (2, 3)), 2),
        (Shapes(6, ((2, 2), (3, 3)), ("none", "pool"), (2, 2)), 37),
        (Shapes(40, ((3, 300), (2, 150)), ("none", "up"), (3, 300)), 1),
        (Shapes(9, ((1, 7),), ("none",), (1, 7)), 2),
        (Shapes(17, ((6, 1),), ("none",), (6, 1)), 2),
        (Shapes(12, ((16, 17),), ("none",), (16, 17)), 40),
    ],
    ids=["1100 channels", "37 samples", "wide", "one row", "one column", "40 large samples"],
)
def test_convolved_sizes_beyond_one_block(shapes: Shapes, batch: int) -> None:
    batch_norms = [random_batch_norm(shapes.channels) for _ in shapes.sizes]
    _Convolved(shapes, "relu", batch_norms, "cpu").compare(maps(shapes, batch, torch.float32, "channels_last"))


def test_the_cpu_kernel_convolves_channels_last_maps_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a pass of PyTorch's convolution, whatever the layout of the upstream gradient; other layouts take that pass."""

    def refuse(*args: Any) -> Tensor:
        raise AssertionError("PyTorch's convolution was called")

    monkeypatch.setattr(fusion_ops, "convolved", refuse)
    monkeypatch.setattr(fusion_ops, "convolution_backward", refuse)
    shapes = MANY_RESAMPLES
    for change in (contiguous, channels_last, strided, transposed):
        grad = change(torch.randn(2, shapes.channels, *shapes.size))
        node = _Convolved(shapes, "relu", [random_batch_norm(5), None, None, random_batch_norm(5)], "cpu")
        node.compare(maps(shapes, 2, torch.float32, "channels_last"), grad)
    with pytest.raises(AssertionError, match="PyTorch's convolution"):
        node.compare(maps(shapes, 2, torch.float32, "contiguous"))


def test_convolved_bits_do_not_depend_on_the_number_of_threads() -> None:
    shapes = Shapes(24, ((9, 8), (5, 4)), ("none", "up"), (9, 8))
    results = []
    for threads in (1, 2, 3, 7):
        torch.manual_seed(0)
        with _threads(threads):
            node = _Convolved(shapes, "relu", [random_batch_norm(24), random_batch_norm(24)], "cpu")
            results.append(node.compare(maps(shapes, 37, torch.float32, "channels_last")))
    for result in results[1:]:
        for name, value in result.items():
            assert torch.equal(value, results[0][name]), name


def test_convolution_of_an_empty_batch() -> None:
    shapes = Shapes(8, ((4, 4),), ("none",), (4, 4))
    got = _Convolved(shapes, "relu", [None], "cpu").compare(maps(shapes, 0, torch.float32, "channels_last"))
    assert got["gradient of input 1"].shape == (8, 1, 3, 3) and not got["gradient of input 1"].any()


# Registration


def _opcheck(name: str, *arguments: Any) -> None:
    """With NamedTuples in place of their fields, as the raw functions have them."""
    flat = [
        field for argument in arguments for field in (argument if isinstance(argument, Node | Settings) else [argument])
    ]
    torch.library.opcheck(getattr(torch.ops.frskd_fast, name).default, tuple(flat))


def test_operators_pass_opcheck() -> None:
    shapes = MANY_RESAMPLES
    positions = [reference.RESAMPLES.index(name) for name in shapes.resample]
    settings = Settings(positions, ACTIVATIONS.index("relu"), reference.WEIGHTINGS.index("relu"), 1e-6)
    inputs, grad = maps(shapes, 2, torch.float32, "mixed"), torch.randn(2, 5, *shapes.size)
    _opcheck("fusion_batch_statistics", inputs, [1e-5] * 4, "cpu")
    statistics = batch_statistics(inputs, [1e-5] * 4, "cpu")
    empty = torch.zeros(0)

    def node(given: list[Tensor], *normalised: int) -> Node:
        channels: list[list[Tensor]] = [[empty] * 4 for _ in range(3)]
        for place in normalised:
            channels[0][place], channels[1][place], channels[2][place] = statistics[place], torch.rand(5), torch.rand(5)
        return Node(given, *channels, torch.rand(4))

    plain, mixed = node(inputs), node(inputs, 0, 2)
    _opcheck("fusion_forward", mixed, settings, shapes.size, "cpu")
    _opcheck("fusion_backward", grad, plain, [empty] * 4, settings, [True] * 4, True, "cpu")
    _opcheck("fusion_backward_sums", grad, mixed, settings, "cpu")
    sums, _ = fusion_ops.backward_sums(grad, mixed, settings, "cpu")
    used = [sums[0], empty, empty, empty]
    _opcheck("fusion_backward", grad, mixed, used, settings, [False, True, True, False], False, "cpu")
    convolved, kernel = node([channels_last(x) for x in inputs], 0), torch.randn(5, 1, 3, 3)
    _opcheck("fused_convolution_forward", convolved, settings, shapes.size, kernel, "cpu")
    _opcheck("fused_convolution_backward_sums", channels_last(grad), convolved, settings, kernel, "cpu")


def test_fullgraph_compile_with_dynamic_batch() -> None:
    torch.compiler.reset()
    batch_norm = random_batch_norm(3)
    weight = torch.tensor([0.4, 0.8], requires_grad=True)

    def function(fine: Tensor, coarse: Tensor) -> Tensor:
        return functional.weighted_fusion(
            [fine, coarse], weight, resample=["none", "up"], batch_norms=[batch_norm, None], impl="cpu"
        )

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for batch in (3, 4):
        leaves = [torch.randn(batch, 3, 6, 5, requires_grad=True), torch.randn(batch, 3, 3, 3, requires_grad=True)]
        grad = torch.randn(batch, 3, 6, 5)
        state = copy.deepcopy(batch_norm.state_dict())
        tensors = [*leaves, weight, batch_norm.weight, batch_norm.bias]
        out = compiled(*leaves)
        gradients = torch.autograd.grad(out, tensors, grad)
        buffers = [buffer.clone() for buffer in batch_norm.buffers()]
        batch_norm.load_state_dict(state)
        wanted = function(*leaves)
        torch.testing.assert_close(out, wanted)
        torch.testing.assert_close(gradients, torch.autograd.grad(wanted, tensors, grad))
        torch.testing.assert_close(buffers, list(batch_norm.buffers()))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_last_impl_tells_which_ran(impl: str) -> None:
    x = torch.randn(2, 3, 4, 4)
    functional.weighted_fusion([x], weighting="sum", impl=impl)
    assert frskd_fast.last_impl()["fusion"] == impl
    with frskd_fast.use_impl(impl):
        functional.weighted_fusion([x], weighting="sum")
    assert frskd_fast.last_impl()["fusion"] == impl


@pytest.mark.parametrize("chosen", IMPLEMENTATIONS)
def test_auto_takes_what_the_table_says(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By form and layout of the node, with the bits of the implementation that it names; also in a traced graph."""
    torch.compiler.reset()
    order = () if chosen == "reference" else (chosen,)
    line = _dispatch.Line(order, layouts=("nchw",), forms=("pool", "batch-norm up"), evidence="nothing: a test")
    other = _dispatch.Line(("cpu",) if chosen == "reference" else (), evidence="nothing: a test")
    monkeypatch.setitem(_dispatch.TABLE, ("fusion", "cpu"), (line, other))
    left = "cpu" if chosen == "reference" else "reference"
    pooled = Shapes(8, ((4, 4), (7, 8)), ("none", "pool"), (4, 4))
    enlarged = Shapes(8, ((4, 4), (2, 2)), ("none", "up"), (4, 4))
    for shapes, normalised, layout, expected in [
        (pooled, False, "contiguous", chosen),
        (enlarged, True, "contiguous", chosen),
        (enlarged, False, "contiguous", left),
        (pooled, True, "contiguous", left),
        (pooled, False, "channels_last", left),
    ]:
        inputs, grad = maps(shapes, 3, torch.float32, layout), torch.randn(3, 8, *shapes.size)
        batch_norms = [random_batch_norm(8) if normalised else None for _ in inputs]

        def node(
            given: list[Tensor], raw: Tensor, norms: list[Any], impl: str = "auto", shapes: Shapes = shapes
        ) -> Tensor:
            return functional.weighted_fusion(given, raw, resample=shapes.resample, batch_norms=norms, impl=impl)

        case = (inputs, torch.tensor([0.4, 0.8]), batch_norms, grad, torch.float32)
        wanted, found = collect(partial(node, impl=expected), *case), collect(node, *case)
        assert frskd_fast.last_impl()["fusion"] == expected
        for name, value in wanted.items():
            assert torch.equal(value, found[name]), (name, expected)
        if expected == "reference":
            torch.testing.assert_close(collect(torch.compile(node, fullgraph=True), *case), wanted)


# Errors


def _zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **options)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("inputs", "weight", "options", "message"),
    [
        (_zeros(2, 3, 4, 4), torch.ones(1), {}, "inputs is a Tensor, but a list"),
        ("maps", torch.ones(1), {}, r"inputs\[0\] is a str"),
        (None, torch.ones(1), {}, "inputs is a NoneType"),
        ([], torch.ones(0), {}, "inputs has 0 maps, but 1 to 4"),
        ([_zeros(2, 3, 4, 4)] * 5, torch.ones(5), {}, "inputs has 5 maps, but 1 to 4"),
        ([None], torch.ones(1), {}, r"inputs\[0\] is a NoneType"),
        ([_zeros(2, 3, 4)], torch.ones(1), {}, r"inputs\[0\] has shape \(2, 3, 4\)"),
        ([_zeros(2, 0, 4, 4)], torch.ones(1), {}, r"inputs\[0\] has shape .*at least one channel"),
        ([_zeros(2, 3, 4, 0)], torch.ones(1), {}, r"inputs\[0\] has shape .*one pixel"),
        ([_zeros(2, 3, 4, 4).long()], torch.ones(1), {}, r"inputs\[0\] has dtype torch.int64"),
        ([_zeros(2, 3, 4, 4), _zeros(2, 3, 4, 4).half()], torch.ones(2), {}, r"inputs\[1\] has dtype torch.float16"),
        ([_zeros(2, 3, 4, 4), _zeros(2, 3, 4, 4, device="meta")], torch.ones(2), {}, r"inputs\[1\] is on meta"),
        ([_zeros(2, 3, 4, 4), _zeros(3, 3, 4, 4)], torch.ones(2), {}, r"inputs\[1\] has shape \(3, 3, 4, 4\)"),
        ([_zeros(2, 3, 4, 4), _zeros(2, 5, 4, 4)], torch.ones(2), {}, r"inputs\[1\] has shape .*1x1 convolution"),
        (
            [_zeros(2, 3, 4, 4), _zeros(2, 3, 2, 2)],
            torch.ones(2),
            {},
            r"inputs\[1\] has \(2, 2\) pixels.*resample\[1\]",
        ),
        (
            [_zeros(2, 3, 4, 4), _zeros(2, 3, 6, 8)],
            torch.ones(2),
            {"resample": ["none", "pool"]},
            r"inputs\[1\] has \(6, 8\) pixels, halved",
        ),
        (
            [_zeros(2, 3, 4, 4), _zeros(2, 3, 5, 4)],
            torch.ones(2),
            {"resample": ["none", "up"]},
            r"inputs\[1\] has \(5, 4\) pixels and is to be up-sampled",
        ),
        ([_zeros(2, 3, 4, 4)], torch.ones(1), {"resample": ["up"]}, r"every input is up-sampled.*pass size"),
        ([_zeros(2, 3, 4, 4)], torch.ones(1), {"resample": ["none", "up"]}, "resample has 2 entries"),
        ([_zeros(2, 3, 4, 4)], torch.ones(1), {"resample": ["half"]}, r"resample\[0\] is 'half'"),
        ([_zeros(2, 3, 4, 4)], torch.ones(1), {"resample": 3}, "resample is "),
        ([_zeros(2, 3, 4, 4)], torch.ones(1), {"size": (4,)}, r"size is \(4,\), but two positive integers"),
        ([_zeros(2, 3, 4, 4)], torch.ones(1), {"size": 4}, "size is 4"),
        ([_zeros(2, 3, 4, 4)], torch.ones(1), {"size": (4, 0)}, r"size is \(4, 0\)"),
        ([_zeros(2, 3, 4, 4)], torch.ones(1), {"size": (4.0, 4)}, r"size is \(4.0, 4\)"),
        ([_zeros(2, 3, 4, 4)], torch.ones(1), {"size": (4, 5)}, r"inputs\[0\] has \(4, 4\) pixels, unchanged"),
        ([_zeros(2, 3, 4, 4)], torch.ones(1), {"pre": "gelu"}, "pre is 'gelu'"),
        ([_zeros(2, 3, 4, 4)], torch.ones(1), {"pre": None}, "pre is None"),
        ([_zeros(2, 3, 4, 4)], torch.ones(1), {"weighting": "mean"}, "weighting is 'mean'"),
        ([_zeros(2, 3, 4, 4)], torch.ones(1), {"epsilon": -1e-6}, "epsilon is -1e-06, but 0 or more"),
        ([_zeros(2, 3, 4, 4)], torch.ones(1), {"epsilon": float("nan")}, "epsilon is nan"),
        ([_zeros(2, 3, 4, 4)], torch.ones(1), {"epsilon": "small"}, "epsilon is 'small'"),
        ([_zeros(2, 3, 4, 4)], None, {}, "weight is None, but 1 numbers"),
        ([_zeros(2, 3, 4, 4)], [1.0], {}, "weight is a list"),
        ([_zeros(2, 3, 4, 4)], torch.ones(1).long(), {}, "weight has dtype torch.int64"),
        ([_zeros(2, 3, 4, 4)], torch.ones(2), {}, r"weight has shape \(2,\), but \(1,\)"),
        ([_zeros(2, 3, 4, 4)], torch.ones(1, 1), {}, r"weight has shape \(1, 1\)"),
        ([_zeros(2, 3, 4, 4)], torch.ones(1, device="meta"), {}, "weight is on meta"),
        ([_zeros(2, 3, 4, 4)], torch.ones(1), {"batch_norms": []}, "batch_norms has 0 entries"),
        ([_zeros(2, 3, 4, 4)], torch.ones(1), {"batch_norms": nn.BatchNorm2d(3)}, "batch_norms is "),
        ([_zeros(2, 3, 4, 4)], torch.ones(1), {"batch_norms": [nn.BatchNorm2d(5)]}, r"batch_norms\[0\] has 5 channels"),
        ([_zeros(2, 3, 4, 4)], torch.ones(1), {"batch_norms": ["norm"]}, r"batch_norms\[0\] is "),
        (
            [_zeros(2, 3, 4, 4)],
            torch.ones(1),
            {"batch_norms": [nn.Conv2d(3, 5, 1)]},
            r"batch_norms\[0\] .*\(2, 5, 4, 4\)",
        ),
    ],
)
def test_bad_input_is_refused_in_a_sentence(
    inputs: Any, weight: Any, options: dict[str, Any], message: str, impl: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        functional.weighted_fusion(inputs, weight, impl=impl, **options)
    assert str(caught.value).endswith(".")


def test_unknown_and_missing_implementations() -> None:
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="impl is 'fast', but the known implementations are"):
        functional.weighted_fusion([x], weighting="sum", impl="fast")
    with pytest.raises(RuntimeError, match="impl='cuda' was asked for, but it computes on a CUDA device"):
        functional.weighted_fusion([x], weighting="sum", impl="cuda")
    with frskd_fast.use_impl("cuda"), pytest.raises(RuntimeError, match="impl='cuda' was asked for"):
        functional.weighted_fusion([x], weighting="sum")
