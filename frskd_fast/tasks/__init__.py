"""Networks and loss of one method in one `nn.Module`: `task(images, targets)` returns a dict with the loss."""

from .base import Student
from .classification import ClassificationTask
from .frskd import FRSKDTask, build_frskd

__all__ = ["ClassificationTask", "FRSKDTask", "Student", "build_frskd"]
