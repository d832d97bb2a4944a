"""The progress bar."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from .module import DistillationModule
from .records import Timed, loss_parts


class ProgressBar(Timed, TQDMProgressBar):
    """Lightning's bar with images/s and each part of the loss, read from the device every N steps only.

    Args:
        every_n_steps: steps between two updates of the bar.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        super().__init__(refresh_rate=every_n_steps)
        self.shown: dict[str, Any] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.outputs = outputs
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.outputs = None

    outputs: Any = None

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What stands behind the bar."""
        if isinstance(self.outputs, dict):
            names, values = loss_parts(trainer, self.outputs)
            self.shown = {name: f"{value:.3g}" for name, value in zip(names, values.tolist(), strict=True)}
            self.shown = {"images/s": f"{self.rate.images_per_second:.0f}", **self.shown}
        if isinstance(pl_module, DistillationModule):
            score = trainer.callback_metrics.get(f"validation/{pl_module.evaluation.score}")
            if score is not None:
                self.shown[f"validation {pl_module.evaluation.title}"] = f"{float(score):.4f}"
        return self.shown
