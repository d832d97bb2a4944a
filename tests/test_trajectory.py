"""Twelve SGD steps of whole FRSKD systems in float64 against the original: networks, self-teacher, losses, gradients.

Rounding grows by about 1e5 over these steps, so agreement to 1e-6 in every loss leaves no room for another formula.
"""

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_utils import fill_parameters, golden_settings, load_golden
from torch import Tensor, nn

from frskd_fast import models
from frskd_fast.losses import FitNetLoss, FRSKDLoss, OverhaulLoss
from frskd_fast.tasks import FRSKDTask

BATCH = 16
# (student logits, teacher logits, student features, teacher features, targets) -> total, CE student, CE teacher, KD,
# and the features' distance before its weight
Objective = Callable[[Tensor, Tensor, list[Tensor], list[Tensor], Tensor], Iterable[Tensor]]


def plain_kd(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 / N * sum_n sum_k p_t (log p_t - log p_s), p = softmax(z / T)."""
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum() / student.shape[0]


def plain_attention_map(feature: Tensor) -> Tensor:
    energy = feature.square().mean(dim=1).flatten(1)
    return energy / energy.norm(dim=1, keepdim=True).clamp_min(1e-12)


def plain_attention(students: list[Tensor], teachers: list[Tensor]) -> Tensor:
    return sum(
        (plain_attention_map(student) - plain_attention_map(teacher.detach())).square().mean()
        for student, teacher in zip(students, teachers, strict=True)
    )


def plain_objective(settings: dict[str, Any], distance: Callable[[list[Tensor], list[Tensor]], Tensor]) -> Objective:
    def objective(
        student_logits: Tensor,
        teacher_logits: Tensor,
        students: list[Tensor],
        teachers: list[Tensor],
        targets: Tensor,
    ) -> tuple[Tensor, ...]:
        ce_student = F.nll_loss(F.log_softmax(student_logits, dim=1), targets)
        ce_teacher = F.nll_loss(F.log_softmax(teacher_logits, dim=1), targets)
        kd = plain_kd(student_logits, teacher_logits, settings["temperature"])
        feature = distance(students, teachers)
        total = ce_student + ce_teacher + settings["alpha"] * kd + settings["beta"] * feature
        return total, ce_student, ce_teacher, kd, feature

    return objective


def library_objective(settings: dict[str, Any], impl: str) -> Objective:
    criterion = FRSKDLoss(settings["alpha"], settings["beta"], settings["temperature"], impl=impl)

    def objective(
        student_logits: Tensor,
        teacher_logits: Tensor,
        students: list[Tensor],
        teachers: list[Tensor],
        targets: Tensor,
    ) -> tuple[Tensor, ...]:
        return criterion(student_logits, teacher_logits, students, teachers, targets, return_parts=True)

    return objective


def filled(module: nn.Module) -> nn.Module:
    fill_parameters(module)
    return module.double().train()


Step = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def follow(
    case: str, network: nn.Module, self_teacher: nn.Module, trained: nn.Module, step_of: Step, steps: int
) -> None:
    """Train for `steps` steps and compare the losses of each; after all twelve, the trained network's logits too.

    `step_of` gives the losses of images and targets in the order of `Objective`; `trained` holds what the optimiser sees.
    """
    stored, settings = load_golden(case), golden_settings(case)
    for name, module in (("network", network), ("self_teacher", self_teacher)):
        assert sum(parameter.numel() for parameter in module.parameters()) == settings["params"][name]
    optimizer = torch.optim.SGD(
        trained.parameters(), lr=settings["lr"], momentum=settings["momentum"], weight_decay=settings["weight_decay"]
    )
    assert settings["batch"] == BATCH
    for step in range(steps):
        rows = slice(step % 3 * BATCH, (step % 3 + 1) * BATCH)
        total, ce_student, ce_teacher, kd, feature = step_of(stored["images"][rows].double(), stored["targets"][rows])
        # The original's last column holds both distilled terms with their weights.
        distill = settings["alpha"] * kd + settings["beta"] * feature
        losses = torch.stack([total, ce_student, ce_teacher, kd, distill]).detach()
        torch.testing.assert_close(
            losses, stored["losses"][step], rtol=1e-6, atol=0, msg=lambda text, step=step: f"step {step}: {text}"
        )
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    if steps == settings["steps"]:
        with torch.no_grad():
            _, logits = network.eval()(stored["images"].double())
        scale = stored["final_eval_logits"].abs().max().item()
        torch.testing.assert_close(logits, stored["final_eval_logits"], rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize(
    ("impl", "steps"),
    [
        ("plain", 2),
        ("reference", 2),
        # On a CPU with the extension, "auto" is "cpu".
        pytest.param("auto", 12, marks=pytest.mark.slow),
    ],
)
def test_cifarresnet18_with_attention(impl: str, steps: int) -> None:
    case = "trajectory_cifarresnet18_att"
    settings = golden_settings(case)
    network = filled(models.cifarresnet18(num_classes=10))
    self_teacher = filled(models.BiFPNc(network.channels, 10))
    objective = plain_objective(settings, plain_attention) if impl == "plain" else library_objective(settings, impl)

    def step_of(images: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        students, student_logits = network(images)
        teachers, teacher_logits = self_teacher(students)
        return objective(student_logits, teacher_logits, students, teachers, targets)

    follow(case, network, self_teacher, nn.ModuleList([network, self_teacher]), step_of, steps)


def task_with_hints(distill: str, original_preact: bool = False, impl: str = "auto") -> FRSKDTask:
    """The whole system of a `trajectory_wrn16x2_*` case, filled like the original's."""
    settings = golden_settings(f"trajectory_wrn16x2_{distill}")
    network = filled(models.wrn16x2(num_classes=10, original_preact=original_preact))
    self_teacher = filled(models.BiFPNc(network.channels, 10))
    weights = settings["alpha"], settings["beta"], settings["temperature"]
    if distill == "fit":
        loss = FitNetLoss(network.channels, self_teacher.out_channels, *weights, impl=impl)
    else:
        loss = OverhaulLoss(network.channels, self_teacher, *weights, impl=impl)
    return FRSKDTask(network, self_teacher, filled(loss)).train()


def parts_of(task: FRSKDTask, images: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    parts = task(images, targets)
    return parts["loss"], parts["ce_student"], parts["ce_teacher"], parts["kd"], parts["feature"]


@pytest.mark.parametrize("distill", ["fit", "od"])
@pytest.mark.parametrize(("impl", "steps"), [("reference", 2), ("auto", 12)])
def test_wrn16x2_with_hints(distill: str, impl: str, steps: int) -> None:
    # The original's overhaul distance saw its last map behind the ReLU.
    task = task_with_hints(distill, original_preact=True, impl=impl)
    follow(
        f"trajectory_wrn16x2_{distill}",
        task.backbone,
        task.self_teacher,
        task,
        functools.partial(parts_of, task),
        steps,
    )


def test_the_mended_preact_differs_from_the_original_in_the_last_feature_only() -> None:
    stored = load_golden("trajectory_wrn16x2_od")
    images, targets = stored["images"][:BATCH].double(), stored["targets"][:BATCH]
    outcomes = []
    for original_preact in (True, False):
        task = task_with_hints("od", original_preact)
        students, _ = copy.deepcopy(task.backbone)(images, preact=True)
        outcomes.append((students, parts_of(task, images, targets)))
    (original, original_losses), (mended, mended_losses) = outcomes
    assert original[-1].min() == 0 and mended[-1].min() < 0
    assert torch.equal(original[-1], mended[-1].relu())
    for ours, theirs in zip(mended[:-1], original[:-1], strict=True):
        assert torch.equal(ours, theirs)
    # Cross-entropies and KD agree: the self-teacher rectifies its inputs itself. Only the overhaul distance moves.
    torch.testing.assert_close(torch.stack(mended_losses[1:4]), stored["losses"][0, 1:4], rtol=1e-6, atol=0)
    assert abs(mended_losses[4] - original_losses[4]) > 1e-6 * abs(original_losses[4])
