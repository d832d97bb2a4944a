"""Four optimiser steps of FRSKD's segmentation in float64 against the original: accumulated, clipped by value, then SGD."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from golden_utils import golden_settings, load_golden
from trajectory_utils import filled

from frskd_fast._dispatch import use_impl
from frskd_fast.models import EfficientDetSeg
from frskd_fast.tasks import FRSKDSegmentationTask

CASE = "trajectory_seg_d0"
# A relative change of 1e-12 grows to some 1e-4: at P7 a channel has two values, of which BatchNorm makes almost a sign.
CLOSE = {"rtol": 1e-4, "atol": 0.0}
# ImageNet's, unrounded: float32's 1e-8 would be another trajectory.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize(("impl", "micro_batches"), [("reference", 2), ("auto", None)])  # "auto" is "cpu" here
def test_trajectory(impl: str, micro_batches: int | None) -> None:
    stored, settings = load_golden(CASE), golden_settings(CASE)
    accumulate, size = settings["accumulate"], settings["batch"]
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (MEAN, STD))
    images, targets = (stored["images"].double() / 255 - mean) / std, stored["targets"].long()
    names = "alpha", "beta", "temperature", "ignore_index"
    task = FRSKDSegmentationTask(
        filled(EfficientDetSeg(settings["backbone"])),
        warmup_epochs=settings["warmup"],
        **{name: settings[name] for name in names},
    )
    task.start_epoch(settings["epoch"], settings["epochs"])
    torch.testing.assert_close(task.ramp, stored["rampup"])
    optimiser = torch.optim.SGD(
        task.parameter_groups(), stored["lr"].item(), settings["momentum"], weight_decay=settings["weight_decay"]
    )
    with use_impl(impl):
        for step in range(micro_batches or settings["steps"] * accumulate):
            begin = step % 2 * size
            parts = task(images[begin : begin + size], targets[begin : begin + size])
            found = [
                parts["loss"] / accumulate,
                *(parts[name] for name in ("ce_student", "ce_teacher", "attention", "kd")),
            ]
            torch.testing.assert_close(
                torch.stack(found).detach(),
                stored["losses"][step],
                **CLOSE,
                msg=lambda text, step=step: f"{step}: {text}",
            )
            (parts["loss"] / accumulate).backward()
            if (step + 1) % accumulate == 0:
                torch.nn.utils.clip_grad_value_(task.parameters(), settings["clip_value"])
                optimiser.step()
                optimiser.zero_grad()
    if micro_batches is not None:
        return
    total = sum(parameter.detach().abs().sum() for parameter in task.parameters())
    torch.testing.assert_close(total, stored["final_abs_param_sum"], rtol=1e-6, atol=0)
    with torch.no_grad():
        task.eval()
        _, _, _, teacher_maps = task.backbone(images)
        scores = {
            "student": task.student()(images),
            "teacher": F.interpolate(teacher_maps, scale_factor=4, mode="bilinear"),
        }
        for name, value in scores.items():
            wanted = stored[f"final_eval_{name}_logits"]
            torch.testing.assert_close(value[:, :, ::32, ::32], wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())
