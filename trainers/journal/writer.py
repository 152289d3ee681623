"""Writing a journal: by one process, at its end alone, and on the disk when ``append`` returns.

A record is handed to the kernel in one write and then synced, so a killed process loses none that ``append`` returned
from, and a power cut at most the last ``sync_every - 1`` of them. A new journal appears under its name with a whole
header or not at all.

Not covered: file systems without hard links or without locks (a journal is made by linking it, and locked by
``flock``), and a process that goes on writing in a fork of itself.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from trainers.journal import disk
from trainers.journal.header import DIGEST, Header, differing
from trainers.journal.reader import Journal, layout_of, scan
from trainers.journal.record import TAG, Record, link
from trainers.journal.seal import SIZE, Seal


class Writer:
    """Appends the records of one run to its journal; made by ``create`` or ``reopen``."""

    def __init__(self, path: Path, descriptor: int, journal: Journal, sync_every: int) -> None:
        """Takes over an open file whose end is that of the journal.

        Args:
            path: Its name.
            descriptor: Opened for appending and locked; the writer closes it.
            journal: What it holds.
            sync_every: Records from one sync to the next.
        """
        self.path = path
        self.header = journal.header
        self.cut = journal.cut
        """Why the end of the file was cut off when it was opened; None when nothing was."""
        self.step = len(journal)
        """The last step that the journal holds."""
        self._descriptor = descriptor
        self._layout = layout_of(journal.header)
        self._chain, self._end = journal.chain, journal.end
        self._every, self._waiting = sync_every, 0

    @classmethod
    def create(cls, path: Path, header: Header, *, first: Iterable[Record] = (), sync_every: int = 1) -> Writer:
        """Begins a journal.

        Args:
            path: Where; its folder exists.
            header: What holds for all records.
            first: Steps that it begins with, from 1 on.
            sync_every: Records from one sync to the next. 1 makes every step safe from a power cut.

        Returns:
            A writer that expects the step after those.

        Raises:
            ValueError: There is a file of that name already, or a step cannot be written.
            OSError: The file cannot be written; it is then not there.
        """
        assert sync_every >= 1
        data = _encode(header, first)
        journal = scan(data)
        assert journal.cut is None, journal.cut
        hidden = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        descriptor = os.open(hidden, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            disk.lock(descriptor, path)
            disk.write(descriptor, data, 0)
            os.fsync(descriptor)
            # Unlike a rename, a link never takes the name from a journal that is there.
            os.link(hidden, path)
            disk.sync_folder(path)
        except FileExistsError as error:
            os.close(descriptor)
            raise ValueError(f"{path} exists already: reopen it, or give another name") from error
        except BaseException:
            os.close(descriptor)
            raise
        finally:
            hidden.unlink(missing_ok=True)
        return cls(path, descriptor, journal, sync_every)

    @classmethod
    def reopen(cls, path: Path, header: Header | None = None, *, sync_every: int = 1, unseal: bool = False) -> Writer:
        """Goes on with a journal after its last good record; what follows that is cut off.

        What is cut off is first kept beside the journal, as ``<name>.cut-<offset>-<digest>``.

        Args:
            path: The file.
            header: What it must say, ``about`` and ``parent`` apart; None takes it as it is.
            sync_every: As in ``create``.
            unseal: Take off the seal of a finished run, to go on with it.

        Returns:
            A writer that expects the step after ``writer.step``.

        Raises:
            ValueError: It is no journal, its header is damaged or another, it is sealed, or somebody writes to it.
            OSError: The file cannot be read or written.
        """
        assert sync_every >= 1
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        try:
            disk.lock(descriptor, path)
            file = disk.read(descriptor)
            try:
                journal = scan(file)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            if header is not None and (names := differing(header, journal.header)):
                raise ValueError(
                    f"{path} is the journal of a run with other {', '.join(names)}: give a fresh output_dir, or fork it"
                )
            if journal.sealed and not unseal:
                raise ValueError(f"{path} is sealed: its run is finished. Fork it to go on from one of its steps")
            end = journal.end - (SIZE if journal.sealed else 0)
            if journal.cut is not None:
                disk.keep(path, file[journal.end :], journal.end)
            if end < len(file):
                os.ftruncate(descriptor, end)
                os.fsync(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor, dataclasses.replace(journal, seal=None, end=end), sync_every)

    def append(self, record: Record) -> None:
        """Appends the next step.

        Args:
            record: Its number is one more than ``step``.

        Raises:
            ValueError: It is another step, its numbers cannot be written, or the journal is closed.
            OSError: The disk is full or fails; the record is then not in the journal, and may be appended again. After
                a failed sync the writer is closed: only a reopened journal says what it holds.
        """
        if record.step != self.step + 1:
            raise ValueError(f"the journal goes on with step {self.step + 1}, not {record.step}")
        body = self._layout.pack(record)
        chain = link(self._chain, body)
        self._append(body + chain[:TAG])
        self.step, self._chain = record.step, chain
        self._waiting += 1
        if self._waiting >= self._every:
            self.sync()

    def sync(self) -> None:
        """Waits until everything appended is on the disk.

        Raises:
            ValueError: The journal is closed.
            OSError: The disk fails; the writer is then closed.
        """
        self._check_open()
        try:
            os.fsync(self._descriptor)
        except OSError:
            # The kernel may have dropped what it could not write, and a second sync would not tell.
            self._close()
            raise
        self._waiting = 0

    def seal(self, tensors: bytes) -> None:
        """Says that the run is finished, and closes.

        Args:
            tensors: SHA-256 of the tuned tensors, 32 bytes, from ``trainers.journal.tensors.digest``.

        Raises:
            ValueError: The journal is closed.
            OSError: The disk is full or fails; the journal is then not sealed.
        """
        assert len(tensors) == DIGEST
        self._append(Seal(self.step, self._chain, tensors).pack())
        self.close()

    def close(self) -> None:
        """Syncs and closes; closing twice is harmless."""
        if self._descriptor >= 0:
            self.sync()
            self._close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, data: bytes) -> None:
        self._check_open()
        disk.write(self._descriptor, data, self._end)
        self._end += len(data)

    def _check_open(self) -> None:
        if self._descriptor < 0:
            raise ValueError(f"{self.path} is closed: reopen it")

    def _close(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1


def _encode(header: Header, records: Iterable[Record]) -> bytes:
    parts = [header.encode()]
    layout, chain = layout_of(header), parts[0][-DIGEST:]
    for record in records:
        body = layout.pack(record)
        chain = link(chain, body)
        parts.append(body + chain[:TAG])
    return b"".join(parts)
