"""events.jsonl: what a run tells the world, one JSON object a line, and the only channel from a run to the service.

A file rather than a socket or a queue: it outlives both the run and the server, a tail of it costs one `read`, and
after a power cut it is at worst one half-written line short. One process writes, any number read.

Not covered: two writers on one file (only rank 0 of a run emits), and durability of the last lines against a power
cut (lines are handed to the kernel at once, but not synced).
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

KINDS = frozenset({"metric", "progress", "heartbeat", "artifact", "message", "error"})
"""Every kind of event that a run may emit."""

MAX_LINE_BYTES = 64 * 1024
"""Longest line that is written; readers skip longer ones, so that a hostile file costs no memory."""

READ_BYTES = 4 * 1024 * 1024
"""Most bytes that one `read` takes from the file."""

_RESERVED = frozenset({"seq", "time", "kind"})


def _strict(value: Any, where: str) -> Any:
    """Turn a value into strict JSON: non-finite floats become null, paths strings, tuples lists."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _strict(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_strict(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise ValueError(f"event field {where} is a {type(value).__name__}; give plain numbers, strings, lists or mappings")


class EventLog:
    """Append-only writer of events.jsonl; safe to use from several threads of one process.

    Opening an existing file cuts a half-written last line (the writer was killed inside it) and goes on counting
    from the last whole event.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the file, and its folder.

        Args:
            path: where the events go; the parent folder is created.

        Raises:
            OSError: the file cannot be created or opened.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._seq = self._recover()
        except BaseException:
            os.close(self._fd)
            self._fd = -1
            raise

    def emit(self, kind: str, /, **data: Any) -> dict[str, Any]:
        """Append one event and hand it to the kernel before returning.

        Args:
            kind: one of `KINDS`.
            **data: the event's fields; non-finite floats are written as null.

        Returns:
            The event as written, with `seq` (from 1, no gaps) and `time` (seconds since the epoch).

        Raises:
            ValueError: unknown kind, reserved field name, a value that is no JSON, or a line over `MAX_LINE_BYTES`.
            OSError: the disk is full or the log is closed; nothing is left half-written and `seq` has not moved.
        """
        if kind not in KINDS:
            raise ValueError(f"unknown event kind {kind!r}; known kinds are {', '.join(sorted(KINDS))}")
        if clash := _RESERVED & data.keys():
            raise ValueError(f"event fields {', '.join(sorted(clash))} are set by the log itself; choose other names")
        fields = {name: _strict(value, name) for name, value in data.items()}
        with self._lock:
            event = {"seq": self._seq + 1, "time": round(time.time(), 6), "kind": kind, **fields}
            line = json.dumps(event, allow_nan=False, separators=(",", ":")).encode() + b"\n"
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"event of {len(line)} bytes is over the limit of {MAX_LINE_BYTES}; shorten its text")
            self._append(line)
            self._seq += 1
        return event

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, line: bytes) -> None:
        start = os.fstat(self._fd).st_size
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError:
            os.ftruncate(self._fd, start)
            raise

    def _recover(self) -> int:
        """Cut what follows the last newline; return the seq of the last whole event (0 when there is none)."""
        size = os.fstat(self._fd).st_size
        tail, start = b"", size
        while start > 0:
            step = min(64 * 1024, start)
            start -= step
            tail = os.pread(self._fd, step, start) + tail
            whole, newline, half = tail.rpartition(b"\n")
            if not newline:
                if start > 0:
                    continue
                os.ftruncate(self._fd, 0)
                return 0
            if half:
                os.ftruncate(self._fd, size - len(half))
                size, tail = size - len(half), tail[: len(tail) - len(half)]
            lines = whole.split(b"\n")
            # The first piece may begin in the middle of a line unless the file starts there.
            for line in reversed(lines if start == 0 else lines[1:]):
                event = _decode(line)
                if event is not None:
                    return int(event["seq"])
        return 0


def _decode(line: bytes) -> dict[str, Any] | None:
    """Parse one line; None for what no `EventLog` wrote (a line of zeros after a power cut, say)."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or type(event.get("seq")) is not int or not isinstance(event.get("kind"), str):
        return None
    return event


def read(
    path: Path, offset: int = 0, *, lines: int | None = None, size: int = READ_BYTES
) -> tuple[list[dict[str, Any]], int]:
    """Read the whole lines from a byte offset on; call again with the returned offset to go on.

    A half-written last line is left for the next call. Lines that are no events are skipped. At most `size` bytes
    are taken at once, so a caller that wants all of a long file calls until the offset stands still.

    Args:
        path: an events.jsonl; one that does not exist (yet) reads as empty.
        offset: bytes already consumed.
        lines: how many are taken at most; None: as many as there are.
        size: bytes taken at most; more than `MAX_LINE_BYTES`.

    Returns:
        The events, oldest first, and the offset behind the last whole line.

    Raises:
        OSError: the file exists and cannot be read.
    """
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            chunk = file.read(size)
    except FileNotFoundError:
        return [], offset
    end = chunk.rfind(b"\n") + 1
    if end == 0:
        # Nobody writes lines this long: step over it, its tail will be skipped as no event.
        return [], offset + (len(chunk) if len(chunk) > MAX_LINE_BYTES else 0)
    whole = chunk[:end].split(b"\n")[:-1]
    if lines is not None and len(whole) > lines:
        whole = whole[:lines]
        end = sum(map(len, whole)) + lines
    events = (_decode(line) for line in whole if line and len(line) < MAX_LINE_BYTES)
    return [event for event in events if event is not None], offset + end
