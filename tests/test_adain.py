"""AdaIN-KD: channel moments and their transfer, the stored losses, limits, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_utils import golden_settings, load_golden
from problems import Problem, problems
from problems.channel_moments import GRID
from torch import Tensor

from frskd_fast import functional
from frskd_fast.functional import adain, channel_moments
from frskd_fast.losses import AdaINLoss

IMPLS = ["reference", "cpu"]
CASES = {"adainkd_unbiased": True, "adainkd_biased": False}


def wave(shape: tuple[int, ...], slope: float, offset: float) -> Tensor:
    """sin(slope * i + offset) of the flat index i."""
    return torch.sin(slope * torch.arange(math.prod(shape), dtype=torch.float64) + offset).view(shape)


def style_transfer(content: Tensor, style: Tensor, unbiased: bool = True) -> Tensor:
    """Adaptive instance normalisation as style transfer writes it."""
    pixels, statistics = content.flatten(2), style.flatten(2)
    own_std, std = (part.var(2, unbiased=unbiased).add(1e-5).sqrt() for part in (pixels, statistics))
    normalised = (pixels - pixels.mean(2, keepdim=True)) / own_std.unsqueeze(2)
    return (normalised * std.unsqueeze(2) + statistics.mean(2, keepdim=True)).view(content.shape)


def moved(content: Tensor, style: Tensor, unbiased: bool = True, impl: str = "auto") -> Tensor:
    return adain(content, *channel_moments(style, unbiased=unbiased, impl=impl), unbiased=unbiased, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_numbers_of_the_table(impl: str) -> None:
    style, content = wave((2, 6, 4, 4), 0.37, 0.0), wave((2, 6, 4, 4), 0.23, 1.0)
    parts = AdaINLoss(1.0, 0.0, unbiased=False, impl=impl)(
        style[:, :, 0, 0], [style], [content], None, None, torch.tensor([1, 2]), return_parts=True
    )
    got = [parts.mean.item(), parts.std.item(), moved(content, style, False, impl).square().sum().item()]
    wanted = [0.13645312355283193, 0.027316151897013575, 95.97822379809936]
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)


def tails(golden: dict[str, Tensor]) -> list[Callable[[Tensor], Tensor]]:
    def last(feature: Tensor) -> Tensor:
        return F.linear(feature.mean((2, 3)), golden["tail.fc.weight"], golden["tail.fc.bias"])

    def first(feature: Tensor) -> Tensor:
        convolution = golden["tail.conv.weight"], golden["tail.conv.bias"]
        return last(F.relu(F.conv2d(F.relu(feature), *convolution, stride=2, padding=1)))

    return [first, last]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES)
def test_stored_losses_and_gradients(case: str, impl: str) -> None:
    golden, unbiased = load_golden(case), CASES[case]
    assert golden_settings(case)["unbiased"] is unbiased
    student = [golden[f"student_feat.{stage}"].requires_grad_() for stage in (0, 1)]
    teacher = [golden[f"teacher_feat.{stage}"] for stage in (0, 1)]
    logits = golden["student_logits"].requires_grad_()
    mixed = [moved(content, style, unbiased, impl) for content, style in zip(teacher, student, strict=True)]
    for stage, result in enumerate(mixed):
        torch.testing.assert_close(result, golden[f"adain.{stage}"], rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(result.mean((2, 3)), student[stage].mean((2, 3)), rtol=1e-11, atol=1e-13)
    transferred = [tail(result) for tail, result in zip(tails(golden), mixed, strict=True)]
    criterion = AdaINLoss(unbiased=unbiased, impl=impl)
    given = logits, student, teacher, transferred, golden["teacher_logits"], golden["targets"]
    parts = criterion(*given, return_parts=True)
    wanted = [golden["loss"], golden["ce"]]
    wanted += [
        torch.stack([golden[f"{term}.{stage}"] for stage in (0, 1)]) for term in ("mean_term", "std_term", "ada_term")
    ]
    torch.testing.assert_close(list(parts), wanted, rtol=1e-9, atol=0)
    gradients = torch.autograd.grad(parts.loss, [logits, *student], retain_graph=True)
    stored = [golden[f"grad.{name}"] for name in ("student_logits", "student_feat.0", "student_feat.1")]
    torch.testing.assert_close(list(gradients), stored, rtol=1e-9, atol=1e-13)
    # Moments that are known already take the place of maps.
    known = [
        [channel_moments(feature, unbiased=unbiased, impl=impl) for feature in maps] for maps in (student, teacher)
    ]
    torch.testing.assert_close(criterion(logits, *known, *given[3:]), golden["loss"], rtol=1e-9, atol=0)


@pytest.mark.parametrize("problem", problems("channel_moments"), ids=lambda problem: problem.name)
def test_problem(problem: Problem) -> None:
    """The kernels; plain PyTorch is what they are compared with."""
    problem.run("cpu", "cpu")


def test_moments_lie_in_memory_as_they_like() -> None:
    content = torch.randn(2, 3, 4, 5)
    numbers = [torch.rand(2, 3) + 0.5 for _ in range(4)]

    def gradients(turn: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        mean, std, own_mean, own_std = (turn(number).requires_grad_() for number in numbers)
        own = functional.ChannelMoments(own_mean, own_std)
        out = adain(content, mean, std, moments=own, impl="cpu")
        return torch.autograd.grad(out.square().sum(), (mean, std, own_mean, own_std))

    torch.testing.assert_close(gradients(lambda x: x.t().contiguous().t()), gradients(torch.clone))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(layout: torch.memory_format) -> None:
    style, content = (torch.randn(7, 130, 9, 9).to(memory_format=layout).requires_grad_() for _ in range(2))

    def results(threads: int) -> list[Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            out = moved(content, style, impl="cpu")
            return [out, *torch.autograd.grad(out.square().sum(), (content, style))]
        finally:
            torch.set_num_threads(before)

    for one, three in zip(results(1), results(3), strict=True):
        assert torch.equal(one, three)


def test_operators_pass_opcheck() -> None:
    x = torch.randn(2, 3, 4, 4)
    numbers = [torch.randn(2, 3) for _ in range(3)]
    operators = torch.ops.frskd_fast
    for operator, arguments in (
        (operators.channel_moments_forward, (x, None, None, 1e-5, True)),
        (operators.channel_moments_forward, (x, *numbers[:2], 1e-5, False)),
        (operators.channel_moments_affine, (x, *numbers)),
        (operators.channel_moments_sums, (x, x, numbers[0])),
    ):
        torch.library.opcheck(operator.default, (*arguments, "cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("problem", GRID, ids=lambda problem: problem.name)
def test_problems_on_a_device(problem: Problem) -> None:
    """Where the plain operations and the gradients of this operation run."""
    problem.run("auto", "cuda")


def test_written_gradients_are_those_of_the_function() -> None:
    style, content = (torch.randn(3, 2, *size, dtype=torch.float64, requires_grad=True) for size in ((3, 4), (2, 5)))
    for unbiased in (True, False):
        assert torch.autograd.gradcheck(lambda x, y, u=unbiased: moved(y, x, u), (style, content))
        torch.testing.assert_close(moved(content, style, unbiased), style_transfer(content, style, unbiased))
        second = lambda x, u=unbiased: sum(channel_moments(x, unbiased=u, impl="reference"))  # noqa: E731
        assert torch.autograd.gradgradcheck(second, (style,))
    total = moved(content, style).square().sum()
    (gradient,) = torch.autograd.grad(total, style, create_graph=True)
    with pytest.raises(RuntimeError, match="use impl='reference'"):
        gradient.sum().backward()


def test_limits() -> None:
    constant = torch.full((2, 3, 4, 4), 3e4, dtype=torch.float16, requires_grad=True)
    mean, std = channel_moments(constant)
    assert (mean == 3e4).all() and torch.allclose(std, torch.full_like(std, 1e-5).sqrt())
    (mean.sum() + std.sum()).backward()
    assert constant.grad.isfinite().all()
    # A mean a thousand deviations away keeps the deviation's digits.
    far = 1000.0 + torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(channel_moments(far.float()).std.double(), channel_moments(far).std, rtol=1e-4, atol=0)
    one_pixel = torch.randn(2, 3, 1, 1)
    biased = channel_moments(one_pixel, unbiased=False)
    assert torch.equal(biased.mean, one_pixel[:, :, 0, 0]) and torch.equal(biased.std, torch.full((2, 3), 1e-5).sqrt())
    empty = torch.randn(0, 3, 4, 4, requires_grad=True)
    moved(empty, empty).sum().backward()
    assert empty.grad.shape == empty.shape
    broken = torch.randn(2, 3, 4, 4)
    broken[0, 1, 2, 3] = math.nan
    assert channel_moments(broken).std.isnan().tolist() == [[False, True, False], [False] * 3]
    with torch.inference_mode():
        frozen = torch.randn(2, 3, 4, 4)
    style = torch.randn(2, 3, 4, 4, requires_grad=True)
    moved(frozen, style).sum().backward()
    torch.testing.assert_close(style.grad, torch.full_like(style, 1.0))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_deviation_that_overflows_is_not_hidden(impl: str) -> None:
    """Divided by an infinite one, a content would become the constant it is moved to."""
    content = 1e30 * torch.arange(8.0).reshape(1, 2, 2, 2)
    assert channel_moments(content, impl=impl).std.isinf().all()
    assert adain(content, torch.ones(1, 2), torch.ones(1, 2), impl=impl).isnan().all()


def outputs(stages: int = 2) -> dict[str, Any]:
    def maps(side: int) -> list[Tensor]:
        return [torch.randn(4, 3 + stage, side, side, dtype=torch.float64) for stage in range(stages)]

    return {
        "student_logits": torch.randn(4, 5, dtype=torch.float64, requires_grad=True),
        "connected_feats": [feature.requires_grad_() for feature in maps(4)],
        "teacher_feats": maps(5),
        "transferred_logits": [torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(stages)],
        "teacher_logits": torch.randn(4, 5, dtype=torch.float64),
        "targets": torch.randint(5, (4,)),
    }


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("judge", ["mse", "kl", "ce"])
def test_judges_and_weights(judge: str, impl: str) -> None:
    given = outputs()
    parts = AdaINLoss(0.5, 3.0, judge=judge, temperature=2.0, impl=impl)(**given, return_parts=True)
    heads, teacher, targets = given["transferred_logits"], given["teacher_logits"], given["targets"]
    ce = F.cross_entropy(given["student_logits"], targets)
    judged = {
        "mse": [F.mse_loss(head, teacher) for head in heads],
        "kl": [functional.kd_loss(head, teacher, 2.0) for head in heads],
        "ce": [F.cross_entropy(head, targets) for head in heads],
    }[judge]
    pairs = list(zip(given["connected_feats"], given["teacher_feats"], strict=True))
    means = [F.mse_loss(x.mean((2, 3)), y.mean((2, 3))) for x, y in pairs]
    stds = [F.mse_loss(channel_moments(x).std, channel_moments(y).std) for x, y in pairs]
    wanted = ce + 0.5 * sum(means + stds) + 3.0 * sum(judged)
    torch.testing.assert_close(parts.loss, wanted, rtol=1e-9, atol=0)
    torch.testing.assert_close(parts.transfer, torch.stack(judged).detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(parts.mean, torch.stack(means).detach(), rtol=1e-9, atol=0)
    inputs = [given["student_logits"], *given["connected_feats"], *heads]
    got = torch.autograd.grad(parts.loss, inputs)
    torch.testing.assert_close(got, torch.autograd.grad(wanted, inputs), rtol=1e-9, atol=1e-13)


def test_what_has_no_weight_is_not_computed() -> None:
    given = outputs()
    ce = F.cross_entropy(given["student_logits"], given["targets"])
    alone = AdaINLoss(0.0, 0.0)(given["student_logits"], None, None, None, None, given["targets"], return_parts=True)
    torch.testing.assert_close(alone.loss, ce)
    for settings, left_out, zero in (
        ({"transfer_weight": 0.0}, ("transferred_logits", "teacher_logits"), "transfer"),
        ({"statistics_weight": 0.0}, ("connected_feats", "teacher_feats"), "mean"),
        ({"statistics_weight": 0.0, "judge": "ce"}, ("connected_feats", "teacher_feats", "teacher_logits"), "std"),
    ):
        parts = AdaINLoss(**settings)(**{**given, **dict.fromkeys(left_out)}, return_parts=True)
        assert getattr(parts, zero).tolist() == [0.0, 0.0]
        whole = AdaINLoss(judge=settings.get("judge", "mse"))(**given, return_parts=True)
        weighted = sum(
            part.sum() for part in whole[1:] if settings.get("transfer_weight") != 0.0 or part is not whole[4]
        )
        if "statistics_weight" in settings:
            weighted = weighted - whole.mean.sum() - whole.std.sum()
        torch.testing.assert_close(parts.loss.detach(), weighted)


def test_one_graph_with_every_batch() -> None:
    criterion = AdaINLoss(judge="kl")
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    def step(style: Tensor, content: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        moments = criterion.moments(style)
        head = adain(content, *moments).mean((2, 3))
        return criterion(logits, [moments], [content], [head], logits.detach(), targets)

    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    for batch in (6, 7):  # no number of pixels, which would be taken for the same size
        inputs = [torch.randn(batch, 5, 3, 3, requires_grad=True), torch.randn(batch, 5, 4, 4)]
        logits, targets = torch.randn(batch, 5, requires_grad=True), torch.randint(5, (batch,))
        got, wanted = compiled(*inputs, logits, targets), step(*inputs, logits, targets)
        torch.testing.assert_close(got, wanted)
        gradients = [torch.autograd.grad(total, inputs[0])[0] for total in (got, wanted)]
        torch.testing.assert_close(*gradients)
    assert len(graphs) == 1


def test_inputs_that_do_not_fit_are_refused() -> None:
    given, loss = outputs(), AdaINLoss()
    x = torch.randn(2, 3, 4, 4)
    channels = torch.ones(2, 3)

    def changed(**other: Any) -> Callable[[], Any]:
        return lambda: loss(**{**given, **other})

    maps, heads = given["connected_feats"], given["transferred_logits"]
    cases: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: channel_moments(x[:, :, :1, :1]), ValueError, "x has shape .* unbiased=False"),
        (lambda: channel_moments(x[0]), ValueError, r"x has shape \(3, 4, 4\)"),
        (lambda: channel_moments(x.long()), TypeError, "x has dtype torch.int64"),
        (lambda: channel_moments(x, 0.0), ValueError, "eps is 0.0"),
        (lambda: adain(x[:, :, :1, :1], channels, channels), ValueError, "content has shape"),
        (lambda: adain(x, channels[:1], channels), ValueError, r"mean has shape \(1, 3\)"),
        (lambda: adain(x, channels, x), ValueError, "std has shape"),
        (lambda: adain(x, channels, channels.to("meta")), ValueError, "std is on meta"),
        (lambda: adain(x, channels, channels, moments=(x, x)), ValueError, "moments has shape"),
        (lambda: AdaINLoss(judge="l1"), ValueError, "judge is 'l1', but one of 'mse'"),
        (lambda: AdaINLoss(eps=-1.0), ValueError, "eps is -1.0"),
        (lambda: AdaINLoss(transfer_weight=math.nan), ValueError, "transfer_weight is nan"),
        (changed(student_logits=x), ValueError, "student_logits has shape"),
        (changed(connected_feats=None), TypeError, "connected_feats is a NoneType, but a list of maps"),
        (changed(connected_feats=maps[:1]), ValueError, "teacher_feats has 2 stages, but connected_feats has 1"),
        (changed(connected_feats=maps[::-1]), ValueError, r"connected_feats\[0\] is of .* \(4, 4\)"),
        (changed(connected_feats=[m[:3] for m in maps]), ValueError, r"connected_feats\[0\] is of 3 images"),
        (
            changed(connected_feats=[m.float() for m in maps]),
            TypeError,
            r"connected_feats\[0\] is on cpu and computed in",
        ),
        (
            changed(teacher_feats=[m[:, :, :1, :1] for m in maps]),
            ValueError,
            r"teacher_feats\[0\] has shape .* one pixel",
        ),
        (changed(transferred_logits=None), TypeError, "transferred_logits is a NoneType"),
        (changed(transferred_logits=[heads[0][:, :4]]), ValueError, r"transferred_logits\[0\] has shape \(4, 4\)"),
        (
            changed(transferred_logits=heads[:1]),
            ValueError,
            "transferred_logits has 1 stages, but connected_feats has 2",
        ),
        (
            changed(transferred_logits=heads * 2),
            ValueError,
            "transferred_logits has 4 stages, but connected_feats has 2",
        ),
        (changed(teacher_logits=None), TypeError, 'teacher_logits is None, but judge="mse"'),
        (changed(teacher_logits=heads[0][:, :4]), ValueError, "teacher_logits has shape"),
        (changed(targets=given["targets"] + 5), ValueError, "targets holds the label"),
    ]
    for call, error, sentence in cases:
        with pytest.raises(error, match=sentence):
            call()
