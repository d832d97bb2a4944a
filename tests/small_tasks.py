"""Every task of the package around a small student, by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from toy_method import ToyNet, ToyTask

from frskd_fast.models import ProjectionHead, with_auxiliary_heads
from frskd_fast.tasks import (
    AdaINTask,
    ClassificationTask,
    CollaborativeTeachingTask,
    DistillationTask,
    FFLTask,
    HSAKDOnlineTask,
    HSAKDTask,
    HSAKDTeacherTask,
    LinearProbeTask,
    SSKDHeadTask,
    SSKDTask,
    Task,
    build_frskd,
)


class WithBatchNorms(ToyNet):
    """With maps before their ReLU."""

    def forward(self, images: Tensor, preact: bool = False) -> tuple[list[Tensor], Tensor]:
        features, logits = super().forward(images)
        before = [self.first[:2](images), self.second[:2](features[0])]
        return before if preact else features, logits


SMALL_TASKS: dict[str, Callable[[nn.Module], Task]] = {
    "classification": ClassificationTask,
    "linear probe": LinearProbeTask,
    "toy": ToyTask,
    "att": build_frskd,
    "fit": lambda network: build_frskd(network, "fit", self_teacher="BiFPN", num_channels=16),
    "od": lambda network: build_frskd(WithBatchNorms(), "od", self_teacher="BiFPN", num_channels=16),
    "sla": lambda network: build_frskd(network, "att", "sla", self_teacher="BiFPN", num_channels=16),
    "without a feature term": lambda network: build_frskd(
        network, "fit", beta=0.0, self_teacher="BiFPN", num_channels=16
    ),
    "kd from a network": lambda network: DistillationTask(network, ToyNet()),
    "hints from a network": lambda network: DistillationTask(network, ToyNet(width=8), "fit"),
    "hsakd teacher": HSAKDTeacherTask,
    "hsakd heads": lambda network: HSAKDTeacherTask(network, freeze_backbone=True),
    "hsakd": lambda network: HSAKDTask(network, with_auxiliary_heads(ToyNet())),
    "hsakd online": HSAKDOnlineTask,
    "sskd head": SSKDHeadTask,
    "sskd": lambda network: SSKDTask(network, ProjectionHead(ToyNet())),
    "adain": lambda network: AdaINTask(network, ToyNet(width=8)),
    "collaborative": lambda network: CollaborativeTeachingTask(network, ToyNet(width=8), ToyNet()),
    "ffl": FFLTask,
}
