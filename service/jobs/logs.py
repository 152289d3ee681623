"""The run's log: byte ranges with absolute offsets that survive rotation. Standard library only.

The log is a sequence of files ``run.log.<offset of its first byte>``. A full one is followed by a new file, and no file
is ever renamed, so a reader cannot be confused by a rotation; when all together pass the quota, the oldest goes.
A reader that asks for bytes that are gone gets the oldest ones there are, and sees it by the offset.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

PREFIX = "run.log."
DEFAULT_QUOTA = 100 * 1024 * 1024
"""Bytes of log kept for one job."""

_SEGMENTS = 8


@dataclass(frozen=True)
class Piece:
    """Bytes of a log; ``offset`` is where ``data`` begins, ``end`` where the log ended when it was read."""

    offset: int
    data: bytes
    end: int

    @property
    def next(self) -> int:
        """Where to go on."""
        return self.offset + len(self.data)


def segments(directory: Path) -> list[tuple[int, Path]]:
    """The log's files, oldest first.

    Args:
        directory: the job's folder.

    Returns:
        (absolute offset of the first byte, path).
    """
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    found = [(name, name.removeprefix(PREFIX)) for name in names if name.startswith(PREFIX)]
    return sorted((int(start), directory / name) for name, start in found if start.isdigit())


def span(directory: Path) -> tuple[int, int]:
    """First byte still there, and the end.

    Args:
        directory: the job's folder.

    Returns:
        Absolute offsets; (0, 0) when nothing was written.
    """
    while True:
        files = segments(directory)
        if not files:
            return 0, 0
        with contextlib.suppress(FileNotFoundError):  # the oldest went while we looked
            return files[0][0], files[-1][0] + files[-1][1].stat().st_size


def read(directory: Path, offset: int = 0, limit: int = 64 * 1024) -> Piece:
    """Bytes from an absolute offset on.

    Args:
        directory: the job's folder.
        offset: where to begin; bytes that are gone are skipped.
        limit: bytes at most.

    Returns:
        A piece; empty at the end of the log.
    """
    first, end = span(directory)
    offset = max(offset, first)
    data = b""
    for start, path in segments(directory):
        position = offset + len(data)
        if len(data) >= limit or start > position:
            break
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            if position < start + os.fstat(file.fileno()).st_size:
                file.seek(position - start)
                data += file.read(limit - len(data))
    return Piece(offset, data, max(end, offset + len(data)))


class LogWriter:
    """Appends to the log; never raises for a full disk: what cannot be written is counted, and told when it can."""

    def __init__(self, directory: Path, quota: int = DEFAULT_QUOTA) -> None:
        """Continue the log where it ends.

        Args:
            directory: the job's folder.
            quota: bytes kept.
        """
        self._directory = directory
        self._quota = quota
        self._size = max(4096, quota // _SEGMENTS)
        self._fd: int | None = None
        self._start, self._end = 0, span(directory)[1]
        self.lost = 0

    def write(self, data: bytes) -> None:
        """Append.

        Args:
            data: bytes of the run's output.
        """
        if self.lost:
            note = f"\n[{self.lost} bytes of output were lost: the disk was full]\n".encode()
            if self._append(note) < len(note):
                self.lost += len(data)
                return
            self.lost = 0
        self.lost += len(data) - self._append(data)

    def close(self) -> None:
        """Close the newest file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _append(self, data: bytes) -> int:
        """Write what can be written; return how many bytes that were."""
        done = 0
        try:
            while done < len(data):
                room = self._start + self._size - self._end
                if self._fd is None or room <= 0:
                    self._rotate()
                    room = self._size
                count = os.write(self._fd, data[done : done + room])  # type: ignore[arg-type]
                done += count
                self._end += count
        except OSError:
            pass
        return done

    def _rotate(self) -> None:
        self.close()
        path = self._directory / f"{PREFIX}{self._end:015d}"
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._start = self._end
        for start, old in segments(self._directory)[:-1]:
            if start + self._quota <= self._end + self._size:
                old.unlink(missing_ok=True)
