"""What happens when the loss, a gradient or a weight is no finite number any more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from .errors import Refusal

OnNan = Literal["stop", "skip", "continue"]


class FiniteGuard(Callback):
    """Stops a run whose loss or weights are not finite, before a checkpoint of such weights replaces a good one.

    The loss of every step is looked at on the device, and the device is read where the trainer logs and before a checkpoint
    is written, where the weights are looked at, too.

    Args:
        on_nan: "stop"; "skip" to leave out each step whose gradients are not finite, and stop after `patience` of them in a
            row, for which the device is read after every backward pass; "continue" to look at nothing.
        patience: see there.

    Attributes:
        skipped: number of steps left out so far.

    Raises:
        Refusal: a sentence with the step, and what to do.
    """

    def __init__(self, on_nan: OnNan = "stop", patience: int = 20) -> None:
        super().__init__()
        self.on_nan = on_nan
        self.patience = patience
        self.skipped = 0
        self._in_a_row = 0
        self._finite: Tensor | None = None  # whether all losses since the last look were
        self._watched: list[Tensor] = []  # parameters, and the buffers that were finite when training began
        self._buffers: list[tuple[Tensor, Tensor]] = []  # those of BatchNorms and the like, and what they were

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A mask of infinities is no sign of anything.
        buffers = [buffer for buffer in _floating(pl_module.buffers()) if _all_finite([buffer])]
        self._watched = [*_floating(pl_module.parameters()), *buffers]
        self._buffers = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # The statistics of a BatchNorm are spoilt in the forward pass, in any batch of those whose gradients are summed.
        if self.on_nan == "skip" and not self._buffers:
            self._buffers = [(buffer, buffer.clone()) for buffer in _floating(pl_module.buffers())]

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self.on_nan != "skip":
            return
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        if _any(trainer, not _all_finite(gradients)):
            optimizer.zero_grad(set_to_none=True)  # which an optimiser passes over, weight decay and momentum included
            with torch.no_grad():
                for buffer, before in self._buffers:
                    buffer.copy_(before)
            self.skipped += 1
            self._in_a_row += 1
            if self._in_a_row >= self.patience:
                raise Refusal(
                    f"The gradients of {self._in_a_row} steps in a row, up to step {trainer.global_step}, are not finite. "
                    "Lower --optimizer.lr, or look at the data."
                )
        else:
            self._in_a_row = 0
        self._buffers = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.on_nan != "stop" or not isinstance(outputs, dict) or "loss" not in outputs:
            return
        finite = outputs["loss"].detach().isfinite()
        self._finite = finite if self._finite is None else self._finite & finite
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.fit_loop.total_batch_idx % every == 0:
            self._look(trainer)

    def before_save(self, trainer: Trainer) -> None:
        """Raise rather than let weights be saved that are not finite; all processes have to call it."""
        if self.on_nan == "continue":
            return
        self._look(trainer)
        if _any(trainer, not _all_finite(self._watched)):
            self._stop(trainer, "Weights")

    def _look(self, trainer: Trainer) -> None:
        finite, self._finite = self._finite, None
        if _any(trainer, finite is not None and not bool(finite)):
            self._stop(trainer, "The loss")

    def _stop(self, trainer: Trainer, what: str) -> None:
        are = "is" if what == "The loss" else "are"
        raise Refusal(
            f"{what} {are} not finite, as of step {trainer.global_step}, and training stops. The checkpoints in "
            f"{trainer.default_root_dir} are from before. Lower --optimizer.lr, or look at the data; --on_nan skip leaves out "
            "steps whose gradients are not finite, --on_nan continue trains on."
        )


def _any(trainer: Trainer, found: bool) -> bool:
    """Whether it holds in any of the processes."""
    return trainer.strategy.reduce_boolean_decision(found, all=False) if trainer.world_size > 1 else found


def _floating(tensors: Iterator[Tensor]) -> Iterator[Tensor]:
    return (tensor for tensor in tensors if tensor.is_floating_point())


def _all_finite(tensors: list[Tensor]) -> bool:
    """Whether every number is finite; one number is read from the device."""
    finite = [_local(tensor).isfinite().all() for tensor in _floating(iter(tensors)) if tensor.numel()]
    return not finite or bool(torch.stack(finite).all())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()
