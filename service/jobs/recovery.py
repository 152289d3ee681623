"""What the end of a process means for its job: pure decisions, tested as a table.

Exit codes of a run: 0 succeeded, 2 the user has to change something, 3 stopped at a checkpoint, anything else a crash.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.db.tables import Job
from service.executors.base import Exited, Gone
from service.jobs.records import Event

USER_ERROR = 2
STOPPED = 3

_WIRE_PARAMS = {
    "train_file": "training_file",
    "data_file": "training_file",
    "eval_file": "validation_file",
    "start": "model",
}
"""Fields of run files, as requests call them."""

_TRANSIENT = (
    "MemoryError",
    "OutOfMemoryError",
    "std::bad_alloc",
    "Cannot allocate memory",
    "can't allocate memory",
    "No space left on device",
)
"""In the last lines of a run that could not even write its ``error`` event: worth another try."""


@dataclass(frozen=True)
class RetryPolicy:
    """How often, and after how long, a run is started again."""

    max_retries: int = 3
    """Starts after a crash that could succeed next time."""
    max_restarts: int = 3
    """Starts after the run vanished (reboot, replaced container) without one more step in between."""
    base_seconds: float = 2.0
    cap_seconds: float = 60.0
    jitter: float = 0.25
    """Share by which a delay is drawn shorter or longer, so that jobs which died together do not return together."""

    def delay(self, attempt: int, draw: random.Random) -> float:
        """Capped exponential back-off.

        Args:
            attempt: 1 for the first retry.
            draw: source of the jitter.

        Returns:
            Seconds to wait.
        """
        middle = min(self.base_seconds * 2.0 ** (attempt - 1), self.cap_seconds)
        return middle * (1 + self.jitter * (2 * draw.random() - 1))


@dataclass(frozen=True)
class Ending:
    """The status that a job gets, with what is said and written along."""

    target: str
    events: Sequence[Event] = ()
    values: Mapping[str, Any] = field(default_factory=dict)


def decide(
    job: Job,
    status: Exited | Gone,
    error: Mapping[str, Any] | None,
    *,
    now: float,
    policy: RetryPolicy,
    draw: random.Random,
    ours: bool = False,
) -> Ending:
    """What becomes of a job whose run has ended.

    Args:
        job: the row as it is now.
        status: how the run ended.
        error: the run's own ``error`` event, if it left one.
        now: seconds since the epoch.
        policy: limits.
        draw: source of the jitter.
        ours: the server ended it because it was itself stopped, which is counted neither as a retry nor as a restart.

    Returns:
        The ending; ``succeeded`` still needs its results.
    """
    if job.status == "cancelling":  # whatever the run answered
        return Ending("cancelled", [Event("Job cancelled; every process of it has ended")])
    if ours and stopped(status) and job.status != "pausing":
        said = f"The server was stopped after step {job.step}; job queued again, to resume from its last checkpoint"
        return Ending("queued", [Event(said)])
    if isinstance(status, Gone):
        how = "vanished with its machine or container"
        return _again(job, how, policy, code="run_lost")
    if status.code == 0:
        return Ending("succeeded")
    if status.code == USER_ERROR:
        return failure(error, default="invalid_request", message="the run refused its input", lines=status.last_lines)
    # SIGTERM that comes before the run can handle it is a stop as well, only without a new checkpoint.
    if status.code == STOPPED or status.signal == signal.SIGTERM:
        if job.status == "pausing":
            return Ending("paused", [Event(f"Job paused at step {job.step}")])
        return _again(job, "was stopped from outside", policy, code="run_stopped")
    return _crashed(job, status, error, now=now, policy=policy, draw=draw)


def stopped(status: Exited | Gone) -> bool:
    """Whether a process ended as one does that the server has asked to: by itself, or with its container.

    Args:
        status: how it ended.

    Returns:
        False: for a reason of its own.
    """
    return isinstance(status, Gone) or status.code == STOPPED or status.signal in (signal.SIGTERM, signal.SIGKILL)


def retryable(status: Exited, error: Mapping[str, Any] | None) -> bool:
    """Whether a crash could end otherwise next time: killed from outside, out of memory or disk, never an exception.

    Args:
        status: how the run ended.
        error: its ``error`` event; its own word counts.

    Returns:
        True for a retry.
    """
    if status.signal == signal.SIGKILL:
        return True
    if error is not None:
        return bool(error.get("retryable"))
    return status.signal is None and any(word in line for line in status.last_lines[-3:] for word in _TRANSIENT)


def describe(status: Exited) -> str:
    """How a process ended, in words.

    Args:
        status: its end.

    Returns:
        A clause.
    """
    if status.signal is None:
        return f"the run ended with code {status.code}"
    try:
        name = signal.Signals(status.signal).name
    except ValueError:
        name = "unknown"
    hint = ", as the kernel does when memory runs out" if status.signal == signal.SIGKILL else ""
    return f"the run was ended by signal {status.signal} ({name}){hint}"


def failure(
    error: Mapping[str, Any] | None, *, default: str, message: str, lines: Sequence[str], log: bool = False
) -> Ending:
    """A failed job.

    Args:
        error: the run's ``error`` event; its code, message and param win.
        default: code without one.
        message: explanation without one; with ``log`` it is said in any case.
        lines: the last lines of the log.
        log: whether to add them to the message.

    Returns:
        The ending.
    """
    told = str(error["message"]) if error is not None and error.get("message") else ""
    text = told or message
    if log:
        text = f"{told} ({message})" if told else message
        text += "\n".join(("; the last lines of its log:", *lines)) if lines else "; it printed nothing"
    code = str(error["code"]) if error is not None and error.get("code") else default
    param = error.get("param") if error is not None else None
    param = _WIRE_PARAMS.get(str(param), str(param))[:64] if param else None
    values = {"error_code": code[:64], "error_message": text, "error_param": param}
    return Ending("failed", [Event(f"Job failed: {text.splitlines()[0]}", level="error", data={"code": code})], values)


def _again(job: Job, how: str, policy: RetryPolicy, *, code: str) -> Ending:
    """The run ended through no fault of its own: queue it again, but not for ever without one more step."""
    if job.status == "pausing":
        return Ending("paused", [Event(f"The run {how} while pausing; it resumes from its last checkpoint", "warn")])
    progress = job.step > job.last_progress_step
    count = 1 if progress else job.restarts_without_progress + 1
    if count > policy.max_restarts:
        message = f"the run {how}, {count} times in a row without one more step"
        return failure(None, default=code, message=message, lines=())
    said = Event(f"The run {how} after step {job.step}; job queued again, to resume from its last checkpoint", "warn")
    return Ending("queued", [said], {"restarts_without_progress": count, "last_progress_step": job.step})


def _crashed(
    job: Job, status: Exited, error: Mapping[str, Any] | None, *, now: float, policy: RetryPolicy, draw: random.Random
) -> Ending:
    how = describe(status)
    again = retryable(status, error)
    if job.status == "pausing" and again:
        return Ending("paused", [Event(f"While pausing, {how}; it resumes from its last checkpoint", "warn")])
    if again and job.retries < policy.max_retries:
        count = job.retries + 1
        delay = policy.delay(count, draw)
        said = Event(f"{how[0].upper()}{how[1:]}; retry {count} of {policy.max_retries} in {delay:.0f} s", "warn")
        return Ending("queued", [said], {"retries": count, "not_before": now + delay})
    code = "run_killed" if status.signal is not None else "run_crashed"
    tries = f" after {job.retries} retries" if again and job.retries else ""
    return failure(error, default=code, message=how + tries, lines=status.last_lines, log=True)
