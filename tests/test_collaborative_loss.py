"""CollaborativeTeachingLoss: the original's numbers, a transcription of its expressions, limits, refusals."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from formulas import attention_map
from golden_utils import golden_settings, load_golden
from numerics import assert_close
from torch import Tensor

from frskd_fast.losses import CollaborativeTeachingLoss

IMPLS = ["reference", "cpu"]
MAPS = ((4, 6, 5), (6, 3, 2), (8, 1, 3))  # channels and pixels of the student's; the expert has two channels more


def wave(shape: tuple[int, ...], slope: float, offset: float) -> Tensor:
    """sin(slope * i + offset) of the flat index i."""
    return torch.sin(slope * torch.arange(math.prod(shape), dtype=torch.float64) + offset).view(shape)


def outputs(batch: int = 4, classes: int = 7, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """What the loss takes, by the names of its arguments."""

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype).requires_grad_()

    return {
        "student_logits": drawn(batch, classes),
        "scratch_logits": drawn(batch, classes),
        "student_feats": [drawn(batch, *shape) for shape in MAPS],
        "scratch_feats": [drawn(batch, *shape) for shape in MAPS],
        "expert_feats": [drawn(batch, shape[0] + 2, *shape[1:]) for shape in MAPS],
        "targets": torch.randint(classes, (batch,)),
        "expert_logits": drawn(batch, classes),
    }


def converted(given: dict[str, Any], **to: Any) -> dict[str, Any]:
    """The same outputs as new leaves, those of floating point in another dtype or on another device."""

    def one(value: Tensor) -> Tensor:
        return value.detach().to(**to).requires_grad_() if value.is_floating_point() else value.to(to.get("device"))

    return {key: [one(x) for x in value] if isinstance(value, list) else one(value) for key, value in given.items()}


def leaves(given: dict[str, Any]) -> list[Tensor]:
    """Every tensor of `given` but the targets."""
    lists = (value if isinstance(value, list) else [value] for key, value in given.items() if key != "targets")
    return list(itertools.chain(*lists))


def original(loss: CollaborativeTeachingLoss, given: dict[str, Any]) -> Tensor:
    """The loss in the original's order, by its expressions."""
    student, scratch, expert = (given[f"{name}_logits"] for name in ("student", "scratch", "expert"))
    targets, total = given["targets"], student.new_zeros(())
    for name in ("student", "scratch") if loss.attention_on == "both" else (loss.attention_on,):
        for feature, of_expert in zip(given[f"{name}_feats"], given["expert_feats"], strict=True):
            total = total + loss.beta * (attention_map(feature) - attention_map(of_expert.detach())).pow(2).mean()
    if loss.gamma == 0:
        t, alpha = loss.temperature, loss.alpha
        divergence = F.kl_div(F.log_softmax(student / t, 1), F.softmax(expert.detach() / t, 1), reduction="none").mean()
        return total + divergence * (t * t * 2 * alpha) + F.cross_entropy(student, targets) * (1 - alpha)
    difference = scratch.detach() - student
    hint = (difference * difference).sum() / (loss.batch_size or len(student))
    return total + F.cross_entropy(scratch, targets) + F.cross_entropy(student, targets) + loss.gamma * hint


@pytest.mark.parametrize("impl", IMPLS)
def test_numbers_of_the_original_in_closed_form(impl: str) -> None:
    student, scratch = (wave((4, 10), *at).requires_grad_() for at in ((0.37, 0.0), (0.23, 1.0)))
    maps, expert_maps = [wave((2, 3, 4, 4), 0.37, 0.0)], [wave((2, 6, 4, 4), 0.23, 1.0)]
    targets = torch.tensor([1, 7, 0, 9])
    loss = CollaborativeTeachingLoss(impl=impl)
    # One batch serves logits and maps; those of the stored value have four rows and two.
    logits = CollaborativeTeachingLoss(beta=0.0, impl=impl)(
        student, scratch, None, None, None, targets, return_parts=True
    )
    attention = loss(student[:2], scratch[:2], maps, maps, expert_maps, targets[:2], return_parts=True).attention
    total = logits.loss + loss.beta * attention.sum()
    torch.testing.assert_close(total.item(), 23.083188822601507, rtol=1e-9, atol=0)
    torch.testing.assert_close(0.03 * logits.hint.item(), 0.29465173521132415, rtol=1e-9, atol=0)
    norms = [gradient.norm().item() for gradient in torch.autograd.grad(logits.loss, (student, scratch))]
    torch.testing.assert_close(norms, [0.4586236542351074, 0.4953134034775243], rtol=1e-9, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("attention_on", ["student", "scratch"])
def test_stored_losses_and_gradients(attention_on: str, impl: str) -> None:
    case = f"ctkd_loss_attention_on_{attention_on}"
    stored, settings = load_golden(case), golden_settings(case)
    loss = CollaborativeTeachingLoss(*(settings[name] for name in ("beta", "gamma", "attention_on")), impl=impl)

    def maps(name: str) -> list[Tensor]:
        return [stored[f"{name}_feat.{level}"].requires_grad_() for level in range(3)]

    logits = [stored[f"{name}_logits"].requires_grad_() for name in ("student", "scratch")]
    feats = [maps(name) for name in ("student", "scratch")]
    parts = loss(*logits, *feats, maps("expert"), stored["targets"], return_parts=True)
    wanted = [stored[name] for name in ("loss", "ce_student", "ce_scratch", "hint", "attention")]
    got = [parts.loss.detach(), parts.ce_student, parts.ce_scratch, loss.gamma * parts.hint, parts.attention]
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=0)
    given = [*logits, *feats[0], *feats[1]]
    gradients = torch.autograd.grad(parts.loss, given, allow_unused=True, materialize_grads=True)
    names = [f"{name}_logits" for name in ("student", "scratch")]
    names += [f"{name}_feat.{level}" for name in ("student", "scratch") for level in range(3)]
    for name, gradient in zip(names, gradients, strict=True):
        torch.testing.assert_close(gradient, stored[f"grad.{name}"], rtol=1e-9, atol=1e-15, msg=name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("attention_on", ["student", "scratch", "both"])
@pytest.mark.parametrize("gamma", [0.03, 0.0])
def test_value_and_gradients_of_every_setting(gamma: float, attention_on: str, impl: str) -> None:
    if gamma == 0.0 and attention_on != "student":
        return
    for settings in ({}, {"batch_size": 9}, {"beta": 0.0}, {"beta": -3.0, "alpha": 0.4, "temperature": 2.0}):
        loss = CollaborativeTeachingLoss(**{"gamma": gamma, "attention_on": attention_on, "impl": impl, **settings})
        given = outputs()
        parts, wanted = loss(**given, return_parts=True), original(loss, given)
        torch.testing.assert_close(parts.loss, wanted, rtol=1e-9, atol=0)
        assert torch.equal(loss(**given), parts.loss) and not any(part.requires_grad for part in parts[1:])
        assert parts.attention.shape == ((0,) if loss.beta == 0.0 else (3,))
        sums = parts.ce_student, parts.ce_scratch, parts.hint, parts.attention.sum()
        if gamma == 0.0:
            assert parts.ce_scratch == parts.hint == 0.0 and parts.kd > 0.0
            weights = 1 - loss.alpha, 0.0, 0.0, loss.beta
            again = sum(weight * term for weight, term in zip(weights, sums, strict=True))
            again = again + 2 * loss.alpha * parts.kd / 7
        else:
            again = sum(weight * term for weight, term in zip((1.0, 1.0, gamma, loss.beta), sums, strict=True))
            assert parts.kd == 0.0
        torch.testing.assert_close(again, parts.loss.detach(), rtol=1e-9, atol=0)
        pairs = [
            torch.autograd.grad(total, leaves(given), allow_unused=True, materialize_grads=True)
            for total in (2.5 * parts.loss, 2.5 * wanted)
        ]
        torch.testing.assert_close(*pairs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_who_learns_from_whom(impl: str) -> None:
    given = outputs()
    loss = CollaborativeTeachingLoss(impl=impl)
    loss(**given).backward()
    for name in ("scratch_feats", "expert_feats"):
        assert all(feature.grad is None for feature in given[name])
    assert given["expert_logits"].grad is None
    scratch = given["scratch_logits"]
    assert scratch.grad is not None
    own = torch.autograd.grad(F.cross_entropy(scratch, given["targets"]), scratch)[0]
    torch.testing.assert_close(scratch.grad, own, rtol=1e-9, atol=1e-15)  # the hint does not reach it
    same = {**given, "student_feats": [2.0 * feature for feature in given["expert_feats"]]}
    same["student_logits"] = scratch
    parts = loss(**same, return_parts=True)
    assert parts.hint == 0.0 and parts.attention.abs().max() < 1e-20


@pytest.mark.parametrize("impl", IMPLS)
def test_labels_of_every_kind(impl: str) -> None:
    given, loss = outputs(), CollaborativeTeachingLoss(impl=impl)
    first, second = given["targets"], torch.tensor([1, 2, 3, 4])
    wanted = 0.3 * loss(**given) + 0.7 * loss(**{**given, "targets": second})
    shares = 0.3 * F.one_hot(first, 7) + 0.7 * F.one_hot(second, 7)
    for targets in ((first, second, 0.3), (first, second, torch.tensor(0.3)), shares.double()):
        torch.testing.assert_close(loss(**{**given, "targets": targets}), wanted, rtol=1e-6, atol=0)
    ignored = torch.tensor([-100, 2, -100, 4])
    parts = loss(**{**given, "targets": ignored}, return_parts=True)
    for name in ("student", "scratch"):
        ce = F.cross_entropy(given[f"{name}_logits"], ignored)
        torch.testing.assert_close(getattr(parts, f"ce_{name}"), ce.detach())
    none = loss(**{**given, "targets": torch.full((4,), -100)}, return_parts=True)
    assert none.ce_student == none.ce_scratch == 0.0 and none.loss.isfinite()
    smoothed = CollaborativeTeachingLoss(label_smoothing=0.1, impl=impl)(**given, return_parts=True)
    ce = F.cross_entropy(given["student_logits"], first, label_smoothing=0.1)
    torch.testing.assert_close(smoothed.ce_student, ce.detach())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_three_ways(dtype: torch.dtype, impl: str) -> None:
    for settings in ({"attention_on": "both"}, {"gamma": 0.0}):
        loss = CollaborativeTeachingLoss(impl=impl, **settings)
        sides = [outputs(6, 11, dtype)]
        for wide in (torch.float32, torch.float64):
            sides.append(converted(sides[0], dtype=wide))
        total = loss(**sides[0])
        values = [original(loss, side) for side in sides[1:]]
        for value in (total, *values):
            value.backward()
        assert total.dtype == torch.float32
        assert_close(total, *values, "loss")
        for index, (ours, plain, truth) in enumerate(zip(*map(leaves, sides), strict=True)):
            assert (ours.grad is None) == (truth.grad is None), index
            if ours.grad is not None:
                assert ours.grad.dtype == dtype
                assert_close(ours.grad, plain.grad.to(dtype), truth.grad, f"gradient {index}")


@pytest.mark.parametrize("impl", IMPLS)
def test_large_half_precision_logits_and_an_empty_batch(impl: str) -> None:
    loss = CollaborativeTeachingLoss(impl=impl)
    given = outputs(dtype=torch.float16)
    with torch.no_grad():
        given["student_logits"].mul_(1e4)
        given["scratch_logits"].mul_(-1e4)
    total = loss(**given)
    assert total.isfinite() and total > 1e5  # the square of a difference is beyond float16
    total.backward()
    assert given["student_logits"].grad.isfinite().all()
    empty = outputs(0)
    total = loss(**empty)
    total.backward()
    assert total == 0.0 and empty["student_logits"].grad.shape == (0, 7)


def test_maps_of_another_size_are_pooled_where_asked() -> None:
    given = outputs()
    given["expert_feats"] = [torch.randn(4, 3, 2 * size[1], 2 * size[2], dtype=torch.float64) for size in MAPS]
    pooled = {**given, "expert_feats": [F.avg_pool2d(feature, 2) for feature in given["expert_feats"]]}
    for attention_on in ("scratch", "both"):
        settings: dict[str, Any] = {"attention_on": attention_on}
        got = CollaborativeTeachingLoss(**settings, resize="pool")(**given)
        torch.testing.assert_close(got, CollaborativeTeachingLoss(**settings)(**pooled), rtol=1e-12, atol=0)


@pytest.mark.parametrize("gamma", [0.03, 0.0])
def test_one_graph_for_every_batch(gamma: float) -> None:
    loss = CollaborativeTeachingLoss(gamma=gamma)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (12, 13):  # no other size, which dynamo would take for the same symbol
            given = outputs(batch)
            totals = [run(**given) for run in (loss, compiled)]
            torch.testing.assert_close(totals[1], totals[0], rtol=1e-12, atol=0)
            gradients = [torch.autograd.grad(total, leaves(given), allow_unused=True) for total in totals]
            torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-14)


def test_no_number_is_read() -> None:
    """A tensor on the device "meta" has none, and says so where one is asked for."""
    for settings in ({"attention_on": "both"}, {"gamma": 0.0}):
        given = converted(outputs(), device="meta")
        CollaborativeTeachingLoss(**settings)(**given, return_parts=True).loss.backward()


@pytest.mark.parametrize(
    ("changed", "error", "sentence"),
    [
        ({"scratch_logits": None}, TypeError, "scratch_logits is None"),
        (
            {"scratch_logits": torch.zeros(4, 6, dtype=torch.float64)},
            ValueError,
            r"scratch_logits has shape \(4, 6\), but student_logits has \(4, 7\).*the same classes",
        ),
        ({"scratch_logits": torch.zeros(4, 7)}, TypeError, "scratch_logits has dtype torch.float32"),
        ({"student_logits": [0.0]}, TypeError, "student_logits is a list"),
        ({"targets": None}, TypeError, "targets is None"),
        ({"targets": torch.tensor([0, 1, 2, 7])}, ValueError, "targets holds the label 7"),
        ({"targets": torch.tensor([0, 1, 2])}, ValueError, "targets has shape"),
        (
            {"expert_feats": outputs()["expert_feats"][:2]},
            ValueError,
            "expert_feats has 2 levels, but student_feats has 3",
        ),
        ({"expert_feats": None}, TypeError, "expert_feats is a NoneType"),
        ({"expert_feats": outputs()["expert_feats"][::-1]}, ValueError, r"expert_feats\[0\] has maps of"),
        ({"student_feats": []}, ValueError, "student_feats"),
        (
            {name: outputs(5)[name] for name in ("student_feats", "expert_feats")},
            ValueError,
            r"student_feats\[0\] has batch size 5, but student_logits has 4",
        ),
        (
            {name: [f.detach().float() for f in outputs()[name]] for name in ("student_feats", "expert_feats")},
            TypeError,
            "either both or neither in float64",
        ),
    ],
)
def test_outputs_that_do_not_fit_are_refused(changed: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        CollaborativeTeachingLoss()(**{**outputs(), **changed})


def test_settings_that_do_not_fit_are_refused() -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"beta": math.inf}, ValueError, "beta is inf"),
        ({"gamma": "much"}, TypeError, "gamma is 'much'"),
        ({"attention_on": "teacher"}, ValueError, "attention_on is 'teacher', but 'student', 'scratch', 'both'"),
        ({"attention_on": "both", "gamma": 0.0}, ValueError, "gamma is 0.*attention_on is 'both'"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"batch_size": 2.5}, TypeError, "batch_size must be an integer"),
        ({"resize": "crop"}, ValueError, "resize is 'crop'"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0"),
        ({"impl": "fast"}, ValueError, "impl"),
    ]
    for settings, error, sentence in cases:
        with pytest.raises(error, match=sentence):
            CollaborativeTeachingLoss(**settings)
    given = {**outputs(), "expert_logits": None}
    with pytest.raises(TypeError, match="expert_logits is None, but gamma is 0 and alpha"):
        CollaborativeTeachingLoss(gamma=0.0)(**given)
    CollaborativeTeachingLoss(gamma=0.0, alpha=0.0)(**given).backward()
