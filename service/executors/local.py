"""Runs on this machine, each below a supervisor that outlives the server."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import selectors
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import service
from service.executors.base import AlreadyRunning, Exited, Gone, Handle, Running, StaleAttempt, Status
from service.jobs import processes
from service.jobs.logs import DEFAULT_QUOTA
from service.jobs.supervisor import EXIT, LOCK, RECORD, read_json

_KEPT = frozenset({"GRADHELM_HOME", "GRADHELM_WHEEL_DIR"})
_SOURCES = str(Path(service.__file__).resolve().parent.parent)


class LocalExecutor:
    """One supervisor process a run. Holds nothing that matters: everything is in the run's folder and in /proc."""

    def __init__(
        self,
        *,
        threads: int = 1,
        log_quota: int = DEFAULT_QUOTA,
        start_seconds: float = 20.0,
        wait_seconds: float = 5.0,
    ) -> None:
        """Set the limits.

        Args:
            threads: OMP_NUM_THREADS of each run; a resume is bitwise only with the same number.
            log_quota: bytes of log kept a run.
            start_seconds: how long a supervisor may take to answer.
            wait_seconds: how long to wait for a supervisor that is just starting or ending.
        """
        self._threads = threads
        self._log_quota = log_quota
        self._start_seconds = start_seconds
        self._wait_seconds = wait_seconds
        self._children: dict[int, int] = {}

    def submit(
        self, job_id: str, argv: Sequence[str], env: Mapping[str, str], directory: Path, *, attempt: int, token: str
    ) -> Handle:
        """See ``Executor.submit``.

        Args:
            job_id: the job.
            argv: program and arguments.
            env: variables added to ours, from which the server's own settings are left out.
            directory: the run's folder; made if missing.
            attempt: must grow.
            token: recorded.

        Returns:
            The started run.

        Raises:
            AlreadyRunning: a run in this directory is alive.
            StaleAttempt: a newer attempt was started.
            OSError: the supervisor could not be started.
        """
        directory = directory.resolve()
        directory.mkdir(parents=True, exist_ok=True)
        # -S: no site-packages, so a start costs 20 ms whatever is installed
        command = [sys.executable, "-S", "-P", "-m", "service.jobs.supervisor", str(directory), "--job-id", job_id]
        command += ["--attempt", str(attempt), "--token", token, "--quota", str(self._log_quota)]
        command += ["--threads", str(self._threads), "--", *argv]
        mine = {k: v for k, v in os.environ.items() if not k.startswith("GRADHELM_") or k in _KEPT}
        path = os.pathsep.join(filter(None, [_SOURCES, mine.get("PYTHONPATH")]))
        answers, answer = os.pipe()
        try:
            pid = os.posix_spawn(
                sys.executable,
                command,
                {**mine, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", **env},
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, answer, 1),
                    (
                        os.POSIX_SPAWN_OPEN,
                        2,
                        str(directory / "supervisor.log"),
                        os.O_WRONLY | os.O_CREAT | os.O_APPEND,
                        0o644,
                    ),
                ],
                setsid=True,
                setsigmask=[],
                setsigdef=[signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGPIPE],
            )
            os.close(answer)
            answer = -1
            word = _first_line(answers, self._start_seconds)
        finally:
            os.close(answers)
            if answer >= 0:
                os.close(answer)
        started = processes.start_time(pid)
        if word == "ok":
            self._children[pid] = started or 0
            return Handle(job_id, directory, attempt, pid, started or 0, processes.boot_id())
        if word is None and started is not None:
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
        if word == "busy":
            raise AlreadyRunning(f"a run of {job_id} is alive")
        if word == "stale":
            raise StaleAttempt(f"a newer attempt than {attempt} of {job_id} was started")
        raise OSError(f"the supervisor of {job_id} did not start; see {directory / 'supervisor.log'}")

    def poll(self, handle: Handle) -> Status:
        """See ``Executor.poll``; collects a supervisor that is our own ended child.

        Args:
            handle: the run.

        Returns:
            Its status.
        """
        alive = self._alive(handle)
        ended = _exit_of(handle.directory, handle.attempt)  # read after the look: it is written before the end
        if ended is not None:
            return ended
        return Running(handle) if alive else Gone(handle.attempt)

    def terminate(self, handle: Handle) -> None:
        """See ``Executor.terminate``: the supervisor passes SIGTERM on to the run's group.

        Args:
            handle: the run.
        """
        if handle.boot_id == processes.boot_id():
            processes.send(handle.pid, handle.started, signal.SIGTERM)

    def kill(self, handle: Handle) -> int:
        """See ``Executor.kill``.

        Args:
            handle: the run.

        Returns:
            Survivors.
        """
        alive = self._alive(handle)
        left = processes.kill_all(handle.job_id, handle.pid if alive else None)
        if alive and not left:
            deadline = time.monotonic() + self._wait_seconds
            while self._alive(handle) and _exit_of(handle.directory, handle.attempt) is None:
                if time.monotonic() > deadline:  # stopped, or its disk is full
                    processes.send(handle.pid, handle.started, signal.SIGKILL)
                    break
                time.sleep(0.005)
            left = processes.marked(handle.job_id)
        return len(left)

    def stop(self, handle: Handle, grace: float) -> Status:
        """See ``Executor.stop``.

        Args:
            handle: the run.
            grace: seconds.

        Returns:
            ``Exited`` or ``Gone``.
        """
        self.terminate(handle)
        deadline = time.monotonic() + grace
        while isinstance(status := self.poll(handle), Running):
            if time.monotonic() >= deadline:
                self.kill(handle)
            time.sleep(0.01)
        return status

    def tidy(self) -> None:
        """See ``Executor.tidy``: a supervisor ends a moment after its exit.json, when nobody polls it any more."""
        for pid, started in list(self._children.items()):
            processes.collect(pid, started)
            if processes.start_time(pid) != started:
                del self._children[pid]

    def recover(self, directory: Path, job_id: str) -> Status:
        """See ``Executor.recover``. A foreign process under a recorded pid is neither adopted nor signalled.

        Args:
            directory: the run's folder.
            job_id: the job.

        Returns:
            Its status.

        Raises:
            OSError: EAGAIN: a process of it is still alive, and there is no supervisor to adopt.
        """
        directory = directory.resolve()
        deadline = time.monotonic() + self._wait_seconds
        while True:
            held = _is_locked(directory / LOCK)  # looked at first: what a supervisor wrote before it let go is seen
            record = read_json(directory / RECORD)
            if record is not None:
                handle = _handle(record, directory, job_id)
                status = self.poll(handle)
                if not isinstance(status, Gone):
                    return status
            if not held or time.monotonic() > deadline:
                break
            time.sleep(0.01)  # a supervisor holds the lock and has not written its record yet
        left = processes.kill_all(job_id, known=_run_of(record))
        if left:
            raise OSError(errno.EAGAIN, f"{len(left)} processes of {job_id} are still alive, to be ended first")
        return Gone(handle.attempt if record is not None else None)

    @staticmethod
    def _alive(handle: Handle) -> bool:
        if handle.boot_id != processes.boot_id():
            return False
        processes.collect(handle.pid, handle.started)
        return processes.start_time(handle.pid) == handle.started


def _handle(record: Mapping[str, object], directory: Path, job_id: str) -> Handle:
    attempt, pid, started = (
        value if isinstance(value := record.get(k), int) else 0 for k in ("attempt", "pid", "started")
    )
    return Handle(job_id, directory, attempt, pid, started, str(record.get("boot_id")))


def _run_of(record: Mapping[str, object] | None) -> dict[int, int]:
    """The process that a supervisor started in this boot, and its start time; nothing where it says none."""
    found = record or {}
    pid, started = found.get("run_pid"), found.get("run_started")
    ours = found.get("boot_id") == processes.boot_id()
    return {pid: started} if ours and isinstance(pid, int) and isinstance(started, int) else {}


def _exit_of(directory: Path, attempt: int) -> Exited | None:
    end = read_json(directory / EXIT)
    if end is None or end.get("attempt") != attempt:
        return None
    return Exited(attempt, end["code"], end["signal"], float(end["finished_at"]), tuple(end["last_lines"]))


def _is_locked(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(handle)


def _first_line(pipe: int, seconds: float) -> str | None:
    """The supervisor's one word; None: it ended or took too long."""
    data = b""
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while not data.endswith(b"\n"):
            if not selector.select(timeout=max(0.0, deadline - time.monotonic())):
                return None
            chunk = os.read(pipe, 64)
            if not chunk:
                return None
            data += chunk
    return data.decode().strip()
