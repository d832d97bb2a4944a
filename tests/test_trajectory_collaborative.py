"""Ten SGD steps of CollaborativeTeaching in float64 against the released network and loss: a shared stem, three networks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from golden_utils import golden_settings
from trajectory_utils import assert_final, filled, follow, warmed_up

from frskd_fast._dispatch import use_impl
from frskd_fast.models.cifar_wide_resnet import CIFARWideResNet
from frskd_fast.tasks import CollaborativeTeachingTask

EXPERT = partial(CIFARWideResNet, 22, 1, 10)


# On a CPU with the extension, "auto" is "cpu".
@pytest.mark.parametrize(("impl", "steps"), [("reference", 2), ("auto", None)])
@pytest.mark.parametrize("attention_on", ["scratch", "student"])
def test_every_step_is_the_original_s(attention_on: str, impl: str, steps: int | None) -> None:
    case = f"trajectory_ctkd_attention_on_{attention_on}"
    settings = golden_settings(case)

    def network(which: str) -> CIFARWideResNet:
        return CIFARWideResNet(settings[f"{which}_depth"], settings["width"], settings["num_classes"])

    expert = warmed_up(EXPERT, case, 2000)
    task = CollaborativeTeachingTask(
        filled(network("student"), 1000),
        filled(network("scratch")),
        expert,
        *(settings[name] for name in ("beta", "gamma", "attention_on")),
        share_stem=True,
    )
    columns = "loss", "ce_student", "ce_scratch", "hint", "attention_1", "attention_2", "attention_3"
    weights = torch.tensor([1, 1, 1, settings["gamma"], 1, 1, 1], dtype=torch.float64)  # its hint is weighted
    with use_impl(impl):
        stored = follow(
            case, task, lambda parts: list(torch.stack([parts[name] for name in columns]).mul(weights)), steps
        )
    if stored is None:
        return
    images = stored["images"].double()
    with torch.no_grad():
        task.eval()
        assert_final(task.student()(images), stored["final_eval_logits"])
        assert_final(task.scratch_teacher()(images), stored["final_eval_scratch_logits"])
        assert_final(task.expert(images)[1], stored["expert_eval_logits"])
