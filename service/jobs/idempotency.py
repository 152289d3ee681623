"""What makes a repeated POST safe: explicit keys, and the retries that the OpenAI SDK sends without one.

The SDK retries a POST twice and tells only ``x-stainless-retry-count``. A server that died between its commit and its
answer would then own two jobs; so such a retry answers with the newest job of the same API key and body. A client that
gave up waiting sends its retry while the first attempt is still being checked, and either may commit first: the first
attempt then answers with the job that a retry made since it came.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from sqlalchemy import ColumnElement, delete, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from service.db.tables import Idempotency, Job
from service.jobs.records import IdempotencyInFlight, IdempotencyMismatch, NewJob

KEEP_SECONDS = 24 * 3600.0
"""An explicit key is remembered for a day."""

RETRY_SECONDS = 600
"""A keyless retry matches jobs that are not older than this."""

ABANDONED_SECONDS = 60.0
"""A reservation older than this belongs to a request that died; another request may take it."""


def expired(now: float) -> ColumnElement[bool]:
    """The condition for rows that may go.

    Args:
        now: seconds since the epoch.

    Returns:
        An SQL condition.
    """
    return Idempotency.created_at < now - KEEP_SECONDS


def enter(session: Session, key_id: str, key: str, body_hash: str, token: str | None, now: float) -> Job | str:
    """Find the job of a key, or take the key.

    Args:
        session: inside a write transaction.
        key_id: the API key.
        key: the ``Idempotency-Key``.
        body_hash: sha256 of the body.
        token: of an earlier ``enter`` by the same request.
        now: seconds since the epoch.

    Returns:
        The earlier job, or the token under which the key is now held.

    Raises:
        IdempotencyMismatch: other body.
        IdempotencyInFlight: held by another request.
    """
    if not key or len(key) > 255:
        raise ValueError("an Idempotency-Key has 1 to 255 characters")
    mine = select(Idempotency).where(Idempotency.key_id == key_id, Idempotency.key == key).with_for_update()
    while (row := session.scalars(mine).one_or_none()) is None or row.created_at < now - KEEP_SECONDS:
        if row is not None:
            session.delete(row)
            session.flush()
        held = token or secrets.token_hex(16)
        values = {"key_id": key_id, "key": key, "body_hash": body_hash, "token": held, "job_id": None}
        if _insert(session, {**values, "created_at": now}):
            return held
    if row.job_id is None and row.token != token and row.created_at <= now - ABANDONED_SECONDS:
        row.body_hash = body_hash  # its request died without a job: nothing was promised under this key
    if row.body_hash != body_hash:
        raise IdempotencyMismatch(
            "this Idempotency-Key was used with another request body in the last 24 hours; use a new key"
        )
    if row.job_id is not None:
        job = session.scalars(select(Job).where(Job.id == row.job_id)).one_or_none()
        if job is not None:
            return job
        row.job_id = None  # the job was deleted: the key is free again
    elif row.token != token and row.created_at > now - ABANDONED_SECONDS:
        raise IdempotencyInFlight("the first request with this Idempotency-Key is still being answered; try again")
    row.token = token or secrets.token_hex(16)
    row.created_at = now
    session.flush()
    return row.token


def _insert(session: Session, values: Mapping[str, Any]) -> bool:
    """Insert a row unless a concurrent request has: a row that is not there yet cannot be locked against that."""
    made = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
    query = made(Idempotency).values(**values).on_conflict_do_nothing().returning(Idempotency.token)
    return session.execute(query).first() is not None


def complete(session: Session, key_id: str, key: str, job_id: str) -> None:
    """Write the job under the key that this transaction holds.

    Args:
        session: the transaction that inserted the job.
        key_id: the API key.
        key: the ``Idempotency-Key``.
        job_id: the new job.
    """
    row = session.get_one(Idempotency, (key_id, key))
    row.job_id = job_id


def release(session: Session, key_id: str, key: str, token: str) -> None:
    """Free a key whose request was refused.

    Args:
        session: inside a write transaction.
        key_id: the API key.
        key: the ``Idempotency-Key``.
        token: from ``enter``.
    """
    session.execute(
        delete(Idempotency).where(
            Idempotency.key_id == key_id,
            Idempotency.key == key,
            Idempotency.token == token,
            Idempotency.job_id.is_(None),
        )
    )


def abandon(session: Session) -> int:
    """Free the keys whose requests have no job: at a start, before anything is answered, nobody is working on them.

    Args:
        session: inside a write transaction of the only process that answers requests.

    Returns:
        How many there were.
    """
    return len(
        session.scalars(delete(Idempotency).where(Idempotency.job_id.is_(None)).returning(Idempotency.key)).all()
    )


def repeated(session: Session, new: NewJob, *, now: float, retry_count: int, arrived: float | None) -> Job | None:
    """The job that a POST without a key repeats.

    Args:
        session: any transaction.
        new: what it asks for.
        now: seconds since the epoch.
        retry_count: the SDK's.
        arrived: when the request came, seconds since the epoch.

    Returns:
        For a retry, ``recent``. For a first attempt, the job that a retry made since it came: its client has given up
        on it, so whatever became of that job, a second one is not what was asked. Else None.
    """
    if retry_count > 0:
        return recent(session, new.key_id, new.body_hash, now)
    if arrived is None:
        return None
    since = Job.created_at >= int(arrived), Job.retried_at >= arrived  # the first has the index
    mine = select(Job).where(Job.key_id == new.key_id, Job.body_hash == new.body_hash, *since)
    return session.scalars(mine.order_by(Job.number.desc()).limit(1)).one_or_none()


def recent(session: Session, key_id: str, body_hash: str, now: float) -> Job | None:
    """The job that a keyless retry means: the newest one of the same API key and body that has not come to nothing.

    A retry says that its first attempt was not answered, not whether it arrived. Where it did not, and the same body
    was submitted on purpose within the ten minutes before, this answers with that earlier job. An ``Idempotency-Key``
    has no such doubt; it marks an intent of its own, so a job made under one is never the answer.

    Args:
        session: any transaction.
        key_id: the API key.
        body_hash: sha256 of the body.
        now: seconds since the epoch.

    Returns:
        A job of the last ten minutes, or None.
    """
    return session.scalars(
        select(Job)
        .where(
            Job.key_id == key_id,
            Job.body_hash == body_hash,
            Job.created_at >= int(now) - RETRY_SECONDS,
            Job.status.not_in(("failed", "cancelled")),
            ~select(Idempotency).where(Idempotency.key_id == key_id, Idempotency.job_id == Job.id).exists(),
        )
        .order_by(Job.number.desc())
        .limit(1)
    ).one_or_none()
