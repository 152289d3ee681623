"""Small values that go in and out of the job store, and the errors that it raises."""

from __future__ import annotations

import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from service.db.tables import Job

T = TypeVar("T")

_ALPHABET = string.ascii_letters + string.digits


class UnknownJob(LookupError):
    """There is no job with this id."""

    def __init__(self, job_id: str) -> None:
        """Name the id that was asked for.

        Args:
            job_id: as asked.
        """
        super().__init__(f"no job {job_id[:80]!r}; list the jobs to see what exists")


class StaleWrite(RuntimeError):
    """A guarded write found another status, token or offset: someone else was faster. Drop the result."""


class IdempotencyMismatch(ValueError):
    """An ``Idempotency-Key`` came again with another body (HTTP 422)."""


class IdempotencyInFlight(RuntimeError):
    """The first request with this ``Idempotency-Key`` has not been answered yet (HTTP 409)."""


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """A job as asked for; the store adds id, status and times.

    ``resolved`` is flat. Of a fine-tuning job: ``n_epochs``, ``batch_size`` and ``learning_rate_multiplier``, each a
    number or "auto" until validation has counted the rows, and beside them whatever else was asked by the names of
    ``RunConfig`` and of the method's own settings, already checked against both. Of a fit: fields of ``FitConfig``.
    ``model`` is a base; ``start`` and ``start_kind`` are set for a job from an earlier result, which lies in the folder
    of ``id`` by then.
    """

    kind: Literal["fine_tuning", "steering_fit"]
    model: str
    method: str
    request: Mapping[str, Any]
    resolved: Mapping[str, Any]
    seed: int
    training_file: str
    key_id: str
    body_hash: str
    suffix: str | None = None
    validation_file: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    id: str | None = None
    start: str | None = None
    start_kind: str | None = None


@dataclass(frozen=True)
class Event:
    """One event to append; ``time`` in seconds since the epoch, None: now."""

    message: str
    level: Literal["info", "warn", "error"] = "info"
    type: Literal["message", "metrics"] = "message"
    data: Mapping[str, Any] = field(default_factory=dict)
    time: float | None = None


@dataclass(frozen=True)
class Created:
    """Answer of ``JobStore.create``; ``replayed`` when the job had been there before."""

    job: Job
    replayed: bool


@dataclass(frozen=True)
class Page(Generic[T]):
    """Some rows, and whether there are more after them."""

    data: Sequence[T]
    has_more: bool


def new_id(prefix: str, separator: str = "-") -> str:
    """A random id that nobody can guess.

    Args:
        prefix: ``ftjob``, ``file``, ``vec``...
        separator: between prefix and the 24 letters and digits.

    Returns:
        ``<prefix><separator><24 characters>``.
    """
    return prefix + separator + "".join(secrets.choice(_ALPHABET) for _ in range(24))


def event_seq(event_id: str) -> int:
    """Read the seq out of an event's wire id.

    Args:
        event_id: ``ftevent-<job>-<seq>``.

    Returns:
        The seq.

    Raises:
        ValueError: it is not an event id.
    """
    prefix, _, seq = event_id.rpartition("-")
    if not prefix.startswith("ftevent-") or not seq.isascii() or not seq.isdigit() or len(seq) > 12:
        raise ValueError(f"{event_id[:80]!r} is not an event id; take one from the events list")
    return int(seq)
