"""Twelve SGD steps of whole FRSKD systems in float64 against the original: networks, self-teacher, losses, gradients.

Rounding grows by about 1e5 over these steps, so agreement to 1e-6 in every loss leaves no room for another formula.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_utils import fill_parameters, golden_settings, load_golden
from torch import Tensor, nn

from frskd_fast import models
from frskd_fast.losses import FRSKDLoss

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


class Adapters(nn.Module):
    """1x1 convolution and BatchNorm from each student width to the self-teacher's; keys as in the original."""

    def __init__(self, channels: list[int], widths: list[int]) -> None:
        super().__init__()
        self.linear = nn.ModuleList(
            nn.Sequential(nn.Conv2d(count, width, 1, bias=False), nn.BatchNorm2d(width))
            for count, width in zip(channels, widths, strict=True)
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        return [adapter(feature) for adapter, feature in zip(self.linear, features, strict=True)]


def plain_fit(adapted: list[Tensor], teachers: list[Tensor]) -> Tensor:
    return sum(
        (student.relu() - teacher.detach()).square().mean() for student, teacher in zip(adapted, teachers, strict=True)
    )


def overhaul_margin(batch_norm: nn.BatchNorm2d) -> Tensor:
    """E[x | x < 0] for x normal with the BatchNorm's weight and bias as deviation and mean, for each channel."""
    deviation, mean = batch_norm.weight.detach().double().abs(), batch_norm.bias.detach().double()
    ratio = mean / deviation
    below_zero = 0.5 * torch.erfc(ratio / math.sqrt(2.0))
    expectation = mean - deviation * torch.exp(-ratio.square() / 2) / (math.sqrt(2.0 * math.pi) * below_zero)
    margin = torch.where(below_zero > 0.001, expectation, -3 * deviation)
    # The original keeps margins in float32.
    return margin.float().double().view(1, -1, 1, 1)


def plain_overhaul(adapted: list[Tensor], teachers: list[Tensor], margins: list[Tensor]) -> Tensor:
    distances = []
    for student, teacher, margin in zip(adapted, teachers, margins, strict=True):
        target = torch.maximum(teacher.detach(), margin)
        counts = (student > target) | (target > 0)
        distances.append(((student - target).square() * counts).sum() / student.shape[0])
    return sum(distance / 2 ** (len(distances) - 1 - i) for i, distance in enumerate(distances))


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


def follow(
    case: str,
    network: nn.Module,
    self_teacher: nn.Module,
    adapters: nn.Module | None,
    objective: Objective,
    steps: int,
    preact: bool = False,
) -> None:
    """Train for `steps` steps and compare the losses of each; after all twelve, the trained network's logits too."""
    stored, settings = load_golden(case), golden_settings(case)
    for name, module in (("network", network), ("self_teacher", self_teacher)):
        assert sum(parameter.numel() for parameter in module.parameters()) == settings["params"][name]
    modules = [module for module in (network, self_teacher, adapters) if module is not None]
    optimizer = torch.optim.SGD(
        [parameter for module in modules for parameter in module.parameters()],
        lr=settings["lr"],
        momentum=settings["momentum"],
        weight_decay=settings["weight_decay"],
    )
    assert settings["batch"] == BATCH
    for step in range(steps):
        rows = slice(step % 3 * BATCH, (step % 3 + 1) * BATCH)
        students, student_logits = network(stored["images"][rows].double(), preact=preact)
        teachers, teacher_logits = self_teacher(students, preact=preact)
        total, ce_student, ce_teacher, kd, feature = objective(
            student_logits, teacher_logits, students, teachers, stored["targets"][rows]
        )
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
    follow(case, network, self_teacher, None, objective, steps)


def test_wrn16x2_with_fitnet_hints() -> None:
    case = "trajectory_wrn16x2_fit"
    network = filled(models.wrn16x2(num_classes=10))
    self_teacher = filled(models.BiFPNc(network.channels, 10))
    adapters = filled(Adapters(network.channels, self_teacher.out_channels))
    objective = plain_objective(
        golden_settings(case), lambda students, teachers: plain_fit(adapters(students), teachers)
    )
    follow(case, network, self_teacher, adapters, objective, steps=6)


def overhaul_system(original_preact: bool) -> tuple[nn.Module, nn.Module, nn.Module, Objective]:
    network = filled(models.wrn16x2(num_classes=10, original_preact=original_preact))
    self_teacher = filled(models.BiFPNc(network.channels, 10))
    adapters = filled(Adapters(network.channels, self_teacher.out_channels))
    margins = [overhaul_margin(batch_norm) for batch_norm in self_teacher.get_bn_before_relu()]
    objective = plain_objective(
        golden_settings("trajectory_wrn16x2_od"),
        lambda students, teachers: plain_overhaul(adapters(students), teachers, margins),
    )
    return network, self_teacher, adapters, objective


def test_wrn16x2_with_overhaul_distances_on_the_originals_preact_features() -> None:
    network, self_teacher, adapters, objective = overhaul_system(original_preact=True)
    follow("trajectory_wrn16x2_od", network, self_teacher, adapters, objective, steps=4, preact=True)


def test_the_mended_preact_differs_from_the_original_in_the_last_feature_only() -> None:
    stored = load_golden("trajectory_wrn16x2_od")
    images, targets = stored["images"][:BATCH].double(), stored["targets"][:BATCH]
    outcomes = []
    for original_preact in (True, False):
        network, self_teacher, _, objective = overhaul_system(original_preact)
        students, student_logits = network(images, preact=True)
        teachers, teacher_logits = self_teacher(students, preact=True)
        outcomes.append((students, objective(student_logits, teacher_logits, students, teachers, targets)))
    (original, original_losses), (mended, mended_losses) = outcomes
    assert original[-1].min() == 0 and mended[-1].min() < 0
    assert torch.equal(original[-1], mended[-1].relu())
    for ours, theirs in zip(mended[:-1], original[:-1], strict=True):
        assert torch.equal(ours, theirs)
    # Cross-entropies and KD agree: the self-teacher rectifies its inputs itself. Only the overhaul distance moves.
    torch.testing.assert_close(torch.stack(mended_losses[1:4]), stored["losses"][0, 1:4], rtol=1e-6, atol=0)
    assert abs(mended_losses[4] - original_losses[4]) > 1e-6 * abs(original_losses[4])
