"""What a run writes down: losses of steps, means of epochs, predictions."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from .checkpoints import write_atomically
from .masks import MaskFolder
from .module import DistillationModule
from .tables import Table

STEPS, EPOCHS, PREDICTIONS, MASKS = "steps.csv", "epochs.csv", "predictions.csv", "predictions"


class Throughput:
    """images / seconds, with pauses left out. Reads the host's clock alone; a queue of kernels evens out over steps."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.images = 0
        self.since: float | None = None

    def start(self) -> None:
        if self.since is None:
            self.since = time.perf_counter()

    def add(self, images: int) -> None:
        now = time.perf_counter()
        if self.since is not None:
            self.seconds += now - self.since
        # Until the next batch arrives the clock goes on: waiting for data is part of training.
        self.since = now
        self.images += images

    def pause(self) -> None:
        self.since = None

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds > 0 else 0.0


class Timed(Callback):
    """Keeps the throughput of the epoch's training in `rate`, without validation."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.rate = Throughput()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self.rate = Throughput()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.rate.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        targets = batch[1][0] if isinstance(batch[1], tuple | list) else batch[1]
        self.rate.add(len(targets) * trainer.world_size)  # images may come as several views each
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self.rate.pause()


class Records(Timed):
    """Writes `steps.csv` (loss parts every N steps) and `epochs.csv`, and tells the loggers the same numbers.

    The device is read once in N steps (`Trainer(log_every_n_steps=N)`), and once an epoch. Rows are written before the
    checkpoint of their step, so that a restarted run continues the files without a gap and without a repetition.

    | `steps.csv` | |
    | --- | --- |
    | `step`, `epoch` | optimiser steps done before this batch; epochs done |
    | `loss` and parts | of this batch (mean over processes); digits in full, `float(text)` gives the value back |

    | `epochs.csv` | |
    | --- | --- |
    | `epoch`, `step` | counted from 0; optimiser steps done by its end |
    | `learning_rate` | in this epoch |
    | `seconds`, `images_per_second` | of training, without validation; of all processes |
    | `train/...` | means over the epoch's images |
    | `validation/...` | of the student alone |
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: Table | None = None
        self.epochs: Table | None = None
        self.validation: dict[str, float] = {}  # what the latest one measured, perhaps before a restart

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            metrics = trainer.callback_metrics.items()
            self.validation = {name: float(value) for name, value in metrics if name.startswith("validation/")}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder = Path(trainer.default_root_dir)
            self.steps = Table(folder / STEPS, "step", trainer.global_step)
            self.epochs = Table(folder / EPOCHS, "epoch", trainer.current_epoch)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.rate.seconds, "images": self.rate.images, "validation": self.validation}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rate.seconds, self.rate.images = state_dict["seconds"], state_dict["images"]
        self.validation = state_dict.get("validation", {})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every or trainer.fit_loop.total_batch_idx % every or not isinstance(outputs, dict):
            return
        names, stacked = loss_parts(trainer, outputs)
        if trainer.world_size > 1:
            stacked = trainer.strategy.reduce(stacked, reduce_op="mean")
        values = dict(zip(names, stacked.tolist(), strict=True))
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        if self.steps is not None:
            self.steps.append({"step": step, "epoch": trainer.current_epoch, **values})
        for logger in trainer.loggers:
            logger.log_metrics({f"step/{name}": value for name, value in values.items()}, step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rate.pause()
        means = pl_module.epoch_means() if isinstance(pl_module, DistillationModule) else {}
        if self.epochs is None:
            return
        every = trainer.check_val_every_n_epoch
        validated = trainer.enable_validation and (every is None or (trainer.current_epoch + 1) % every == 0)
        self.epochs.append(
            {
                "epoch": trainer.current_epoch,
                "step": trainer.global_step,
                "learning_rate": self._rate_of(trainer),
                "seconds": round(self.rate.seconds, 4),
                "images_per_second": round(self.rate.images_per_second, 2),
                **{f"train/{name}": value for name, value in means.items()},
                **(self.validation if validated else {}),
            }
        )

    def _rate_of(self, trainer: Trainer) -> float:
        # The schedule has gone on to the next epoch by now.
        return self._epoch_rate if self._epoch_rate is not None else float(trainer.optimizers[0].param_groups[0]["lr"])

    _epoch_rate: float | None = None

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._epoch_rate = float(optimizer.param_groups[0]["lr"])


def loss_parts(trainer: Trainer, outputs: dict[str, Any]) -> tuple[list[str], Tensor]:
    """Names and values, float64 (P,), of the scalars that a training step returned; nothing is read from the device."""
    scalars = {name: value.detach().double() for name, value in outputs.items() if torch.is_tensor(value)}
    scalars = {name: value for name, value in scalars.items() if value.dim() == 0}
    if "loss" in scalars:
        # Lightning hands callbacks the share of this batch in the step's loss.
        scalars["loss"] = scalars["loss"] * trainer.accumulate_grad_batches
    return list(scalars), torch.stack(list(scalars.values()))


def positions(trainer: Trainer) -> Iterator[int]:
    """Of the images that a process predicts, in the data set: every world-th, without those that could not be decoded."""
    left_out = getattr(trainer.predict_dataloaders, "corrupt", ())
    every = itertools.count(trainer.global_rank, trainer.world_size)
    return (position for position in every if position not in left_out)


class Predictions(BasePredictionWriter):
    """Writes `predictions.csv` in the run's folder: position of the image in the data set, class, its probability.

    Several processes write `predictions-RANK.csv` each.
    """

    def __init__(self) -> None:
        super().__init__("epoch")

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        rows = ["image,class,probability"]
        position = positions(trainer)
        for batch in predictions:
            for label, probability in zip(batch["class"].tolist(), batch["probability"].tolist(), strict=True):
                rows.append(f"{next(position)},{label},{probability:.6f}")
        name = PREDICTIONS if trainer.world_size == 1 else f"predictions-{trainer.global_rank}.csv"
        path = Path(trainer.default_root_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, ("\n".join(rows) + "\n").encode())
        if trainer.is_global_zero:
            print(f"Predictions: {path}")


class Masks(BasePredictionWriter):
    """Writes `predictions/NUMBER.png` in the run's folder: the mask of each image, by its position in the data set."""

    def __init__(self, num_classes: int) -> None:
        super().__init__("batch")
        self.num_classes = num_classes
        self.masks: MaskFolder | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.masks = MaskFolder(Path(trainer.default_root_dir) / MASKS, self.num_classes)
        if trainer.is_global_zero:
            self.masks.begin()
        trainer.strategy.barrier("the folder of masks is there")
        self.positions = positions(trainer)

    def write_on_batch_end(self, trainer: Trainer, pl_module: LightningModule, prediction: Any, *_: Any) -> None:
        assert self.masks is not None
        for mask in prediction["mask"]:
            self.masks.write(f"{next(self.positions):06d}", mask)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.masks is not None
        trainer.strategy.barrier("all masks are written")
        if trainer.is_global_zero:
            replaced = self.masks.finish()
            print(f"Predictions: {self.masks.folder}{', in place of the masks that were there' if replaced else ''}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.masks is not None:
            self.masks.abandon()
