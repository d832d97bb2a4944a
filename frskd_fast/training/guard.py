"""The callback that stops a run whose loss has a term that does nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from frskd_fast.tasks.guard import Guard, ZeroTermError

from .errors import Refusal
from .module import DistillationModule


class RunGuard(Callback):
    """`Guard` around the first steps of a run, also of one that goes on.

    Args:
        steps: how many optimiser steps are looked at.

    Raises:
        Refusal: what `Guard` found, as a sentence.
    """

    def __init__(self, steps: int = 3) -> None:
        super().__init__()
        self.steps = steps
        self.guard: Guard | None = None
        self._stepped = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DistillationModule)
        self.guard = Guard(pl_module.task, self.steps)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        # A strategy that accumulates gradients itself does not leave them at the parameters.
        if self.guard is not None and not trainer.strategy.handles_gradient_accumulation:
            self.guard.see_gradients()
        self._stepped = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the terms, and judge the last of the first steps."""
        if self.guard is None:
            return
        try:
            # A step may return something else, and its gradients count all the same.
            self.guard.see_terms(outputs if isinstance(outputs, Mapping) else {})
            if self._stepped:
                self.guard.end_step()
        except ZeroTermError as error:
            raise Refusal(str(error)) from error
        self._stepped = False
        if self.guard.done:
            self.guard = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave nothing in the task, however short the run was."""
        if self.guard is not None:
            self.guard.close()
            self.guard = None
