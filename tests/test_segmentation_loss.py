"""FRSKD's segmentation loss: the original's numbers, the formula, terms of weight 0, dtypes, compile, limits, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_utils import golden_settings, load_golden
from numerics import assert_close
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import frskd_fast
from frskd_fast.losses import SegmentationLoss
from frskd_fast.ops import attention, logit_maps

IMPLEMENTATIONS = ["reference", "cpu"]
EXACT = {"rtol": 1e-9, "atol": 1e-13}
CLASSES = 5
LEVELS = ((6, 7, 9), (4, 4, 5), (3, 2, 3), (3, 1, 2), (2, 1, 1), (2, 1, 1))  # channels, height, width of P2 to P7


def plain_parts(
    maps: list[Tensor],
    feats: list[list[Tensor]],
    targets: Tensor,
    ramp: float = 1.0,
    alpha: float = 1.0,
    beta: float = 50.0,
    temperature: float = 1.0,
    **settings: Any,
) -> tuple[Tensor, ...]:
    """The original's expressions: both maps at the labels' size, then the losses."""
    wide = [F.interpolate(one, size=targets.shape[1:], mode="bilinear", align_corners=False) for one in maps]
    ce = [F.cross_entropy(one, targets, ignore_index=255, **settings) for one in wide]
    log_p, q = F.log_softmax(wide[0] / temperature, 1), F.softmax(wide[1].detach() / temperature, 1)
    kd = temperature**2 * F.kl_div(log_p, q, reduction="sum") / max(targets.numel(), 1)
    transfer = wide[0].new_zeros(())
    for student, teacher in zip(*feats, strict=True):
        p, q = (F.normalize(one.pow(2).mean(1).flatten(1)) for one in (student, teacher.detach()))
        transfer = transfer + (p - q).pow(2).mean()
    return ce[0] + ce[1] + ramp * (alpha * kd + beta * transfer), ce[0], ce[1], kd, transfer


def inputs(batch: int = 2, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[list[Tensor]], Tensor]:
    """Maps of both networks, their feature maps, and labels about three times as large, some of them ignored."""
    maps = [(2 * torch.randn(batch, CLASSES, *LEVELS[0][1:])).to(dtype).requires_grad_() for _ in range(2)]
    feats = [[torch.randn(batch, *shape).to(dtype).requires_grad_() for shape in LEVELS] for _ in range(2)]
    targets = torch.randint(CLASSES, (batch, 22, 25)).masked_fill(torch.rand(batch, 22, 25) < 0.2, 255)
    return maps, feats, targets


def gradients(loss: Tensor, maps: list[Tensor], feats: list[list[Tensor]]) -> list[Tensor]:
    """Of both maps and the student's feature maps; the self-teacher's get none."""
    found = torch.autograd.grad(loss, [*maps, *feats[0], *feats[1]], allow_unused=True)
    assert found[-len(feats[1]) :] == (None,) * len(feats[1])
    return list(found[: -len(feats[1])])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", ["seg_kd_T1", "seg_kd_T4"])
def test_golden_divergence(case: str, impl: str) -> None:
    """Maps that are as large as the labels; stored in float32."""
    stored, temperature = load_golden(case), golden_settings(case)["temperature"]
    criterion = SegmentationLoss(1.0, 0.0, temperature, impl=impl)
    student, teacher = (stored[f"{side}_logits"].double().requires_grad_() for side in ("student", "teacher"))
    ignored = torch.full((student.shape[0], *student.shape[2:]), 255)
    parts = criterion(student, teacher, [], [], ignored, return_parts=True)
    assert parts.ce_student == parts.ce_teacher == 0 and parts.loss == parts.kd
    truth = plain_parts([student, teacher], [[], []], ignored, temperature=temperature)[3]
    torch.testing.assert_close(parts.kd, truth.detach(), **EXACT)
    torch.testing.assert_close(parts.kd.float(), stored["loss"], rtol=1e-6, atol=0)
    gradient, to_teacher = torch.autograd.grad(parts.loss, [student, teacher])
    torch.testing.assert_close(gradient, torch.autograd.grad(truth, student)[0], **EXACT)
    torch.testing.assert_close(gradient.float(), stored["grad.student_logits"], rtol=1e-5, atol=1e-9)
    assert not to_teacher.any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_loss(impl: str, dtype: torch.dtype) -> None:
    """Stored in float32: ours in float64 is that close to it, ours in float32 no further from float64 than the original."""
    stored, settings = load_golden("seg_total_loss"), golden_settings("seg_total_loss")
    names = ("student_logits", "teacher_logits")
    chosen = {name: settings[name] for name in ("alpha", "temperature")}
    criterion = SegmentationLoss(beta=0.0, ignore_index=settings["ignore_index"], impl=impl, **chosen)
    targets = stored["targets"]

    def run(function: Callable[[list[Tensor]], tuple[Tensor, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
        maps = [stored[name].to(dtype, copy=True).requires_grad_() for name in names]
        parts = function(maps)
        found = dict(zip((f"grad.{name}" for name in names), torch.autograd.grad(parts[0], maps), strict=True))
        return {"loss": parts[0].detach(), "kd": parts[3].detach(), **found}

    ours = run(lambda maps: criterion(*maps, [], [], targets, return_parts=True), dtype)
    truth = run(lambda maps: plain_parts(maps, [[], []], targets, **chosen), torch.float64)
    for name, value in ours.items():
        assert_close(value, stored[name], truth[name], name)
    if dtype == torch.float64:
        torch.testing.assert_close(ours, truth, **EXACT)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradients_are_those_of_the_formula(weighted: bool, impl: str) -> None:
    maps, feats, targets = inputs()
    weights = torch.rand(CLASSES, dtype=torch.float64)
    smoothing: dict[str, Any] = {"label_smoothing": 0.1} if weighted else {}
    plain = {**smoothing, "weight": weights} if weighted else {}
    criterion = SegmentationLoss(0.7, 30.0, 2.0, class_weights=weights if weighted else None, impl=impl, **smoothing)
    wanted = plain_parts(maps, feats, targets, 0.3, 0.7, 30.0, 2.0, **plain)
    assert wanted[3] > 0.1 and wanted[4] > 0.01
    truth = gradients(wanted[0], maps, feats)
    for ramp in (0.3, torch.tensor(0.3, dtype=torch.float64), torch.full((1,), 0.3, dtype=torch.float64)):
        parts = criterion(*maps, *feats, targets, ramp=ramp, return_parts=True)
        torch.testing.assert_close(tuple(parts), wanted, **EXACT)
        torch.testing.assert_close(gradients(parts.loss, maps, feats), truth, **EXACT)
    assert [part.requires_grad for part in parts] == [True, False, False, False, False]
    assert torch.equal(criterion(*maps, *feats, targets, ramp=ramp), parts.loss)
    assert {frskd_fast.last_impl()[name] for name in ("logit_maps", "attention")} == {impl}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_are_as_close_to_float64_as_the_plain_formula(dtype: torch.dtype, impl: str) -> None:
    maps, feats, targets = inputs(dtype=dtype)
    double = [one.detach().double().requires_grad_() for one in maps]
    double_feats = [[one.detach().double().requires_grad_() for one in side] for side in feats]
    ours = SegmentationLoss(impl=impl)(*maps, *feats, targets, return_parts=True)
    plain = plain_parts(maps, feats, targets)
    truth = plain_parts(double, double_feats, targets)
    assert ours.loss.dtype == torch.float32
    for name, *values in zip(ours._fields, ours, plain, truth, strict=True):
        assert_close(*values, name)
    of = [
        gradients(ours.loss, maps, feats),
        gradients(plain[0], maps, feats),
        gradients(truth[0], double, double_feats),
    ]
    for index, values in enumerate(zip(*of, strict=True)):
        assert values[0].dtype == dtype
        assert_close(*values, f"gradient {index}")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_terms_of_weight_zero_are_not_computed(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    maps, feats, targets = inputs()
    calls: list[str] = []

    def watched(module: Any, name: str) -> None:
        original = getattr(module, name)

        def call(*arguments: Any) -> Any:
            calls.append(name if name == "attention_transfer" else ("kd" if arguments[1] is not None else "ce"))
            return original(*arguments)

        monkeypatch.setattr(module, name, call)

    watched(attention, "attention_transfer")
    watched(logit_maps, "logit_map_losses")
    for settings, ramp, expected in (
        ({}, 1.0, ["kd", "attention_transfer"]),
        ({"beta": 0.0}, 1.0, ["kd"]),
        ({"alpha": 0.0}, 1.0, ["ce", "ce", "attention_transfer"]),
        ({}, 0.0, ["ce", "ce"]),
        ({}, torch.tensor(0.0), ["kd", "attention_transfer"]),  # looking at it would stop a device
    ):
        calls.clear()
        loss = SegmentationLoss(impl=impl, **settings)(*maps, *feats, targets, ramp=ramp)
        assert calls == expected
        wanted = plain_parts(maps, feats, targets, float(ramp), **settings)[0]
        torch.testing.assert_close(loss, wanted, **EXACT)
    calls.clear()
    parts = SegmentationLoss(impl=impl)(maps[0], None, None, None, targets, return_parts=True)
    assert calls == ["ce"] and parts[2:] == (0, 0, 0) and torch.equal(parts.loss, parts.ce_student)
    assert torch.autograd.grad(parts.loss, maps[0])[0].abs().sum() > 0


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nothing_labelled_and_nothing_at_all(impl: str) -> None:
    maps, feats, targets = inputs()
    parts = SegmentationLoss(impl=impl)(*maps, *feats, torch.full_like(targets, 255), return_parts=True)
    wanted = plain_parts(maps, feats, targets)
    assert parts.ce_student == parts.ce_teacher == 0
    torch.testing.assert_close(parts[3:], tuple(part.detach() for part in wanted[3:]), **EXACT)
    found = gradients(parts.loss, maps, feats)
    assert found[0].abs().sum() > 0 and not found[1].any()

    maps, feats, targets = inputs(0)
    parts = SegmentationLoss(impl=impl)(*maps, *feats, targets, return_parts=True)
    assert parts == (0, 0, 0, 0, 0)
    assert all(one.numel() == 0 for one in gradients(parts.loss, maps, feats))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_fullgraph_compile_with_dynamic_batch(impl: str) -> None:
    torch.compiler.reset()
    backend, criterion = CompileCounterWithBackend("aot_eager"), SegmentationLoss(impl=impl)

    def step(maps: list[Tensor], feats: list[list[Tensor]], targets: Tensor, ramp: Tensor) -> Any:
        return criterion(*maps, *feats, targets, ramp=ramp, return_parts=True)

    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for batch in (13, 14, 15):  # unlike any other size, which the compiler would tie to the batch
        maps, feats, targets = inputs(batch, torch.float32)
        for tensor in (*maps, *feats[0], *feats[1], targets):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        ramp = torch.tensor(0.05 * batch)
        parts, wanted = compiled(maps, feats, targets, ramp), step(maps, feats, targets, ramp)
        torch.testing.assert_close(tuple(parts), tuple(wanted))
        torch.testing.assert_close(gradients(parts.loss, maps, feats), gradients(wanted.loss, maps, feats))
    assert backend.frame_count == 1


MAPS = torch.zeros(2, CLASSES, 4, 4)
MASKS = torch.zeros(2, 8, 8, dtype=torch.int64)
FEATS = [torch.ones(2, 3, 4, 4), torch.ones(2, 3, 2, 2)]


def call(**changes: Any) -> Any:
    settings = {
        name: changes.pop(name) for name in ("alpha", "beta", "temperature", "class_weights") if name in changes
    }
    arguments = {
        "student_maps": MAPS, "teacher_maps": MAPS, "student_feats": FEATS, "teacher_feats": FEATS, "targets": MASKS,
    }  # fmt: skip
    return SegmentationLoss(**settings)(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"targets": None}, TypeError, r"targets is None, but class indices \(N, H, W\)"),
        ({"targets": MASKS.float()}, TypeError, r"targets has dtype torch.float32, but class indices .* cast labels"),
        ({"targets": MASKS + 7}, ValueError, "the label 7"),
        ({"targets": MASKS - 1}, ValueError, "the label -1"),
        ({"targets": MASKS[:1]}, ValueError, "targets has 1 masks, but student_maps has 2 images"),
        ({"targets": MASKS[:, :3]}, ValueError, r"student_maps has shape .* but the labels are of 3 x 8 pixels"),
        ({"targets": MASKS.unsqueeze(1)}, ValueError, r"targets has shape \(2, 1, 8, 8\)"),
        ({"student_maps": MAPS[0]}, ValueError, r"student_maps has shape \(5, 4, 4\), but \(N, C, H, W\)"),
        ({"student_maps": "maps"}, TypeError, "student_maps is a str"),
        ({"teacher_maps": MAPS[:, :3]}, ValueError, "teacher_maps has shape .* must score the same classes"),
        ({"teacher_maps": MAPS[:, :3], "alpha": 0.0}, ValueError, "teacher_maps has shape .* must score the same classes"),
        ({"teacher_maps": MAPS.half()}, TypeError, "teacher_maps has dtype torch.float16"),
        ({"student_feats": FEATS[:1]}, ValueError, "teacher_feats has 2 levels, but student_feats has 1"),
        ({"student_feats": FEATS[::-1]}, ValueError, r"teacher_feats\[0\] has maps of \(4, 4\) pixels"),
        ({"student_feats": None}, TypeError, "student_feats is a NoneType"),
        (
            {"student_feats": [f[:1] for f in FEATS], "teacher_feats": [f[:1] for f in FEATS]},
            ValueError,
            r"student_feats\[0\] has batch size 1, but student_maps has 2",
        ),
        (
            {"student_feats": [f.double() for f in FEATS], "teacher_feats": [f.double() for f in FEATS]},
            TypeError,
            r"student_feats\[0\] has dtype torch.float64, but student_maps has torch.float32",
        ),
        ({"ramp": torch.zeros(2)}, ValueError, r"ramp is a tensor of shape \(2,\)"),
        ({"ramp": "1"}, TypeError, "ramp is '1'"),
        ({"alpha": float("nan")}, ValueError, "alpha is nan"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0"),
        ({"class_weights": "balanced"}, TypeError, "class_weights is 'balanced', but a number for each class"),
        ({"class_weights": [1.0, 2.0]}, ValueError, r"class_weights has shape \(2,\), but one weight for each of the 5"),
    ],
)  # fmt: skip
def test_refusals(changes: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence) as caught:
        call(**changes)
    assert str(caught.value).endswith(".")
