"""What the scheduler asks of a place where runs execute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Handle:
    """A started run: enough to find it again, and to be sure that it is the one meant."""

    job_id: str
    directory: Path
    attempt: int
    pid: int
    started: int
    """Start time of ``pid``, in the executor's own unit."""
    boot_id: str


@dataclass(frozen=True)
class Running:
    """The run is alive."""

    handle: Handle


@dataclass(frozen=True)
class Exited:
    """The run has ended and left no process; exactly one of ``code`` and ``signal`` is set."""

    attempt: int
    code: int | None
    signal: int | None
    finished_at: float
    last_lines: tuple[str, ...]


@dataclass(frozen=True)
class Gone:
    """No process is left, and how it ended is unknown: reboot, replaced container, or a killed supervisor."""

    attempt: int | None
    """The last attempt that was started; None: none ever was."""


Status = Running | Exited | Gone


class AlreadyRunning(RuntimeError):
    """Another run of this job is alive: look at it with ``recover`` instead of starting a second one."""


class StaleAttempt(RuntimeError):
    """This or a newer attempt of the job has been started already: look at it with ``recover``."""


class Executor(Protocol):
    """Starts runs, watches them, ends them. All calls return quickly, except ``stop``."""

    def submit(
        self, job_id: str, argv: Sequence[str], env: Mapping[str, str], directory: Path, *, attempt: int, token: str
    ) -> Handle:
        """Start a run.

        Args:
            job_id: the job; every process of the run carries it.
            argv: program and arguments, no shell.
            env: variables added to the executor's own.
            directory: where the run's files are, and its working directory.
            attempt: must grow with every start of the same directory.
            token: the lease token, recorded for the reader.

        Returns:
            The started run.

        Raises:
            AlreadyRunning: a run in this directory is alive.
            StaleAttempt: ``attempt`` is not newer than the last one.
            OSError: it cannot be started now; try again later.
        """
        ...

    def poll(self, handle: Handle) -> Status:
        """How the run is.

        Args:
            handle: from ``submit`` or ``recover``.

        Returns:
            Its status.
        """
        ...

    def terminate(self, handle: Handle) -> None:
        """Ask the run to stop at a checkpoint (SIGTERM).

        Args:
            handle: the run.
        """
        ...

    def kill(self, handle: Handle) -> int:
        """End every process of the run, whatever group or session it moved to.

        Args:
            handle: the run.

        Returns:
            Processes that are still alive; the caller tries again until it is 0.
        """
        ...

    def stop(self, handle: Handle, grace: float) -> Status:
        """``terminate``, wait, and after the grace time ``kill``.

        Args:
            handle: the run.
            grace: seconds.

        Returns:
            ``Exited`` or ``Gone``.
        """
        ...

    def tidy(self) -> None:
        """Collect ended children of this process, so that none stays a zombie; called at every tick."""
        ...

    def recover(self, directory: Path, job_id: str) -> Status:
        """What became of a run that this executor may not have started itself; what is not adopted is ended.

        Args:
            directory: the run's folder.
            job_id: the job.

        Returns:
            Its status.

        Raises:
            OSError: it cannot be said now; EAGAIN: what is to be ended has not ended yet. Try again.
        """
        ...
