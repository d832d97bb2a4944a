"""Whether a run's setting-up is over, and what signals do before and after."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from .checkpoints import write_atomically
from .recipe_files import CONFIG


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

    on_validation_start = on_test_start = on_predict_start = on_sanity_check_start

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.over = False  # the training images are still to come

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.over = True
        if self.config is not None and trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / CONFIG, self.config)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validated = self.validated or not trainer.sanity_checking


class Interrupt:
    """Within it the first SIGINT (Ctrl-C), SIGHUP or SIGUSR1 stops a fit as SIGTERM does, and a second SIGINT at once.

    Clusters announce with SIGUSR1 that they are going to take the node back. A signal that is ignored (nohup), or that
    somebody else handles (Lightning requeues jobs of SLURM), is left alone.

    Args:
        trainer: whose fit it is.
        beginning: tells whether there is anything to save yet; before, the first SIGINT stops at once.

    Attributes:
        times: how often SIGINT came.
        number: the signal that came first, None before.
    """

    def __init__(self, trainer: Trainer, beginning: Beginning) -> None:
        self.trainer, self.beginning = trainer, beginning
        self.process = os.getpid()
        self.times = 0
        self.number: signal.Signals | None = None
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # no other may set a handler
            self.before[signal.SIGINT] = signal.signal(signal.SIGINT, self.told)
            for name in ("SIGHUP", "SIGUSR1"):
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                    self.before[number] = signal.signal(number, self.told)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def told(self, number: int, frame: Any) -> None:
        """The handler. Workers, forked from this process, have it too; the trainer's process ends them."""
        if os.getpid() != self.process:
            return
        self.number = self.number or signal.Signals(number)
        self.times += number == signal.SIGINT
        if self.times > 1 or not self.beginning.over:
            raise KeyboardInterrupt
        # Lightning asks for it after each step, and tells it to the other processes.
        self.trainer._signal_connector.received_sigterm = True
