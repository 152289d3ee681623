"""Processes by identity, read from /proc. Standard library only: the supervisor imports it.

A pid alone names nothing: it is reused, and after a reboot it is someone else's. (pid, start time, boot id) is unique.
Descendants are found twice, by parentage (orphans come to the supervisor, a subreaper) and by the job id in their
environment (parentage is lost when the supervisor died first).
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

JOB_VARIABLE = "GRADHELM_JOB_ID"
"""In the environment of every process of a run, and of nothing else."""


def boot_id() -> str:
    """The kernel's name for this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/<pid>/stat from ``state`` on, or None when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes().decode("utf-8", "replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()  # the name before it may hold anything, parentheses included


def start_time(pid: int) -> int | None:
    """When a process started.

    Args:
        pid: its number.

    Returns:
        Clock ticks since boot, or None: no such process, or it has ended and waits for its parent.
    """
    fields = _stat(pid)
    return None if fields is None or fields[0] in "ZX" else int(fields[19])


def collect(pid: int, started: int) -> None:
    """Reap a child of ours that has ended; a process that is another's, or another, is left alone.

    Args:
        pid: its number.
        started: its start time.
    """
    fields = _stat(pid)
    if fields is not None and fields[0] == "Z" and int(fields[19]) == started and int(fields[1]) == os.getpid():
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def send(pid: int, started: int, number: int) -> bool:
    """Signal the process that was meant, or nobody.

    Args:
        pid: its number.
        started: its start time, clock ticks since boot.
        number: the signal.

    Returns:
        Whether it was there.
    """
    try:
        handle = os.pidfd_open(pid)  # holds the identity: a reused pid cannot slip in after the check
    except OSError:
        return False
    try:
        if start_time(pid) != started:
            return False
        signal.pidfd_send_signal(handle, number)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)


def marked(job_id: str) -> set[int]:
    """Live processes whose environment names this job.

    Args:
        job_id: the job.

    Returns:
        Their pids, without the caller's.
    """
    wanted = f"{JOB_VARIABLE}={job_id}".encode()
    found = set()
    for pid in _pids():
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if wanted in variables and start_time(pid) is not None:
            found.add(pid)
    return found - {os.getpid()}


def descendants(root: int) -> set[int]:
    """Live processes below one, at any depth.

    Args:
        root: a pid.

    Returns:
        Their pids, without ``root``.
    """
    children: dict[int, list[int]] = {}
    for pid in _pids():
        fields = _stat(pid)
        if fields is not None and fields[0] not in "ZX":
            children.setdefault(int(fields[1]), []).append(pid)
    found: set[int] = set()
    queue = [root]
    while queue:
        below = [pid for pid in children.get(queue.pop(), ()) if pid not in found]
        found.update(below)
        queue += below
    return found


def kill_all(
    job_id: str, root: int | None = None, *, known: Mapping[int, int] | None = None, seconds: float = 2.0
) -> set[int]:
    """SIGKILL every process of a job until none is left: group or session do not matter.

    Args:
        job_id: the job.
        root: a verified pid whose descendants belong to the job too (not killed itself).
        known: further processes of the job, start time by pid: one that is ending is found by nothing else.
        seconds: how long to keep trying.

    Returns:
        What is still alive (uninterruptible in the kernel), normally nothing.
    """
    deadline = time.monotonic() + seconds
    seen = {pid: started for pid, started in (known or {}).items() if pid != os.getpid()}
    while True:
        for pid in marked(job_id) | (descendants(root) if root is not None else set()):
            started = start_time(pid)
            if started is not None:
                seen[pid] = started
        # one that is ending has no environment any more, and still holds its memory and its files
        alive = {pid for pid, started in seen.items() if start_time(pid) == started}
        if not alive or time.monotonic() > deadline:
            return alive
        for pid in alive:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if root == os.getpid():
            reap()
        time.sleep(0.005)


def reap() -> dict[int, int]:
    """Collect children that have ended.

    Returns:
        pid to wait status.
    """
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = status


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]
