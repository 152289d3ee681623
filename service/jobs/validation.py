"""What the verdict on a job's files means for the job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from service.db.tables import Job
from service.executors.base import Exited, Gone
from service.jobs import spec
from service.jobs.records import Event
from service.jobs.recovery import USER_ERROR, Ending, RetryPolicy, describe, failure, stopped
from service.jobs.supervisor import read_json

VERDICT = "validation.json"
NAMED = 100
"""Rows named in the event."""
SHOWN = 10
"""Different problems that the error's text tells; each once, with the rows that have it."""
LINES = 3
"""Lines named beside a problem that many rows have."""

_RETRY_SECONDS = 1.0


def decide(
    job: Job, status: Exited | Gone, directory: Path, *, now: float, policy: RetryPolicy, ours: bool = False
) -> Ending:
    """What becomes of a job whose validation process has ended.

    Args:
        job: the row.
        status: how the process ended.
        directory: where validation.json is.
        now: seconds since the epoch.
        policy: how often a validation that crashed is done again.
        ours: the server ended it because it was itself stopped, which is not counted.

    Returns:
        ``queued``, ``failed``, ``cancelled``, or ``validating_files`` again.
    """
    if job.status == "cancelling":
        return Ending("cancelled", [Event("Job cancelled")])
    verdict = read_json(directory / VERDICT)
    if isinstance(status, Exited) and verdict is not None:
        if status.code == 0 and verdict.get("ok"):
            return _valid(job, verdict)
        if status.code == USER_ERROR:
            return _invalid(verdict)
    if ours and stopped(status):
        return Ending("validating_files", [Event("The server was stopped; validation is done again")])
    lines = status.last_lines if isinstance(status, Exited) else ()
    how = describe(status) if isinstance(status, Exited) else "its process vanished"
    if job.retries < policy.max_retries:
        said = [Event(f"Validation did not finish ({how.replace('the run', 'it')}); it is done again", "warn")]
        return Ending("validating_files", said, {"retries": job.retries + 1, "not_before": now + _RETRY_SECONDS})
    message = f"validation did not finish ({how.replace('the run', 'it')})"
    return failure(None, default="validation_crashed", message=message, lines=lines, log=True)


def _valid(job: Job, verdict: Mapping[str, Any]) -> Ending:
    events = [
        Event(f"{warning['file']} line {warning['line']}: {warning['message']}", "warn", data={"code": warning["code"]})
        for warning in verdict["warnings"][:NAMED]
    ]
    more = int(verdict.get("warning_count", len(events))) - len(events)
    if more > 0:
        events.append(Event(f"{more} more warnings are not shown", "warn"))
    resolved = spec.resolve(job.resolved, int(verdict["rows"])) if job.kind == "fine_tuning" else dict(job.resolved)
    events.append(Event("Files validated; job queued", data={"rows": verdict["rows"]}))
    return Ending("queued", events, {"resolved": resolved, "retries": 0, "attempt": 0, "not_before": 0.0})


def _invalid(verdict: Mapping[str, Any]) -> Ending:
    problems = list(verdict["problems"])[:NAMED]
    count = int(verdict.get("problem_count", len(problems)))
    lines = summary(problems)
    if count > len(problems):
        lines.append(f"and {count - len(problems)} more rows")
    code = str(verdict.get("code") or (problems[0]["code"] if problems else "invalid_training_file"))
    param = str(verdict.get("param") or "training_file")
    what = "1 problem" if count == 1 else f"{count} problems"
    text = f"{what} in {param}:" + (f" {lines[0]}" if len(lines) == 1 else "".join(f"\n  {line}" for line in lines))
    events = [Event(f"Validation failed: {what} in {param}", "error", data={"code": code, "problems": problems})]
    values = {"error_code": code[:64], "error_message": text, "error_param": param[:64]}
    return Ending("failed", events, values)


def summary(problems: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each different problem once, with how many rows have it and the first of their lines.

    Args:
        problems: as the verdict names them: file, line, code, message.

    Returns:
        At most `SHOWN` texts, and one that counts the problems left out.
    """
    rows: dict[tuple[str, str, str], list[int]] = {}
    for one in problems:
        lines = rows.setdefault((str(one.get("file")), str(one["code"]), str(one["message"])), [])
        if one.get("line") is not None:
            lines.append(int(one["line"]))
    told = [f"{_where(lines)}{message} ({code})" for (_, code, message), lines in rows.items()]
    left = len(told) - SHOWN
    return told[:SHOWN] + ([f"and {left} other problems"] if left > 0 else [])


def _where(lines: Sequence[int]) -> str:
    if not lines:
        return ""
    if len(lines) == 1:
        return f"line {lines[0]}: "
    named = ", ".join(map(str, lines[:LINES]))
    return f"{len(lines)} rows (lines {named}{', ...' if len(lines) > LINES else ''}): "
