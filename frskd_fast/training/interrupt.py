"""Ctrl-C during training."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

from lightning.pytorch import Trainer

from .beginning import Beginning


class Interrupt:
    """Within it the first SIGINT (Ctrl-C) stops a fit as SIGTERM does, and a second one at once.

    Args:
        trainer: whose fit it is.
        beginning: tells whether there is anything to save yet; before, the first SIGINT stops at once.
    """

    def __init__(self, trainer: Trainer, beginning: Beginning) -> None:
        self.trainer, self.beginning = trainer, beginning
        self.process = os.getpid()
        self.times = 0
        self.before: Any = None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # no other may set a handler
            self.before = signal.signal(signal.SIGINT, self.told)
        return self

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)

    def told(self, number: int, frame: Any) -> None:
        """The handler. Workers, forked from this process, have it too; the trainer's process ends them."""
        if os.getpid() != self.process:
            return
        self.times += 1
        if self.times > 1 or not self.beginning.over:
            raise KeyboardInterrupt
        # Lightning asks for it after each step, and tells it to the other processes.
        self.trainer._signal_connector.received_sigterm = True
