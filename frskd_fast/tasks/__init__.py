"""Networks and loss of one method in one `nn.Module`: `task(images, targets)` returns a dict with the loss."""

from .frskd import FRSKDTask, Student

__all__ = ["FRSKDTask", "Student"]
