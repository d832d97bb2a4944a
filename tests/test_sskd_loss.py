"""SSKD's losses: the original's numbers, a transcription of its expression, its selection of rows, limits, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_utils import load_golden
from numerics import assert_close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from frskd_fast import _dispatch, functional
from frskd_fast.losses import SSKDHeadLoss, SSKDLoss
from frskd_fast.ops import logits as ops_logits
from frskd_fast.reference.ranking import rank_of, rank_of_labelled, row_weights

IMPLS = ["reference", "cpu"]
TERMS = ("ce", "kd", "transformed", "similarity")
WEIGHTS = {"ce_weight": 0.1, "kd_weight": 0.9, "transformed_weight": 2.7, "similarity_weight": 10.0}


def wave(shape: tuple[int, ...], slope: float, offset: float) -> Tensor:
    """sin(slope * i + offset) of the flat index i."""
    return torch.sin(slope * torch.arange(math.prod(shape), dtype=torch.float64) + offset).view(shape)


def outputs(images: int, classes: int, widths: tuple[int, int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Logits of student and teacher, then projections of student and teacher, of `images` images in four rotations."""
    shapes = [(4 * images, classes)] * 2 + [(4 * images, width) for width in widths]
    return [(2 * torch.randn(shape)).to(dtype).requires_grad_() for shape in shapes]


def original_similarity(projections: Tensor) -> Tensor:
    """The original's cosines (3N, N): both sides are expanded to (3N, D, N)."""
    rows = torch.arange(len(projections))
    upright, rotated = projections[rows % 4 == 0], projections[rows % 4 != 0]
    images = len(upright)
    upright = upright.unsqueeze(2).expand(-1, -1, 3 * images).transpose(0, 2)
    return F.cosine_similarity(rotated.unsqueeze(2).expand(-1, -1, images), upright, dim=1)


def original_kept(scores: Tensor, correct: Tensor, ratio: float) -> Tensor:
    """The rows that the original keeps, its sorts made stable."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    rank = (order == correct.unsqueeze(1)).nonzero()[:, 1]
    right = int((rank == 0).sum())
    wrong = len(rank) - right
    return rank.argsort(stable=True)[: right + int(wrong * ratio)]


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_student, p = F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
    return temperature**2 * F.kl_div(log_student, p, reduction="batchmean") if len(p) else student.sum() * 0.0


def original_sskd(loss: SSKDLoss, given: list[Tensor], targets: Tensor) -> dict[str, Tensor]:
    z_s, z_t, h_s, h_t = given
    z_t, h_t = z_t.detach(), h_t.detach()
    rows = torch.arange(len(z_s))
    upright, rotated = rows % 4 == 0, rows % 4 != 0
    images = torch.arange(len(targets)).repeat_interleave(3)
    kept = original_kept(z_t[rotated], targets.repeat_interleave(3), loss.transformed_ratio)
    s_s, s_t = original_similarity(h_s), original_similarity(h_t)
    kept_similar = original_kept(s_t, images, loss.similarity_ratio)
    terms = {
        "ce": F.cross_entropy(z_s[upright], targets),
        "kd": divergence(z_s[upright], z_t[upright], loss.kd_temperature),
        "transformed": divergence(z_s[rotated][kept], z_t[rotated][kept], loss.transformed_temperature),
        "similarity": divergence(s_s[kept_similar], s_t[kept_similar], loss.similarity_temperature),
    }
    total = sum(getattr(loss, f"{name}_weight") * term for name, term in terms.items())
    return {"loss": total, **terms}


def assert_same_as_original(loss: SSKDLoss, given: list[Tensor], targets: Tensor) -> None:
    parts = loss(*given, targets, return_parts=True)
    wanted = original_sskd(loss, given, targets)
    for name in TERMS:
        if getattr(loss, f"{name}_weight") == 0.0:
            wanted[name] = torch.zeros_like(wanted[name])
    assert list(parts._fields) == list(wanted)
    torch.testing.assert_close({**parts._asdict()}, {k: v.detach() for k, v in wanted.items()}, rtol=1e-9, atol=1e-12)
    assert [part.requires_grad for part in parts[1:]] == [False] * 4
    assert torch.equal(loss(*given, targets), parts.loss)
    if not parts.loss.requires_grad:
        return
    got, gradients = (
        torch.autograd.grad(total, given, retain_graph=True, allow_unused=True, materialize_grads=True)
        for total in (parts.loss, wanted["loss"])
    )
    torch.testing.assert_close(got, gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("impl", [*IMPLS, "triton"])
def test_the_numbers_of_the_original(impl: str) -> None:
    z_s, h_s = wave((16, 5), 0.37, 0.0).requires_grad_(), wave((16, 8), 0.31, 0.5).requires_grad_()
    z_t, h_t = wave((16, 5), 0.23, 1.0), wave((16, 8), 0.19, 0.2)
    targets = torch.tensor([0, 3, 1, 4])
    parts = SSKDLoss(impl=impl)(z_s, z_t, h_s, h_t, targets, return_parts=True)
    wanted = [
        2.352499444912832, 1.80391599512655, 0.058486072153358215, 0.10154772375983738, 0.18452915263105935,
    ]  # fmt: skip
    torch.testing.assert_close([part.item() for part in parts], wanted, rtol=1e-9, atol=0)
    norms = [gradient.norm().item() for gradient in torch.autograd.grad(parts.loss, (z_s, h_s))]
    torch.testing.assert_close(norms, [0.18161768898597472, 0.44447373367642473], rtol=1e-9, atol=0)
    every_row = SSKDLoss(impl=impl, similarity_ratio=1.0)(z_s, z_t, h_s, h_t, targets, return_parts=True)
    torch.testing.assert_close(
        [every_row.loss.item(), every_row.similarity.item()],
        [2.4618876655843596, 0.19546797469821212],
        rtol=1e-9,
        atol=0,
    )
    head = SSKDHeadLoss(impl=impl)(h_t)
    torch.testing.assert_close(head.item(), 1.4253838788405597, rtol=1e-9, atol=0)


def test_ranks_and_kept_rows_of_the_original() -> None:
    h_t, z_t = wave((16, 8), 0.19, 0.2), wave((16, 5), 0.23, 1.0)
    cosines = functional.pairwise_cosine(h_t, h_t[::4]).unflatten(0, (4, 4))[:, 1:]
    ranks = rank_of(cosines, torch.arange(4).unsqueeze(1).expand(-1, 3)).flatten()
    assert ranks.tolist() == [0, 3, 3, 1, 3, 2, 2, 3, 1, 3, 3, 0]
    kept = row_weights(ranks, 0.75, torch.float64)
    assert kept.nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 11]
    torch.testing.assert_close(kept.sum().item(), 1.0)
    classes = torch.tensor([0, 3, 1, 4]).unsqueeze(1).expand(-1, 3)
    ranks = rank_of(z_t.unflatten(0, (4, 4))[:, 1:], classes).flatten()
    assert ranks.tolist() == [0, 0, 2, 1, 3, 3, 3, 3, 2, 4, 0, 0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("case", "ratios"), [("sskd_default", (1.0, 0.75)), ("sskd_half", (0.5, 0.5))])
def test_stored_losses_and_gradients(case: str, ratios: tuple[float, float], impl: str) -> None:
    """Stored in float32: ours in that dtype is no further from float64 than the original's numbers."""
    golden = load_golden(case)
    loss = SSKDLoss(transformed_ratio=ratios[0], similarity_ratio=ratios[1], impl=impl)
    names = ("student_logits", "teacher_logits", "student_proj", "teacher_proj")

    def leaves(dtype: torch.dtype) -> list[Tensor]:
        return [golden[name].to(dtype, copy=True).requires_grad_() for name in names]

    given, exact = leaves(torch.float32), leaves(torch.float64)
    ours = loss(*given, golden["targets"], return_parts=True)
    truth = original_sskd(loss, exact, golden["targets"])
    for name, part, true in zip(("loss", "ce", "kd", "tf", "ss"), ours, truth.values(), strict=True):
        assert_close(part, golden[name].reshape(()), true, name)
    gradients = (torch.autograd.grad(total, side[::2]) for total, side in ((ours.loss, given), (truth["loss"], exact)))
    for name, gradient, true in zip(("student_logits", "student_proj"), *gradients, strict=True):
        assert_close(gradient, golden[f"grad.{name}"], true, name)


@pytest.mark.parametrize("impl", IMPLS)
def test_stored_loss_of_the_head(impl: str) -> None:
    golden = load_golden("sskd_head")
    projections = golden["proj"].clone().requires_grad_()
    parts = SSKDHeadLoss(impl=impl)(projections, return_parts=True)
    torch.testing.assert_close(parts.loss.detach(), golden["loss"], rtol=1e-9, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(parts.loss, projections)[0], golden["grad.proj"], rtol=1e-9, atol=1e-15
    )
    right = golden["similarity"].argmax(1) == golden["pretext_targets"]
    assert parts.accuracy.item() == pytest.approx(right.double().mean().item()) and not parts.accuracy.requires_grad


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.75, 1.0])
def test_every_ratio_temperature_and_weight(ratio: float, impl: str) -> None:
    targets = torch.tensor([4, 0, 2])
    for settings in (
        {"transformed_ratio": ratio},
        {
            "transformed_ratio": ratio,
            "kd_temperature": 2.0,
            "transformed_temperature": 1.5,
            "similarity_temperature": 3.0,
        },
        {"transformed_ratio": 0.25, "ce_weight": 0.0},
        {"transformed_ratio": 0.25, "kd_weight": 0.0},
        {"transformed_weight": 0.0},
        {"kd_weight": 0.0, "ce_weight": 0.0, "transformed_ratio": 0.25},
        {"similarity_weight": 0.0, "transformed_ratio": ratio, "kd_weight": 0.0, "transformed_temperature": 2.0},
        {name: 0.0 for name in WEIGHTS if name != "similarity_weight"},
        dict.fromkeys(WEIGHTS, 0.0),
    ):
        assert_same_as_original(SSKDLoss(similarity_ratio=ratio, impl=impl, **settings), outputs(3, 7, (6, 9)), targets)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_image_and_teachers_that_are_always_right_or_always_wrong(impl: str) -> None:
    loss = SSKDLoss(transformed_ratio=0.5, similarity_ratio=0.5, impl=impl)
    assert_same_as_original(loss, outputs(1, 7, (6, 9)), torch.tensor([2]))
    for towards in (1.0, -1.0):
        z_s, z_t, h_s, h_t = outputs(3, 7, (6, 9))
        targets = torch.tensor([4, 0, 2])
        with torch.no_grad():
            z_t += 100.0 * towards * F.one_hot(targets.repeat_interleave(4), 7)
            h_t[:, :3] += 100.0 * towards * torch.eye(3).repeat_interleave(4, 0)
            h_t[::4] *= towards
        assert_same_as_original(loss, [z_s, z_t, h_s, h_t], targets)
        teacher, correct = z_t.detach(), targets.repeat_interleave(4)
        ranks = rank_of(teacher, correct)
        assert (ranks == 0).all() if towards > 0 else (ranks > 0).all()
        none = functional.ranked_kd_loss(z_s, teacher, correct, 2.0, 0.0, impl=impl)
        if towards < 0:
            assert none == 0 and not torch.autograd.grad(none, z_s)[0].any()
        else:
            torch.testing.assert_close(none, functional.kd_loss(z_s, teacher, 2.0, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_any_strides(impl: str) -> None:
    loss, targets = SSKDLoss(transformed_ratio=0.5, impl=impl), torch.tensor([4, 0, 2])
    shapes = [(12, 7), (12, 7), (12, 6), (12, 9)]
    transposed = [torch.randn(columns, rows, dtype=torch.float64).t() for rows, columns in shapes]
    sliced = [torch.randn(2 * rows, columns + 3, dtype=torch.float64)[::2, 1:-2] for rows, columns in shapes]
    for given in (transposed, sliced):
        assert_same_as_original(loss, [tensor.requires_grad_() for tensor in given], targets)


def test_ties_go_to_the_first_as_in_a_stable_sort() -> None:
    scores = torch.randint(0, 3, (40, 6)).double()
    correct = torch.randint(0, 6, (40,))
    order = scores.argsort(dim=1, descending=True, stable=True)
    assert torch.equal(rank_of(scores, correct), (order == correct.unsqueeze(1)).nonzero()[:, 1])
    for ratio in (0.0, 0.3, 0.75, 1.0):
        kept = row_weights(rank_of(scores, correct), ratio, torch.float64).nonzero().flatten()
        assert torch.equal(kept, original_kept(scores, correct, ratio).sort()[0])
    assert rank_of_labelled(scores, torch.full((40,), -100)).tolist() == [6] * 40


def test_the_number_of_kept_rows_is_that_of_python() -> None:
    for rows in (1, 3, 48, 100, 150):
        for ratio in (0.01, 0.07, 0.1, 0.29, 0.3, 0.57, 0.58, 0.7, 0.75, 0.9, 0.99):
            for right in (0, rows // 3):
                ranks = torch.ones(rows, dtype=torch.int64)
                ranks[:right] = 0
                wanted = right + int((rows - right) * ratio)
                assert int((row_weights(ranks, ratio, torch.float32) > 0).sum()) == wanted, (rows, ratio, right)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_three_ways(dtype: torch.dtype, impl: str) -> None:
    for autocast in (False, True):
        given = outputs(5, 11, (32, 24), dtype)
        targets = torch.tensor([4, 0, 10, 7, 2])
        loss = SSKDLoss(transformed_ratio=0.5, impl=impl)
        plain, truth = (
            [x.detach().to(wide).requires_grad_() for x in given] for wide in (torch.float32, torch.float64)
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            total = loss(*given, targets)
        # Autograd's own products follow autocast where it is still on.
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and impl != "reference"):
            total.backward()
        assert total.dtype == torch.float32
        values = [original_sskd(loss, side, targets)["loss"] for side in (plain, truth)]
        for value in values:
            value.backward()
        assert_close(total, *values, "loss")
        for index in (0, 2):
            gradient, narrow, exact = given[index].grad, plain[index].grad, truth[index].grad
            assert gradient is not None and narrow is not None and exact is not None and gradient.dtype == dtype
            assert_close(gradient, narrow.to(dtype), exact, f"gradient {index}")
        assert given[1].grad is None and given[3].grad is None


def test_cosines_and_their_gradients() -> None:
    x, y = (torch.randn(rows, 5, dtype=torch.float64, requires_grad=True) for rows in (4, 3))
    for impl in IMPLS:
        cosines = functional.pairwise_cosine(x, y, impl=impl)
        torch.testing.assert_close(cosines, F.cosine_similarity(x.unsqueeze(1), y, dim=2), rtol=1e-12, atol=1e-14)
        # Also of vectors that are shorter than eps.
        for eps in (1e-8, 2.0, 100.0):
            assert torch.autograd.gradcheck(
                lambda x, y, e=eps, i=impl: functional.pairwise_cosine(x, y, e, impl=i), (x, y)
            )
    strided = torch.randn(5, 8, dtype=torch.float64).t()[::2]
    torch.testing.assert_close(functional.pairwise_cosine(strided, y), functional.pairwise_cosine(strided.clone(), y))
    gradient = torch.autograd.grad(functional.pairwise_cosine(x, y).sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()
    twice = torch.autograd.grad(functional.pairwise_cosine(x, y, impl="reference").sum(), x, create_graph=True)[0]
    twice.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_projections_of_zero_and_of_any_size(dtype: torch.dtype) -> None:
    for scale in (0.0, 1e-7, 1e3):
        results = []
        for impl in IMPLS:
            z_s, z_t, h_s, h_t = outputs(3, 7, (6, 9), dtype)
            torch.manual_seed(1)
            h_s, h_t = ((scale * torch.randn(12, 6)).to(dtype).requires_grad_() for _ in range(2))
            h_s.data[[0, 5]] = 0.0
            total = SSKDLoss(impl=impl, ce_weight=0.0, kd_weight=0.0, transformed_weight=0.0)(
                z_s, z_t, h_s, h_t, torch.tensor([4, 0, 2])
            )
            total.backward()
            assert total.isfinite() and h_s.grad is not None
            results.append((total.detach(), h_s.grad))
        tolerance = 1e-5 if dtype == torch.float32 else 1e-3
        largest = results[0][1].float().abs().max().item()
        torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance * min(largest, 6e4))


@pytest.mark.parametrize("impl", IMPLS)
def test_images_without_a_label(impl: str) -> None:
    given = outputs(3, 7, (6, 9))
    labelled = torch.tensor([4, 1, 2])
    for settings in ({}, {"kd_temperature": 2.0}, {"ignore_index": 1}, {"ignore_index": 255}):
        loss = SSKDLoss(impl=impl, **settings)
        targets = torch.tensor([4, loss.ignore_index, 2])
        parts, wanted = loss(*given, targets, return_parts=True), original_sskd(loss, given, labelled)
        ce = F.cross_entropy(given[0][::4], targets, ignore_index=loss.ignore_index)
        torch.testing.assert_close(parts.ce, ce.detach())
        rest = wanted["loss"] + loss.ce_weight * (ce - wanted["ce"])
        gradients = (torch.autograd.grad(total, given[::2], retain_graph=True) for total in (parts.loss, rest))
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
        # Where rotated rows are ranked by class, those of the image without a label come last.
        ranked = SSKDLoss(impl=impl, transformed_ratio=0.5, **settings)(*given, targets, return_parts=True)
        teacher = given[1].detach().clone()
        teacher[4:8, 1] = -1e9
        kept = original_kept(teacher[[1, 2, 3, 5, 6, 7, 9, 10, 11]], labelled.repeat_interleave(3), 0.5)
        rows = torch.tensor([1, 2, 3, 5, 6, 7, 9, 10, 11])[kept]
        torch.testing.assert_close(ranked.transformed, divergence(given[0][rows], given[1][rows], 4.0).detach())
        none = loss(*given, torch.full((3,), loss.ignore_index), return_parts=True)
        assert none.ce == 0 and none.loss.isfinite()


@pytest.mark.parametrize("impl", IMPLS)
def test_label_smoothing(impl: str) -> None:
    given, targets = outputs(3, 7, (6, 9)), torch.tensor([4, -100, 2])
    for temperature in (4.0, 2.0):
        loss = SSKDLoss(label_smoothing=0.2, kd_temperature=temperature, impl=impl)
        ce = loss(*given, targets, return_parts=True).ce
        torch.testing.assert_close(ce, F.cross_entropy(given[0][::4], targets, label_smoothing=0.2).detach())


@pytest.mark.parametrize("impl", IMPLS)
def test_no_images_and_no_terms(impl: str) -> None:
    targets = torch.tensor([4, 0, 2])
    nothing = SSKDLoss(0.0, 0.0, 0.0, 0.0, impl=impl)
    for loss, images in ((SSKDLoss(impl=impl), 0), (SSKDLoss(transformed_ratio=0.5, impl=impl), 0), (nothing, 3)):
        given = outputs(images, 7, (6, 9), torch.float16)
        parts = loss(*given, targets[:images], return_parts=True)
        assert (
            parts.loss.dtype == torch.float32 and not any(parts) and not any(part.requires_grad for part in parts[1:])
        )
        for gradient, leaf in zip(torch.autograd.grad(parts.loss, given[::2]), given[::2], strict=True):
            assert gradient.shape == leaf.shape and not gradient.any()
    projections = torch.randn(0, 6, requires_grad=True)
    parts = SSKDHeadLoss(impl=impl)(projections, return_parts=True)
    assert parts.loss == 0 and parts.accuracy == 0
    assert torch.autograd.grad(parts.loss, projections)[0].shape == (0, 6)
    # Without the term that compares them, projections need not be there.
    alone = SSKDLoss(similarity_weight=0.0, impl=impl)
    given = outputs(3, 7, (6, 9))
    assert torch.equal(alone(*given[:2], None, None, targets), alone(*given, targets))
    alone.ce_weight = alone.kd_weight = alone.transformed_weight = 0.0
    assert not torch.autograd.grad(alone(*given[:2], None, None, targets), given[0])[0].any()


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_what_has_ratio_one_or_weight_zero_is_not_computed() -> None:
    given, targets = outputs(3, 7, (6, 9)), torch.tensor([4, 0, 2])

    def names(**settings: Any) -> list[str]:
        with _Counter() as counter:
            SSKDLoss(**settings)(*given, targets).backward()
        return counter.names

    assert {"sort", "gather", "mm"} <= set(names())
    every_row = names(similarity_ratio=1.0)
    assert not {"sort", "gather", "gt"} & set(every_row) and "mm" in every_row
    assert not {"sort", "gather", "gt", "mm"} & set(names(similarity_weight=0.0))


def test_one_graph_for_every_batch() -> None:
    loss = SSKDLoss(transformed_ratio=0.5)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for images in (3, 5, 4):
            given, targets = outputs(images, 7, (6, 9)), torch.randint(0, 7, (images,))
            totals = [run(*given, targets) for run in (loss, compiled)]
            torch.testing.assert_close(totals[1], totals[0], rtol=1e-12, atol=0)
            gradients = [torch.autograd.grad(total, given[::2]) for total in totals]
            torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-14)
    head = torch.compile(SSKDHeadLoss(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        head(given[2], return_parts=True), SSKDHeadLoss()(given[2], return_parts=True), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("path", ["reference", "kernels"])
def test_no_number_is_read(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor on the device "meta" has none, and says so where one is asked for.

    The kernels themselves are replaced by the fakes that `torch.compile` traces.
    """
    if path == "kernels":
        monkeypatch.setattr(_dispatch, "choose", lambda *_, **__: "cuda")
        for name in ("forward", "backward", "combine"):
            monkeypatch.setattr(ops_logits, name, getattr(ops_logits, name).__wrapped__)
    given = [torch.empty(12, size, device="meta", requires_grad=True) for size in (7, 7, 6, 9)]
    targets, correct = (torch.zeros(rows, dtype=torch.int64, device="meta") for rows in (3, 12))
    SSKDLoss(transformed_ratio=0.5)(*given, targets, return_parts=True).loss.backward()
    SSKDHeadLoss()(given[2], return_parts=True).loss.backward()
    functional.ranked_kd_loss(*given[:2], correct, 2.0, 0.5).backward()
    with pytest.raises(RuntimeError):
        given[0].sum().item()


def test_invariants() -> None:
    z_s, z_t, h_s, h_t = outputs(4, 7, (6, 6))
    targets = torch.tensor([4, 0, 2, 2])
    loss = SSKDLoss(similarity_ratio=1.0)
    parts = loss(z_s, z_t, h_s, h_t, targets, return_parts=True)
    rotated = [i for i in range(16) if i % 4]
    torch.testing.assert_close(parts.transformed, functional.kd_loss(z_s[rotated], z_t[rotated], 4.0).detach())
    # Cosines know no lengths, and the divergence of equal ones is 0.
    scales = torch.rand(16, 1, dtype=torch.float64) + 0.1
    same = loss(z_s, z_t, scales * h_t.detach(), h_t, targets, return_parts=True)
    assert abs(same.similarity.item()) < 1e-14
    kd = SSKDLoss(ce_weight=0.0, transformed_ratio=0.5)(z_s, z_t, h_s, h_t, targets)
    gradient = torch.autograd.grad(kd, z_s)[0]
    torch.testing.assert_close(gradient.sum(1), torch.zeros(16, dtype=torch.float64), rtol=0, atol=1e-12)
    with torch.inference_mode():
        z_t, h_t = z_t * 1.0, h_t * 1.0
    frozen = loss(z_s, z_t, h_s, h_t, targets)
    torch.autograd.grad(frozen, (z_s, h_s))
    torch.testing.assert_close(frozen, parts.loss)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_is_seen_also_in_a_row_that_is_left_out(impl: str) -> None:
    given, targets = outputs(4, 7, (6, 9)), torch.tensor([4, 0, 2, 2])
    settings = {"transformed_ratio": 0.0, "similarity_ratio": 0.0, "impl": impl}
    with torch.no_grad():
        given[1][1::4].scatter_(1, targets.unsqueeze(1), -1e3)  # no class is right in the rows 4n + 1
        given[3][1::4] = -given[3][::4]  # and no image
        assert SSKDLoss(**settings)(*given, targets).isfinite()
        for index, name in ((0, "transformed"), (2, "similarity")):
            spoilt = [tensor.clone() for tensor in given]
            spoilt[index][1, 0] = math.nan
            assert getattr(SSKDLoss(**settings)(*spoilt, targets, return_parts=True), name).isnan()


@pytest.mark.parametrize("impl", IMPLS)
def test_cosines_of_vectors_whose_squares_are_no_numbers(impl: str) -> None:
    """Lengths beyond float32 count as infinite: the cosines are 0."""
    large = torch.full((8, 6), 1e20, dtype=torch.bfloat16, requires_grad=True)
    cosines = functional.pairwise_cosine(large, torch.ones_like(large), impl=impl)
    loss = SSKDHeadLoss(impl=impl)(large)
    assert not cosines.any() and loss.item() == pytest.approx(math.log(2))
    for total in (cosines.sum(), loss):
        assert not torch.autograd.grad(total, large)[0].any()


def test_a_row_that_is_left_out_may_be_infinite() -> None:
    teacher = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    student = torch.tensor([[2.0, 0.0, 0.0], [0.0, -math.inf, 2.0]], requires_grad=True)
    correct = torch.tensor([0, 0])
    total = functional.ranked_kd_loss(student, teacher, correct, 1.0, 0.5)
    torch.testing.assert_close(total, functional.kd_loss(student[:1], teacher[:1], 1.0))
    gradient = torch.autograd.grad(total, student)[0]
    assert not gradient[1].any() and gradient[0].any()


def test_inputs_that_do_not_fit_are_refused() -> None:
    loss, head = SSKDLoss(), SSKDHeadLoss()
    z_s, z_t, h_s, h_t = outputs(2, 7, (6, 9))
    targets = torch.tensor([3, 1])
    correct = torch.zeros(8, dtype=torch.int64)
    cosine, ranked = functional.pairwise_cosine, functional.ranked_kd_loss
    no_weights = {"ce_weight": 0.0, "kd_weight": 0.0, "similarity_weight": 0.0}
    ranking_alone = SSKDLoss(**no_weights, transformed_ratio=0.5)
    nothing = SSKDLoss(**no_weights, transformed_weight=0.0)
    cases: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (
            lambda: loss(z_s[:7], z_t[:7], h_s, h_t, targets),
            ValueError,
            "student_logits has shape .* four rows for each",
        ),
        (lambda: loss(z_s, z_t[:4], h_s, h_t, targets), ValueError, "teacher_logits has shape"),
        (lambda: loss(z_s, None, h_s, h_t, targets), TypeError, "teacher_logits is None"),
        (lambda: loss(z_s, z_t, h_s[:4], h_t, targets), ValueError, "student_projections has shape .* 8 rows"),
        (lambda: loss(z_s, z_t, h_s, h_t[:, 0], targets), ValueError, "teacher_projections has shape"),
        (lambda: loss(z_s, z_t, h_s, h_t.float(), targets), TypeError, "teacher_projections has dtype torch.float32"),
        (lambda: loss(z_s, z_t, h_s.to("meta"), h_t, targets), ValueError, "student_projections is on meta"),
        (lambda: loss(z_s, z_t, h_s, h_t, correct), ValueError, "targets has shape"),
        (lambda: loss(z_s, z_t, h_s, h_t, targets.double()), TypeError, "targets has dtype .* nor probabilities"),
        (lambda: loss(z_s, z_t, h_s, h_t, None), TypeError, "targets is a NoneType, but class indices"),
        (lambda: loss(z_s, z_t, h_s, h_t, (targets, targets, 0.5)), TypeError, "targets is a tuple, .* neither a mix"),
        (lambda: ranking_alone(z_s, z_t, h_s, h_t, targets + 7), ValueError, "targets holds the label 10"),
        (lambda: nothing(z_s, z_t, h_s, h_t, targets - 4), ValueError, "targets holds the label -1"),
        (lambda: loss(z_s, z_t, None, h_t, targets), TypeError, "student_projections is a NoneType"),
        (lambda: loss(z_s, z_t, h_s, None, targets), TypeError, "teacher_projections is a NoneType"),
        (lambda: loss(z_s, z_t, h_s, h_t, targets + 7), ValueError, "targets holds the label"),
        (lambda: head(h_s[:6]), ValueError, "projections has 6 rows, but four for each image"),
        (lambda: head([h_s]), TypeError, "projections is a list"),
        (lambda: cosine(h_s, h_t), ValueError, "vectors of equal length"),
        (lambda: cosine(h_s, h_s.float()), TypeError, "y has dtype"),
        (lambda: cosine(h_s, h_s, 0.0), ValueError, "eps is 0.0"),
        (lambda: ranked(z_s, z_t[:4], correct), ValueError, r"teacher_scores has shape \(4, 7\)"),
        (lambda: ranked(z_s, z_t.float(), correct), TypeError, "teacher_scores has dtype torch.float32"),
        (lambda: ranked(z_s, z_t, None), TypeError, "correct is a NoneType"),
        (lambda: ranked(z_s, z_t, correct[:4]), ValueError, "correct has shape"),
        (lambda: ranked(z_s, z_t, correct + 7), ValueError, "correct holds the label 7"),
        (lambda: ranked(z_s, z_t, correct, 4.0, 1.5), ValueError, "ratio is 1.5"),
        (lambda: ranked(z_s, z_t, correct, 0.0), ValueError, "temperature is 0.0"),
        (lambda: SSKDLoss(similarity_ratio=-0.1), ValueError, "similarity_ratio is -0.1"),
        (lambda: SSKDLoss(ce_weight=math.nan), ValueError, "ce_weight is nan"),
        (lambda: SSKDLoss(label_smoothing=1.5), ValueError, "label_smoothing is 1.5"),
        (lambda: SSKDLoss(ignore_index=0.5), ValueError, "ignore_index is 0.5"),
        (lambda: SSKDLoss(impl="fast"), ValueError, "impl"),
    ]
    for call, error, sentence in cases:
        with pytest.raises(error, match=sentence):
            call()
