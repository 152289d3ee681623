"""What the scheduler holds in memory for one leased job. All of it can be found again in the database and on disk."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from service.db.tables import Job
from service.executors.base import Handle
from service.jobs import names
from service.jobs.supervisor import read_json, write_json

Phase = Literal["validation", "run"]
STOP = "server-stop.json"
"""Which attempt the server ended because it was itself stopped; beside the other files of the process."""


@dataclass
class Live:
    """A job that this scheduler has a lease on."""

    job_id: str
    token: str
    phase: Phase
    handle: Handle | None = None
    """The process; None while it could not be started yet."""
    asked_to_stop: bool = False
    """SIGTERM was sent by this scheduler."""
    stop_by: float = 0.0
    """Then SIGKILL is due. This and ``not_before`` are on the monotonic clock: the other may be set back."""
    not_before: float = 0.0
    """After a start that failed: not tried again earlier."""
    tries: int = 0
    """Starts that failed."""
    behind: bool = False
    """There are events of the run that the database does not have yet."""

    stopped: int | None = None
    """The attempt that this server ended because it was itself stopped."""

    failures: int = 0
    """Looks in a row that ended in the same error of our own."""
    failed_with: str = ""
    """That error."""

    def failed(self, error: Exception) -> int:
        """Count an error of our own.

        Args:
            error: what came out of a look at the job.

        Returns:
            How often in a row it was this one.
        """
        told = repr(error)
        self.failures = self.failures + 1 if told == self.failed_with else 1
        self.failed_with = told
        return self.failures

    def mark_stop(self, home: Path) -> None:
        """Note that the server ends this process because it is itself stopped, before the signal is sent.

        Args:
            home: the data folder; the next server reads it there, if the process ends only then.
        """
        assert self.handle is not None
        self.stopped = self.handle.attempt
        with suppress(OSError):  # the disk is full: then the next server takes it for a stop from outside
            write_json(self.directory(home) / STOP, {"attempt": self.stopped})

    def was_stopped(self, home: Path, attempt: int | None) -> bool:
        """Whether a server ended this attempt because it was itself stopped.

        Args:
            home: the data folder.
            attempt: which start of the process.

        Returns:
            True: its end says nothing about the job.
        """
        if attempt is None:
            return False
        return attempt in (self.stopped, (read_json(self.directory(home) / STOP) or {}).get("attempt"))

    def directory(self, home: Path) -> Path:
        """Folder of the process of this phase.

        Args:
            home: the data folder.

        Returns:
            The job's folder, or the one for validation in it.
        """
        place = names.validation_directory if self.phase == "validation" else names.job_directory
        return place(home, self.job_id)


def phase_of(job: Job) -> Phase:
    """Which process a leased job has: a run is claimed only after validation, and that sets ``started_at``.

    Args:
        job: the row.

    Returns:
        The phase.
    """
    return "validation" if job.started_at is None else "run"
