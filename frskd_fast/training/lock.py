"""One process at a time trains in a run's folder."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path

from .errors import Refusal

try:
    import fcntl
except ImportError:  # not on this system, and then there are no locks
    fcntl = None  # type: ignore[assignment]


_held: set[int] = set()  # descriptors of locked files


def _forget() -> None:
    """In a forked process, which may outlive the one that holds the locks."""
    while _held:
        os.close(_held.pop())


if fcntl is not None:
    os.register_at_fork(after_in_child=_forget)


class RunLock:
    """Holds the lock of a run's folder: a file beside it, which the system unlocks when its process ends, however it ends.

    It lies beside the folder because `--fresh` renames that. It holds the process and the host for the message. Where no
    file can be made there, or the file system has no locks, there is none.

    Args:
        folder: of the run; need not exist yet.

    Raises:
        Refusal: when another process holds the lock.

    Example:
        >>> import tempfile
        >>> lock = RunLock(Path(tempfile.mkdtemp()) / "run")
        >>> lock.path.name, lock.taken_over
        ('.run.lock', None)
        >>> lock.release()
    """

    def __init__(self, folder: Path) -> None:
        folder = folder.resolve()
        self.path = folder.with_name(f".{folder.name}.lock") if folder.name else folder / ".lock"
        self.taken_over: str | None = None  # of whom a lock was left behind
        self._descriptor: int | None = None
        if fcntl is None:
            return
        try:
            self._descriptor = self._taken(folder)
        except OSError:
            return
        self.taken_over = _holder(self._descriptor)
        with contextlib.suppress(OSError):  # on a full disk it is a lock all the same
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode(), 0)

    def _taken(self, folder: Path) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Whoever held the file may have removed it since it was opened; then it is no lock any more.
                if os.path.exists(self.path) and os.path.samestat(os.fstat(descriptor), os.stat(self.path)):
                    _held.add(descriptor)
                    return descriptor
                os.close(descriptor)
            except BlockingIOError:
                holder = _holder(descriptor) or "Another process"
                os.close(descriptor)
                raise Refusal(
                    f"{holder} is training in {folder}; wait for it, or give --run_dir another folder."
                ) from None
            except OSError:
                os.close(descriptor)
                raise

    def release(self) -> None:
        """Give the lock back and remove its file."""
        if self._descriptor is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            _held.discard(self._descriptor)
            self._descriptor = None


def _holder(descriptor: int) -> str | None:
    """The process that wrote the file, in words; None where nobody did."""
    try:
        content = json.loads(os.pread(descriptor, 4096, 0))
        return f"Process {int(content['process'])} on {content['host']}"
    except (ValueError, KeyError, TypeError, OSError):
        return None
