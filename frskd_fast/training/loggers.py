"""Where a run's numbers go besides its CSV files: TensorBoard, Weights & Biases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from .errors import Refusal


def loggers(folder: Path, tensorboard: bool | None, project: str | None) -> list[Any]:
    """The loggers of a run: TensorBoard's, with None where it can be imported, and that of a project of Weights & Biases."""
    result: list[Any] = []
    if tensorboard is not False:
        try:
            import torch.utils.tensorboard  # noqa: F401

            result.append(Events(folder, name="", version="tensorboard"))
        except ImportError as error:
            if tensorboard:
                raise Refusal(f"--tensorboard true, but it cannot be imported ({error}).") from error
    if project:
        try:
            from lightning.pytorch.loggers import WandbLogger

            result.append(WandbLogger(name=folder.name, project=project, save_dir=folder))
        except ImportError as error:
            raise Refusal(f"--wandb {project}, but wandb cannot be imported; pip install wandb.") from error
    return result


class Events(TensorBoardLogger):
    """Lightning's TensorBoard logger; a disk that is full ends the events with a warning, and not the training.

    TensorBoard writes in a thread that does not recover from an error, so nothing is tried again; the CSV files go on.
    """

    ended = False

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        self._attempt(super().log_metrics, *args, **kwargs)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        self._attempt(super().log_hyperparams, *args, **kwargs)

    def save(self) -> None:
        self._attempt(super().save)

    def finalize(self, status: str) -> None:
        self._attempt(super().finalize, status)

    def _attempt(self, write: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if self.ended:
            return
        try:
            write(*args, **kwargs)
        except (OSError, ValueError) as error:
            # Lightning wraps what its writer raises.
            reason = error.__cause__ if isinstance(error, ValueError) else error
            if not isinstance(reason, OSError):
                raise
            self.ended = True
            rank_zero_warn(f"TensorBoard's events could not be written ({reason}); this run writes no more of them.")
