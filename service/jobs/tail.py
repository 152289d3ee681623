"""From a run's events to the job's row, its wire events and its checkpoints. Writes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.events import read
from service.db.tables import Checkpoint, Job
from service.jobs import names
from service.jobs.records import Event, new_id

MIN_GRACE_SECONDS = 10.0
EVENTS = "events.jsonl"

_LEVELS = {"info": "info", "warn": "warn", "warning": "warn", "error": "error"}
_TRAIN = ("train_loss", "train_mean_token_accuracy")
_VALID = ("valid_loss", "valid_mean_token_accuracy")


@dataclass
class Changes:
    """What a batch of run events means for the job."""

    events: list[Event] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    checkpoints: list[Checkpoint] = field(default_factory=list)


def grace(micro_batch_seconds: float, save_seconds: float) -> float:
    """How long a run may take to stop at a checkpoint.

    Args:
        micro_batch_seconds: the longest so far.
        save_seconds: the last save.

    Returns:
        Seconds: max(10, 3 x longest micro-batch + 2 x last save).
    """
    return max(MIN_GRACE_SECONDS, 3 * micro_batch_seconds + 2 * save_seconds)


def translate(job: Job, batch: Sequence[Mapping[str, Any]]) -> Changes:
    """Read a batch of run events.

    Args:
        job: the row before them.
        batch: events as ``core.events.read`` gives them, oldest first; unknown kinds and odd values are skipped.

    Returns:
        What to write.
    """
    changes = Changes()
    longest = job.micro_batch_seconds
    metrics: dict[int, dict[str, Any]] = {}
    # A step's numbers are written just before the progress that says of how many steps it is one.
    told = next(
        (event["total_steps"] for event in batch if event["kind"] == "progress" and "total_steps" in event), None
    )
    steps = job.total_steps or (_progress({"total_steps": told}, None).get("total_steps"))
    for event in batch:
        kind, time = event["kind"], _number(event.get("time"))
        if kind == "metric":
            data = {key: value for key, value in event.items() if key not in ("seq", "time", "kind")}
            step = int(_number(event.get("step")) or 0)
            metrics.setdefault(step, {}).update(data)
            total = changes.values.get("total_steps", steps)
            changes.events.append(Event(_sentence(data, step, total), type="metrics", data=data, time=time))
        elif kind == "progress":
            changes.values |= _progress(event, time)
            longest = max(longest, _number(event.get("micro_batch_seconds")) or 0.0)
        elif kind == "artifact" and event.get("artifact") == "checkpoint":
            changes.values |= _reached(event, changes.values.get("step", job.step))
            row = _checkpoint(job, event, time, metrics)
            if row is not None:
                changes.checkpoints.append(row)
        elif kind in ("message", "error"):
            level = "error" if kind == "error" else _LEVELS.get(str(event.get("level")), "info")
            text = str(event.get("message", ""))[:8000]
            data = {"code": event.get("code")} if kind == "error" else {}
            changes.events.append(Event(text, level=level, data=data, time=time))  # type: ignore[arg-type]
    if "save_seconds" in changes.values or longest > job.micro_batch_seconds:
        changes.values["micro_batch_seconds"] = longest
        changes.values["grace_seconds"] = grace(longest, changes.values.get("save_seconds", job.save_seconds))
    return changes


def last_error(directory: Path, since: float) -> Mapping[str, Any] | None:
    """The run's own explanation of its end.

    Args:
        directory: the job's folder.
        since: start of the attempt, seconds since the epoch; older errors explain older ends.

    Returns:
        The newest ``error`` event, or None.
    """
    path = directory / EVENTS
    offset, found = 0, None
    while True:
        batch, after = read(path, offset)
        for event in batch:
            if event["kind"] == "error" and (_number(event.get("time")) or 0.0) >= since:
                found = event
        if after == offset:
            return found
        offset = after


def _progress(event: Mapping[str, Any], time: float | None) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key in ("step", "total_steps", "trained_tokens"):
        number = _number(event.get(key))
        if number is not None and 0 <= number < 2**62:
            values[key] = int(number)
    eta, save = _number(event.get("eta_seconds")), _number(event.get("save_seconds"))
    if eta is not None and time is not None and 0 <= eta < 10**9:
        values["estimated_finish"] = int(time + eta)
    if save is not None and save >= 0:
        values["save_seconds"] = save
    return values


def _reached(event: Mapping[str, Any], step: int) -> dict[str, Any]:
    """A resume goes on from a checkpoint, so its step is done, whether a progress event has said so yet or not."""
    saved = _number(event.get("step"))
    return {"step": int(saved)} if saved is not None and step < saved < 2**62 else {}


def _checkpoint(
    job: Job, event: Mapping[str, Any], time: float | None, metrics: Mapping[int, Mapping[str, Any]]
) -> Checkpoint | None:
    """A row for a checkpoint that can be served; one that only a resume can use has none."""
    step = _number(event.get("step"))
    if job.kind != "fine_tuning" or step is None or not event.get("servable", True):
        return None
    saved = Path(str(event.get("path")))
    kind = "merged" if (saved / "merged").is_dir() else "adapter"
    reported = event.get("metrics")
    known = {**metrics.get(int(step), {}), **(reported if isinstance(reported, dict) else {})}
    return Checkpoint(
        id=new_id("ftckpt"),
        job_id=job.id,
        step=int(step),
        created_at=int(time or 0),
        model_id=names.checkpoint_id(job, int(step)),
        kind=kind,
        path=str(saved / kind),
        metrics={"step": int(step), **{key: known[key] for key in (*_TRAIN, *_VALID) if key in known}},
        available=True,
    )


def _sentence(data: Mapping[str, Any], step: int, total: int | None) -> str:
    """As OpenAI words it: ``Step 10/30: training loss=1.23``."""
    parts = []
    if "train_loss" in data:
        parts.append(f"training loss={_short(data['train_loss'])}")
    if "valid_loss" in data:
        parts.append(f"validation loss={_short(data['valid_loss'])}")
    return f"Step {step}{f'/{total}' if total else ''}: {', '.join(parts) or 'metrics'}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "not finite"


def _number(value: Any) -> float | None:
    """A finite number, or None: events are written by a run, and a run may be broken."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
