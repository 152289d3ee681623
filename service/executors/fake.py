"""Runs in memory, with the same answers as the local executor: for tests of what stands above it."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from service.executors.base import AlreadyRunning, Exited, Gone, Handle, Running, StaleAttempt, Status


@dataclass(frozen=True)
class Behaviour:
    """What a run does: ``exits`` at once with a code or a negative signal, or runs until told otherwise."""

    exits: int | None = None
    on_term: int | None = 3
    """Code after SIGTERM; None: it is ignored."""


@dataclass
class FakeRun:
    """The last run of a folder."""

    handle: Handle
    behaviour: Behaviour
    status: Status


class FakeExecutor:
    """An executor whose runs end when the test says so."""

    def __init__(self, behave: Callable[[Sequence[str], Path], Behaviour] | None = None) -> None:
        """Say how runs behave.

        Args:
            behave: from argv and folder to a behaviour; None: every run goes on until it is ended.
        """
        self._behave = behave or (lambda *_: Behaviour())
        self._pids = itertools.count(1)
        self.runs: dict[Path, FakeRun] = {}
        self.starts: list[tuple[str, Path]] = []

    def submit(
        self, job_id: str, argv: Sequence[str], env: Mapping[str, str], directory: Path, *, attempt: int, token: str
    ) -> Handle:
        """See ``Executor.submit``.

        Args:
            job_id: the job.
            argv: given to ``behave``.
            env: not used.
            directory: the run's folder.
            attempt: must grow.
            token: not used.

        Returns:
            The started run.

        Raises:
            AlreadyRunning: a run in this directory is alive.
            StaleAttempt: a newer attempt was started.
        """
        del env, token
        last = self.runs.get(directory)
        if last is not None and isinstance(last.status, Running):
            raise AlreadyRunning(f"a run of {job_id} is alive")
        if last is not None and last.handle.attempt >= attempt:
            raise StaleAttempt(f"a newer attempt than {attempt} of {job_id} was started")
        pid = next(self._pids)
        handle = Handle(job_id, directory, attempt, pid, pid, "memory")
        behaviour = self._behave(argv, directory)
        self.runs[directory] = FakeRun(handle, behaviour, Running(handle))
        self.starts.append((job_id, directory))
        if behaviour.exits is not None:
            self.finish(directory, behaviour.exits)
        return handle

    def poll(self, handle: Handle) -> Status:
        """See ``Executor.poll``.

        Args:
            handle: the run.

        Returns:
            Its status.
        """
        run = self.runs[handle.directory]
        return run.status if run.handle == handle else Gone(handle.attempt)

    def terminate(self, handle: Handle) -> None:
        """See ``Executor.terminate``.

        Args:
            handle: the run.
        """
        run = self.runs[handle.directory]
        if run.handle == handle and isinstance(run.status, Running) and run.behaviour.on_term is not None:
            self.finish(handle.directory, run.behaviour.on_term)

    def kill(self, handle: Handle) -> int:
        """See ``Executor.kill``.

        Args:
            handle: the run.

        Returns:
            0: nothing survives.
        """
        run = self.runs.get(handle.directory)
        if run is not None and run.handle == handle and isinstance(run.status, Running):
            self.finish(handle.directory, -signal.SIGKILL)
        return 0

    def stop(self, handle: Handle, grace: float) -> Status:
        """See ``Executor.stop``; does not wait.

        Args:
            handle: the run.
            grace: not used.

        Returns:
            Its status.
        """
        del grace
        self.terminate(handle)
        self.kill(handle)
        return self.poll(handle)

    def tidy(self) -> None:
        """See ``Executor.tidy``: there are no processes."""

    def recover(self, directory: Path, job_id: str) -> Status:
        """See ``Executor.recover``.

        Args:
            directory: the run's folder.
            job_id: not used.

        Returns:
            Its status.
        """
        del job_id
        run = self.runs.get(directory)
        return run.status if run is not None else Gone(None)

    def finish(self, directory: Path, code: int, lines: Sequence[str] = ()) -> None:
        """End a run.

        Args:
            directory: its folder.
            code: exit code, or a negative signal.
            lines: last lines of its log.
        """
        run = self.runs[directory]
        assert isinstance(run.status, Running)
        number = -code if code < 0 else None
        run.status = Exited(run.handle.attempt, code if code >= 0 else None, number, time.time(), tuple(lines))

    def vanish(self, directory: Path) -> None:
        """Lose a run as a reboot does: no process, no exit code.

        Args:
            directory: its folder.
        """
        run = self.runs[directory]
        run.status = Gone(run.handle.attempt)

    def alive(self) -> list[Handle]:
        """Runs that have not ended."""
        return [run.handle for run in self.runs.values() if isinstance(run.status, Running)]
