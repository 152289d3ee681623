"""What a writer asks of the disk."""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path


def lock(descriptor: int, path: Path) -> None:
    """Takes the file until the descriptor is closed or the process ends; ValueError when it is taken."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{path} is being written by another process: wait for it, or end it") from error


def read(descriptor: int) -> bytes:
    """All bytes of the file."""
    with open(descriptor, "rb", closefd=False) as file:
        file.seek(0)
        return file.read()


def write(descriptor: int, data: bytes, end: int) -> None:
    """Appends all of ``data``, or leaves the file as long as it was."""
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except BaseException:
        os.ftruncate(descriptor, end)
        raise


def keep(path: Path, tail: bytes, end: int) -> None:
    """Writes what is about to be cut off at ``end`` into a file of its own; the same tail always into the same."""
    kept = path.with_name(f"{path.name}.cut-{end}-{hashlib.sha256(tail).hexdigest()[:16]}")
    with kept.open("wb") as file:
        file.write(tail)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(kept)


def sync_folder(path: Path) -> None:
    """Makes the name of a file durable."""
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
