"""Checkpoint files that survive a kill, a torn write and a full disk."""

from __future__ import annotations

import math
import os
import shutil
import zipfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed.checkpoint.api import CheckpointException

from frskd_fast.models.checkpoints import LAST, PREVIOUS, SHARDED, brief, damage_in_archive

from .errors import Refusal
from .finite import FiniteGuard

BEST, INCOMING = "best.ckpt", "incoming.ckpt"
LIGHTNINGS_KEYWORDS = ("best", "last", "hpc")  # for --ckpt_path


def write_atomically(path: str | os.PathLike[str], content: bytes | memoryview) -> None:
    """Write `content` so that `path` holds either what it held before or all of it, whatever happens meanwhile.

    A file beside it is written, brought to the disk and renamed. When that fails, with an OSError, it is removed.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's plugin for checkpoint files: written atomically, read with `weights_only=True`.

    Use it as `Trainer(plugins=[AtomicCheckpointIO()])`; the command line does.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write the file; see `write_atomically`. Remote paths ("s3://...") go Lightning's own way."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        # In memory first: PyTorch's writer cannot be relied on to report a full disk as an exception.
        buffer = BytesIO()
        torch.save(checkpoint, buffer)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getbuffer())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the file. `weights_only` None is True here: no code in the file is run."""
        checkpoint: dict[str, Any] = super().load_checkpoint(
            path, map_location, True if weights_only is None else weights_only
        )
        return checkpoint


def problem_with(path: str | os.PathLike[str]) -> str | None:
    """What is wrong with a checkpoint file, as half a sentence, or None. Reads all of it and compares its checksums.

    Example:
        >>> problem_with("no/such/file.ckpt")
        'it does not exist'
    """
    path = Path(path)
    if path.is_dir():  # a sharded checkpoint
        missing = [name for name in (".metadata", SHARDED) if not (path / name).is_file()]
        return f"it is a folder without {missing[0]}" if missing else None
    if not path.is_file():
        return "it does not exist"
    if path.stat().st_size == 0:
        return "it is empty"
    damage = damage_in_archive(path)
    if damage is not None:
        return damage
    with zipfile.ZipFile(path) as archive:
        names = [name.rsplit("/", 1)[-1] for name in archive.namelist()]
    return None if "data.pkl" in names else "it is no checkpoint of PyTorch"


@dataclass(frozen=True)
class Progress:
    """How far a checkpoint is: whole epochs done, optimiser steps done, and whether a callback has ended the training."""

    epochs: int
    steps: int
    stopped: bool = False


def progress_of(checkpoint: dict[str, Any]) -> Progress:
    """The progress in a loaded checkpoint of Lightning."""
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    states = [state for state in checkpoint["callbacks"].values() if isinstance(state, dict)]
    stopped = any(state.get("stopped_epoch") for state in states)  # of Lightning's EarlyStopping
    return Progress(int(epochs), int(checkpoint["global_step"]), stopped)


@dataclass(frozen=True)
class Found:
    """A usable checkpoint: its file, its progress, and sentences about files that were passed over."""

    path: Path
    progress: Progress
    passed_over: tuple[str, ...]


def find_checkpoint(folder: str | os.PathLike[str]) -> Found | None:
    """The newest checkpoint of a run that is whole: `last.ckpt`, or `previous.ckpt` where that one is torn.

    Args:
        folder: the run's folder.

    Returns:
        What was found; None where there is no checkpoint at all.

    Raises:
        RuntimeError: when there are checkpoints, but none of them can be read: starting anew would be a silent loss.
    """
    folder = Path(folder)
    passed_over: list[str] = []
    present = [folder / name for name in (LAST, PREVIOUS) if (folder / name).exists()]
    for path in present:
        problem = problem_with(path)
        if problem is None:
            # Shards are read by their strategy; the file beside them says how far they are.
            file = path / SHARDED if path.is_dir() else path
            try:
                progress = progress_of(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
                return Found(path, progress, tuple(passed_over))
            except Exception as error:
                problem = f"it cannot be loaded ({brief(error)})"
        passed_over.append(f"{path} is passed over: {problem}.")
    if not present:
        return None
    raise RuntimeError(
        " ".join(passed_over) + f" No checkpoint in {folder} can be used; remove them or give --fresh to start anew."
    )


def check_given(path: str, training: bool) -> None:
    """Refuse a file for --ckpt_path that is no checkpoint of the trainer, or for training one that holds the weights alone.

    Lightning's keywords and addresses are left to it, and so are shards.

    Raises:
        Refusal: naming what the file is.
    """
    if path in LIGHTNINGS_KEYWORDS or "://" in path or path.startswith("registry:"):
        return
    problem = problem_with(path)
    if problem is None and not Path(path).is_dir():
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            wanted = ("pytorch-lightning_version", "state_dict", *(("loops", "optimizer_states") if training else ()))
            missing = [key for key in wanted if key not in content] if isinstance(content, dict) else [*wanted]
            problem = f"it has no {missing[0]!r}, so the trainer did not write it to go on from" if missing else None
        except Exception as error:
            problem = f"it cannot be loaded ({brief(error)})"
    if problem is not None:
        raise Refusal(
            f"--ckpt_path is {path}, but {problem}. Give a checkpoint of a run; --model.weights takes the weights of other "
            "programs."
        )


class RunCheckpoint(Checkpoint):
    """Saves `last.ckpt` every N steps and after each epoch, and keeps the one before as `previous.ckpt`.

    A write that fails (a full disk, say) leaves both files as they are; training goes on, one warning says so, and the
    next save tries again. `failure` tells whether the latest one failed. Both files hold everything: weights, optimiser,
    schedule, scaler, loops, position in the data.

    Args:
        every_n_steps: save after each so many optimiser steps; 0 never does so within an epoch.
        every_n_epochs: save after each so many epochs, and after the last.
            A run that is told to stop (by SIGTERM, `max_steps`, early stopping) saves besides.
        keep_best: also keep `best.ckpt`: of the epochs that end with a validation, the one with the highest `monitor`.
            Checkpoints that are folders (sharded ones) are not kept.
        monitor: name of the metric that decides, larger is better; None is what the module is judged by on the validation
            images, its accuracy or mIoU.
        folder: where; None is the trainer's `default_root_dir`.
    """

    def __init__(
        self,
        every_n_steps: int = 500,
        every_n_epochs: int = 1,
        keep_best: bool = False,
        monitor: str | None = None,
        folder: str | None = None,
    ) -> None:
        super().__init__()
        if every_n_steps < 0 or every_n_epochs < 1:
            raise ValueError(
                f"every_n_steps is {every_n_steps} and every_n_epochs {every_n_epochs}, but 0 or more and 1 or more were "
                "wanted."
            )
        self.every_n_steps = every_n_steps
        self.every_n_epochs = every_n_epochs
        self.keep_best = keep_best
        self.monitor = monitor or ""
        self.folder = folder
        self.best: float | None = None
        self.saved_step = 0
        self.validated_step: int | None = None
        self.failure: BaseException | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self.monitor:
            self.monitor = f"validation/{getattr(getattr(pl_module, 'evaluation', None), 'score', 'accuracy')}"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.saved_step or not (self._step_is_due(trainer) or self._is_stopping(trainer)):
            return
        loop = trainer.fit_loop.epoch_loop
        # After the last batch, and before a validation, comes work that a restart from here would skip; the
        # checkpoint at the end of the epoch, or after the next step, holds it.
        if (
            loop.batch_progress.is_last_batch
            or trainer.fit_loop._should_accumulate()
            or self._validation_is_due(trainer)
        ):
            return
        self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return  # stopped within the epoch: the checkpoint of the last step says so, this one would not
        done = trainer.current_epoch + 1
        if (
            done % self.every_n_epochs == 0
            or done == trainer.max_epochs
            or self._step_is_due(trainer)
            or self._is_stopping(trainer)
            or self._improved(trainer)
        ):
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validated_step = trainer.global_step

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save when SIGTERM came after the last chance to do so in its step; after an error nothing is saved."""
        loop = trainer.fit_loop.epoch_loop
        if (
            isinstance(exception, SIGTERMException)
            and trainer.world_size == 1
            and trainer.global_step != self.saved_step
            and not loop.batch_progress.is_last_batch
            and not trainer.fit_loop._should_accumulate()
        ):
            self.save(trainer)

    def _step_is_due(self, trainer: Trainer) -> bool:
        return self.every_n_steps > 0 and trainer.global_step - self.saved_step >= self.every_n_steps

    def _is_stopping(self, trainer: Trainer) -> bool:
        # A signal may reach one process alone, and all of them have to save together.
        told = trainer.received_sigterm and trainer.world_size == 1
        return trainer.should_stop or told or trainer.global_step == trainer.max_steps

    def _validation_is_due(self, trainer: Trainer) -> bool:
        fetcher = trainer.fit_loop._data_fetcher
        return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)

    def save(self, trainer: Trainer) -> None:
        """Write the checkpoint and rename: `last` becomes `previous`, the new file becomes `last`."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, FiniteGuard):
                callback.before_save(trainer)
        folder = Path(self.folder or trainer.default_root_dir)
        before, improved = self.best, self._improved(trainer)
        if improved:
            self.best = float(trainer.callback_metrics[self.monitor])
        failure: BaseException | None = None
        try:
            trainer.save_checkpoint(folder / INCOMING, weights_only=False)
        except (OSError, CheckpointException) as error:
            failure = error
            # The other processes wait where this one would have come to after writing.
            trainer.strategy.barrier("Trainer.save_checkpoint")
        if failure is None and trainer.is_global_zero:
            try:
                rotate(folder, keep_best=improved)
            except OSError as error:
                failure = error
        self.saved_step = trainer.global_step
        warned = self.failure is not None
        self.failure = failure
        if failure is not None:
            self.best = before
        if failure is not None and not warned:
            rank_zero_warn(
                f"The checkpoint of step {trainer.global_step} could not be written to {folder} ({brief(failure)}). The "
                "earlier checkpoints are as they were, and training goes on; the next save tries again. Make room on the disk.",
                stacklevel=2,
            )

    def _improved(self, trainer: Trainer) -> bool:
        # A metric of earlier weights says nothing of these.
        if not self.keep_best or trainer.global_step != self.validated_step:
            return False
        value = trainer.callback_metrics.get(self.monitor)
        # nan where nothing could be measured
        return value is not None and not math.isnan(value) and (self.best is None or float(value) > self.best)


@rank_zero_only
def rotate(folder: Path, keep_best: bool = False) -> None:
    """`last` becomes `previous` and the incoming checkpoint becomes `last`; each is whole at every moment."""
    incoming, last, previous = folder / INCOMING, folder / LAST, folder / PREVIOUS
    if keep_best and incoming.is_file():
        link = folder / f".{BEST}.partial"
        link.unlink(missing_ok=True)
        try:
            os.link(incoming, link)  # a second name costs no space
        except OSError:
            shutil.copyfile(incoming, link)
        os.replace(link, folder / BEST)
    if last.exists():
        # A folder cannot be renamed over anything, nor anything over it; `last` is still there.
        if previous.is_dir():
            shutil.rmtree(previous)
        elif last.is_dir():
            previous.unlink(missing_ok=True)
        os.replace(last, previous)
    os.replace(incoming, last)
    flush_folder(folder)
