"""The small process between the server and a run; it outlives the server. Standard library only, so it starts fast.

``python -m service.jobs.supervisor DIRECTORY --job-id ID --attempt N [--token T --quota BYTES --threads N] -- ARGV...``

It takes the folder's lock (one run at a time), refuses an attempt that is not newer than the last one, ends what an
earlier supervisor may have left, starts the run in a process group of its own, pumps its output into the log,
forwards SIGTERM, and in the end, when no process of the run is left, writes exit.json. On standard output it says
``ok``, ``busy`` or ``stale`` once. Not covered: its own SIGKILL takes the run's output pipe with it; then
``LocalExecutor.recover`` ends what is left, and the job is queued again.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import json
import os
import selectors
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.jobs import processes
from service.jobs.logs import DEFAULT_QUOTA, LogWriter

RECORD = "supervisor.json"
EXIT = "exit.json"
LOCK = "run.lock"
REFUSED = 75
"""Exit code of a supervisor that did not start its run."""

TAIL_LINES = 100
_TAIL_BYTES = 64 * 1024
_LOCK_SECONDS = 2.0
_EXIT_RETRY_SECONDS = 600.0
_PR_SET_CHILD_SUBREAPER = 36


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a file at once: a reader sees the old or the new content, never a part.

    Args:
        path: the file.
        value: its content.
    """
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a file of ``write_json``.

    Args:
        path: the file.

    Returns:
        Its content; None when it is missing or no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def main(arguments: list[str] | None = None) -> int:
    """Run the supervisor.

    Args:
        arguments: the command line; None: this process's.

    Returns:
        Exit code: 0 when exit.json was written, 75 when the run was not started.
    """
    parser = argparse.ArgumentParser(prog="service.jobs.supervisor")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--job-id", required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--token", default="")
    parser.add_argument("--quota", type=int, default=DEFAULT_QUOTA)
    parser.add_argument("--threads", type=int, default=None)
    given = sys.argv[1:] if arguments is None else arguments
    split = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:split])
    options.argv = given[split + 1 :]
    if not options.argv:
        parser.error("give the run's program and arguments after --")
    os.chdir(options.directory)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

    lock = _lock(options.directory / LOCK)
    if lock is None:
        return _answer("busy", REFUSED)
    last = read_json(options.directory / RECORD)
    newest = last.get("attempt") if last is not None else None
    if isinstance(newest, int) and newest >= options.attempt:
        return _answer("stale", REFUSED)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if processes.kill_all(options.job_id):
        return _answer("busy", REFUSED)
    (options.directory / EXIT).unlink(missing_ok=True)
    return _Supervisor(options).run()


def _lock(path: Path) -> int | None:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(handle)
                return None
            time.sleep(0.02)


def _answer(word: str, code: int = 0) -> int:
    """Tell the executor, and let go of its pipe: it may be long gone, which does not matter."""
    with contextlib.suppress(OSError):
        os.write(1, word.encode() + b"\n")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    return code


class _Supervisor:
    """State of one run: its pid, its pipe, its log."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.directory: Path = options.directory
        self.log = LogWriter(options.directory, options.quota)
        self.tail = b""
        self.status: int | None = None
        self.pid = 0
        self.pipe, self.run_end = os.pipe()
        self.wake, wake_end = os.pipe()
        os.set_blocking(self.pipe, False)
        os.set_blocking(self.wake, False)
        os.set_blocking(wake_end, False)
        signal.set_wakeup_fd(wake_end, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)  # the wake-up descriptor carries it

    def run(self) -> int:
        try:
            self._start()
        except OSError as error:
            os.close(self.run_end)
            self._record()
            _answer("ok")
            self.tail = f"the run could not be started: {error}\n".encode()
            self.log.write(self.tail)
            return self._finish(code=127, number=None)
        os.close(self.run_end)
        self._record()
        _answer("ok")
        self._pump()
        while processes.kill_all(self.options.job_id, os.getpid()):  # exit.json says that none is left
            self._drain()
        self._drain()
        assert self.status is not None
        code = os.waitstatus_to_exitcode(self.status)
        return self._finish(code=code if code >= 0 else None, number=-code if code < 0 else None)

    def _start(self) -> None:
        environment = {**os.environ, processes.JOB_VARIABLE: self.options.job_id, "OMP_WAIT_POLICY": "PASSIVE"}
        if self.options.threads is not None:
            environment["OMP_NUM_THREADS"] = str(self.options.threads)
        argv = self.options.argv
        self.pid = os.posix_spawn(
            argv[0],
            argv,
            environment,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, self.run_end, 1),
                (os.POSIX_SPAWN_DUP2, self.run_end, 2),
            ],
            setpgroup=0,
            setsigdef=[signal.SIGINT, signal.SIGHUP, signal.SIGPIPE],
        )
        with contextlib.suppress(OSError):  # when memory runs out, the run goes before the server and before us
            Path(f"/proc/{self.pid}/oom_score_adj").write_text("500", encoding="ascii")

    def _record(self) -> None:
        """Who runs what: all that an adopting server needs."""
        me = os.getpid()
        record = {
            "job_id": self.options.job_id,
            "attempt": self.options.attempt,
            "token": self.options.token,
            "pid": me,
            "started": processes.start_time(me),
            "boot_id": processes.boot_id(),
            "run_pid": self.pid or None,
            "run_started": processes.start_time(self.pid) if self.pid else None,
            "argv": self.options.argv,
            "environment": {
                "OMP_WAIT_POLICY": "PASSIVE",
                "OMP_NUM_THREADS": self.options.threads or os.environ.get("OMP_NUM_THREADS"),
            },
            "started_at": time.time(),
        }
        self._persist(RECORD, record)

    def _persist(self, name: str, value: Mapping[str, Any]) -> None:
        """Write although the disk may be full for a while: without it the job could not be explained."""
        deadline = time.monotonic() + _EXIT_RETRY_SECONDS
        while True:
            try:
                write_json(self.directory / name, value)
                return
            except OSError:
                if time.monotonic() > deadline or not self.directory.is_dir():
                    raise
            self._drain()
            time.sleep(0.2)

    def _pump(self) -> None:
        """Move output and signals until the run's first process has ended."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.wake, selectors.EVENT_READ)
            selector.register(self.pipe, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fd == self.pipe and not self._read():
                        selector.unregister(self.pipe)
                    elif key.fd == self.wake:
                        self._signals(os.read(self.wake, 512))
                if self.status is not None:
                    return

    def _signals(self, numbers: bytes) -> None:
        if signal.SIGTERM in numbers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGTERM)
        self.status = processes.reap().get(self.pid, self.status)

    def _read(self) -> bool:
        """Take what the pipe holds; False at its end."""
        try:
            data = os.read(self.pipe, 1 << 16)
        except BlockingIOError:
            return True
        if data:
            self.log.write(data)
            self.tail = (self.tail + data)[-_TAIL_BYTES:]
        return bool(data)

    def _drain(self) -> None:
        """The pipe's rest, without waiting: every writer is gone or about to be."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.pipe, selectors.EVENT_READ)
            while selector.select(timeout=0):
                if not self._read():
                    return

    def _finish(self, *, code: int | None, number: int | None) -> int:
        lines = self.tail.decode("utf-8", "replace").splitlines()[-TAIL_LINES:]
        end = {
            "attempt": self.options.attempt,
            "code": code,
            "signal": number,
            "finished_at": time.time(),
            "last_lines": [line[:2000] for line in lines],
            "log_bytes_lost": self.log.lost,
        }
        self._persist(EXIT, end)
        self.log.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
