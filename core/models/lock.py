"""Folders that appear whole or not at all, and are made by one process at a time."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_MADE, _OLD, _PART = ".+made.", ".+old.", ".+part"
"""Behind a folder's name; no model's name has a plus, so ``a`` never takes what belongs to ``a.0`` for its own."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on ``path`` (made if missing); waits for whoever has it, and ends with the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)


@contextmanager
def appearing(directory: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``directory`` that takes its name when the block ends without an error.

    All files are flushed to the disk before the rename. A folder that was already there is replaced; after an error
    nothing remains of the new one.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{directory.name}{_MADE}", dir=directory.parent))
    try:
        made.chmod(0o755)
        yield made
        _put(made, directory)
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextmanager
def once(directory: Path, *, keep: bool = False) -> Iterator[Path | None]:
    """Makes a model's directory exactly once, whichever process comes first.

    Under a lock of the directory's own, yields an empty folder that becomes ``directory``, or None if another process
    has made it already. What a killed process left half-made is removed; with ``keep`` it is what is yielded, and an
    error leaves it for the next one.
    """
    with locked(directory.parent / f".{directory.name}.lock"):
        if (directory / "config.json").is_file():
            yield None
            return
        for left in directory.parent.iterdir():
            if left.is_dir() and left.name.startswith((f".{directory.name}{_MADE}", f".{directory.name}{_OLD}")):
                shutil.rmtree(left)
        if not keep:
            with appearing(directory) as fresh:
                yield fresh
            return
        part = directory.with_name(f".{directory.name}{_PART}")
        part.mkdir(exist_ok=True)
        try:
            yield part
            _put(part, directory)
        finally:
            with suppress(OSError):
                part.rmdir()  # nothing in it, or it has its name


def arriving(directory: Path) -> int:
    """Bytes of what is on its way to ``directory``: whoever watches them grow knows that somebody works on it."""
    total = 0
    for place in directory.parent.glob(f".{glob.escape(directory.name)}.+*"):
        for folder, _, names in os.walk(place):
            for name in names:
                with suppress(OSError):  # renamed just now
                    total += os.lstat(os.path.join(folder, name)).st_size
    return total


def _put(made: Path, directory: Path) -> None:
    for file in made.rglob("*"):
        _flush(file)
    _flush(made)
    if directory.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{directory.name}{_OLD}", dir=directory.parent))
        directory.rename(old / directory.name)
        made.rename(directory)
        shutil.rmtree(old)
    else:
        made.rename(directory)
    _flush(directory.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
