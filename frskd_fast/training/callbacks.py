"""What a run writes down and shows: CSV files, the progress bar, predictions."""

from __future__ import annotations

import csv
import io
import itertools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from .checkpoints import write_atomically
from .module import DistillationModule
from .recipe_files import CONFIG

STEPS, EPOCHS, PREDICTIONS = "steps.csv", "epochs.csv", "predictions.csv"


class Table:
    """A CSV file that rows are appended to, one flush each; columns may be added later.

    What a kill leaves behind is mended when the file is opened again: a torn last line is dropped, and so are the rows
    that the restarted run is going to write once more. Rows that a full disk refuses wait for the next one.

    Args:
        path: the file.
        position: name of the column that counts rows upwards.
        keep_below: keep the rows of an existing file whose `position` is below this number; 0 starts anew.

    Example:
        >>> import tempfile
        >>> table = Table(Path(tempfile.mkdtemp()) / "steps.csv", "step", 0)
        >>> table.append({"step": 0, "loss": 0.5})
        >>> print(table.path.read_text(), end="")
        step,loss
        0,0.5
    """

    def __init__(self, path: Path, position: str, keep_below: int) -> None:
        self.path = path
        self.columns: list[str] = []
        self.waiting: list[dict[str, Any]] = []
        self.refused = False
        kept = []
        if keep_below > 0 and path.is_file():
            self.columns, rows = read_table(path)
            kept = [row for row in rows if int(row[position]) < keep_below]
        elif path.is_file():
            path.unlink()
        if kept:
            self._rewrite(kept)
        else:
            self.columns = []

    def append(self, row: dict[str, Any]) -> None:
        """Add one row. Never raises because of a full disk: one warning, and the row is kept for later."""
        self.waiting.append(row)
        try:
            new = [name for waiting in self.waiting for name in waiting if name not in self.columns]
            if new:
                _, rows = read_table(self.path) if self.path.is_file() else ([], [])
                self.columns += list(dict.fromkeys(new))
                self._rewrite([*rows, *self.waiting])
            else:
                text = self._lines(self.waiting)
                size = self.path.stat().st_size
                try:
                    with open(self.path, "ab", buffering=0) as file:
                        content = text.encode()
                        if file.write(content) != len(content):
                            raise OSError("only a part of a row could be written")
                except OSError:
                    os.truncate(self.path, size)
                    raise
            self.waiting.clear()
            self.refused = False
        except OSError as error:
            if not self.refused:
                rank_zero_warn(f"{self.path} could not be written ({error}); its rows wait for the next attempt.")
            self.refused = True

    def _lines(self, rows: Sequence[dict[str, Any]]) -> str:
        buffer = io.StringIO()
        csv.DictWriter(buffer, self.columns, restval="", lineterminator="\n").writerows(rows)
        return buffer.getvalue()

    def _rewrite(self, rows: Sequence[dict[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, (",".join(self.columns) + "\n" + self._lines(rows)).encode())


def read_table(path: str | os.PathLike[str]) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a CSV file of a run; a torn last line is left out."""
    text = Path(path).read_text(encoding="utf-8")
    whole, _, _ = text.rpartition("\n")
    reader = csv.DictReader(io.StringIO(whole))
    rows = [row for row in reader if None not in row and None not in row.values()]
    return list(reader.fieldnames or []), rows


class Beginning(Callback):
    """Knows whether the setting-up is over, and writes the settings of a run when its training begins.

    Attributes:
        config: what `config.yaml` is to hold, or None.
        over: whether batches are being worked on: before, an error is one of the settings or of the data's files.
        validated: whether a validation of the run has ended.
    """

    def __init__(self) -> None:
        self.config: bytes | None = None
        self.over = False
        self.validated = False

    def state_dict(self) -> dict[str, Any]:
        return {"validated": self.validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validated = state_dict["validated"]

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.over = True

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.over = False  # the training images are still to come

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.over = True
        if self.config is not None and trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / CONFIG, self.config)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.over = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validated = self.validated or not trainer.sanity_checking

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.over = True

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.over = True


class Records(Callback):
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
        self.steps: Table | None = None
        self.epochs: Table | None = None
        self.rate = Throughput()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder = Path(trainer.default_root_dir)
            self.steps = Table(folder / STEPS, "step", trainer.global_step)
            self.epochs = Table(folder / EPOCHS, "epoch", trainer.current_epoch)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.rate.seconds, "images": self.rate.images}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rate.seconds, self.rate.images = state_dict["seconds"], state_dict["images"]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rate = Throughput()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.rate.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.rate.add(batch[0].shape[0] * trainer.world_size)
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

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rate.pause()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rate.pause()
        means = pl_module.epoch_means() if isinstance(pl_module, DistillationModule) else {}
        if self.epochs is None:
            return
        validation = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("validation/") and trainer.enable_validation and self._validated(trainer)
        }
        self.epochs.append(
            {
                "epoch": trainer.current_epoch,
                "step": trainer.global_step,
                "learning_rate": self._rate_of(trainer),
                "seconds": round(self.rate.seconds, 4),
                "images_per_second": round(self.rate.images_per_second, 2),
                **{f"train/{name}": value for name, value in means.items()},
                **validation,
            }
        )

    def _validated(self, trainer: Trainer) -> bool:
        every = trainer.check_val_every_n_epoch
        return every is None or (trainer.current_epoch + 1) % every == 0

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
        except OSError as error:
            self.ended = True
            rank_zero_warn(f"TensorBoard's events could not be written ({error}); this run writes no more of them.")


class ProgressBar(TQDMProgressBar):
    """Lightning's bar with images/s and each part of the loss, read from the device every N steps only.

    Args:
        every_n_steps: steps between two updates of the bar.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        super().__init__(refresh_rate=every_n_steps)
        self.shown: dict[str, Any] = {}
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
        self.rate.add(batch[0].shape[0] * trainer.world_size)
        self.outputs = outputs
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.outputs = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self.rate.pause()

    outputs: Any = None

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What stands behind the bar."""
        if isinstance(self.outputs, dict):
            names, values = loss_parts(trainer, self.outputs)
            self.shown = {name: f"{value:.3g}" for name, value in zip(names, values.tolist(), strict=True)}
            self.shown = {"images/s": f"{self.rate.images_per_second:.0f}", **self.shown}
        accuracy = trainer.callback_metrics.get("validation/accuracy")
        if accuracy is not None:
            self.shown["validation accuracy"] = f"{float(accuracy):.4f}"
        return self.shown


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
        # A process has every world-th image, without those that could not be decoded.
        left_out = getattr(trainer.predict_dataloaders, "corrupt", ())
        every = itertools.count(trainer.global_rank, trainer.world_size)
        positions = (position for position in every if position not in left_out)
        for batch in predictions:
            for label, probability in zip(batch["class"].tolist(), batch["probability"].tolist(), strict=True):
                rows.append(f"{next(positions)},{label},{probability:.6f}")
        name = PREDICTIONS if trainer.world_size == 1 else f"predictions-{trainer.global_rank}.csv"
        path = Path(trainer.default_root_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, ("\n".join(rows) + "\n").encode())
        if trainer.is_global_zero:
            print(f"Predictions: {path}")
