"""Networks and loss of one method in one `nn.Module`: `task(images, targets)` returns a dict with the loss."""

from .adain import AdaINTask
from .base import FrozenTeacher, Student, Task
from .classification import ClassificationTask
from .collaborative import CollaborativeTeachingTask
from .distillation import DistillationTask
from .ffl import FFLTask, FusedNetwork, IndependentNetworks
from .frskd import FRSKDTask, build_frskd
from .frskd_segmentation import FRSKDSegmentationTask, SegmentationStudent
from .hsakd import HSAKDOnlineTask, HSAKDTask, HSAKDTeacherTask
from .linear_probe import LinearProbeTask
from .rotation_metrics import rotation_accuracies
from .sskd import SSKDHeadTask, SSKDTask

__all__ = [
    "AdaINTask",
    "ClassificationTask",
    "CollaborativeTeachingTask",
    "DistillationTask",
    "FFLTask",
    "FRSKDSegmentationTask",
    "FRSKDTask",
    "FrozenTeacher",
    "FusedNetwork",
    "HSAKDOnlineTask",
    "HSAKDTask",
    "HSAKDTeacherTask",
    "IndependentNetworks",
    "LinearProbeTask",
    "SSKDHeadTask",
    "SSKDTask",
    "SegmentationStudent",
    "Student",
    "Task",
    "build_frskd",
    "rotation_accuracies",
]
