"""One server a data folder: ``server.lock`` is held (flock) as long as the server lives, however it ends."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from pathlib import Path


class FolderInUse(RuntimeError):
    """Another server holds the data folder."""

    def __init__(self, home: Path, pid: int | None) -> None:
        """Name the holder.

        Args:
            home: the data folder.
            pid: of the server that holds it, if it could be read.
        """
        self.pid = pid
        who = f"process {pid}" if pid is not None else "another process"
        super().__init__(f"the data folder {home} is in use by {who}; stop that server or set GRADHELM_HOME")


class FolderLock:
    """The lock of one data folder. ``node`` is the folder's own name, kept over restarts: leases are held under it."""

    def __init__(self, home: Path) -> None:
        """Remember the folder; nothing is locked yet.

        Args:
            home: the data folder.
        """
        self._home = home
        self._fd: int | None = None
        self.node = ""

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            FolderInUse: another server has it; the error names its pid.
        """
        self._home.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(self._home / "server.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = _content(fd).get("pid")
            os.close(fd)
            raise FolderInUse(self._home, pid if isinstance(pid, int) else None) from None
        node = _content(fd).get("node")
        self.node = node if isinstance(node, str) and node else f"node-{secrets.token_hex(8)}"
        # Fixed length and one write: a disk that is full cannot take the name away from a file that has its size.
        text = json.dumps({"pid": os.getpid(), "node": self.node}).ljust(128) + "\n"
        os.pwrite(fd, text.encode(), 0)
        self._fd = fd

    def release(self) -> None:
        """Let go; the file stays, with the folder's name in it."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _content(fd: int) -> dict[str, object]:
    try:
        value = json.loads(os.pread(fd, 4096, 0))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
