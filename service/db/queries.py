"""Named queries on the job tables, each with the index that serves it; the store puts them in transactions."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, ScalarSelect, func, insert, select, update
from sqlalchemy.orm import Session

from core.text import clean
from service.db.tables import Checkpoint, Job, JobEvent, Model
from service.jobs.names import checkpoint_id
from service.jobs.records import Event

LONGEST_WAIT = 120.0
"""Seconds; longer than any back-off. A job that would have to wait longer waits because the clock was set back."""

_PLAIN: Any = {"synchronize_session": False}


def job_by_id(session: Session, job_id: str) -> Job | None:
    """One job (unique index on ``id``).

    Args:
        session: any transaction.
        job_id: its id.

    Returns:
        The row, or None.
    """
    return session.scalars(select(Job).where(Job.id == job_id)).one_or_none()


def jobs_page(
    session: Session, *, before: int | None, limit: int, metadata: Mapping[str, str], **equal: str | None
) -> Sequence[Job]:
    """Newest jobs first (primary key, or ``ix_jobs_kind_number``).

    Args:
        session: any transaction.
        before: only numbers below this.
        limit: rows at most.
        metadata: pairs that must all be present.
        **equal: columns that must have a value; None: any.

    Returns:
        Rows.
    """
    query = select(Job).order_by(Job.number.desc()).limit(limit)
    if before is not None:
        query = query.where(Job.number < before)
    for column, value in equal.items():
        if value is not None:
            query = query.where(getattr(Job, column) == value)
    sqlite = session.get_bind().dialect.name == "sqlite"
    for name, value in metadata.items():
        query = query.where(_metadata_is(name, value, sqlite))
    return session.scalars(query).all()


def _metadata_is(name: str, value: str, sqlite: bool) -> ColumnElement[bool]:
    if not sqlite:
        there: ColumnElement[bool] = Job.metadata_[name].as_string() == value
        return there
    # SQLite's JSON paths cannot name a key that holds a quote; json_each compares keys as plain text.
    pair = func.json_each(Job.metadata_).table_valued("key", "value")
    return select(1).select_from(pair).where(pair.c.key == name, pair.c.value == value).exists()


def events_page(
    session: Session, job_id: str, *, after: int | None, limit: int, newest_first: bool
) -> Sequence[JobEvent]:
    """Events of one job (primary key).

    Args:
        session: any transaction.
        job_id: the job.
        after: the last seq seen, in the order of the listing.
        limit: rows at most.
        newest_first: descending seq.

    Returns:
        Rows.
    """
    query = select(JobEvent).where(JobEvent.job_id == job_id).limit(limit)
    query = query.order_by(JobEvent.seq.desc() if newest_first else JobEvent.seq)
    if after is not None:
        query = query.where(JobEvent.seq < after if newest_first else JobEvent.seq > after)
    return session.scalars(query).all()


def checkpoints_page(
    session: Session, job_id: str, *, after: str | None, limit: int, available: bool
) -> Sequence[Checkpoint]:
    """Newest checkpoints first (``ix_checkpoints_job_id_step``).

    Args:
        session: any transaction.
        job_id: the job.
        after: id of the last checkpoint seen.
        limit: rows at most.
        available: only those that retention has left.

    Returns:
        Rows.

    Raises:
        LookupError: ``after`` is no checkpoint of this job.
    """
    query = select(Checkpoint).where(Checkpoint.job_id == job_id).order_by(Checkpoint.step.desc()).limit(limit)
    if available:
        query = query.where(Checkpoint.available)
    if after is not None:
        step = session.scalar(select(Checkpoint.step).where(Checkpoint.id == after, Checkpoint.job_id == job_id))
        if step is None:
            raise LookupError(after)
        query = query.where(Checkpoint.step < step)
    return session.scalars(query).all()


def _due(now: float) -> ColumnElement[bool]:
    return (Job.not_before <= now) | (Job.not_before > now + LONGEST_WAIT)


def _oldest_free(status: str, now: float) -> ScalarSelect[int]:
    return (
        select(Job.number)
        .where(Job.status == status, Job.lease_token.is_(None), _due(now))
        .order_by(Job.number)
        .limit(1)
        .with_for_update(skip_locked=True)  # PostgreSQL; SQLite's BEGIN IMMEDIATE has the whole file already
        .scalar_subquery()
    )


def claim(session: Session, *, status: str, target: str, owner: str, now: float, ttl: float) -> Job | None:
    """The oldest free job of a status gets a lease (``ix_jobs_status_number``).

    Args:
        session: a write transaction.
        status: what it must be in.
        target: what it becomes.
        owner: who claims.
        now: seconds since the epoch.
        ttl: seconds.

    Returns:
        The job with its new token, or None.
    """
    values: dict[str, Any] = {
        "status": target,
        "attempt": Job.attempt + 1,
        "lease_owner": owner,
        "lease_token": secrets.token_hex(16),
        "lease_expires_at": now + ttl,
    }
    if target == "running":
        values["started_at"] = func.coalesce(Job.started_at, int(now))
    free = (Job.number == _oldest_free(status, now), Job.status == status, Job.lease_token.is_(None))
    return session.scalars(
        update(Job).where(*free).values(values).returning(Job), execution_options=_PLAIN
    ).one_or_none()


def take_over(session: Session, *, owner: str, now: float, ttl: float, own: bool) -> Sequence[Job]:
    """Leases that ran out get a new owner and token (``ix_jobs_lease_expires_at``).

    Args:
        session: a write transaction.
        owner: the new owner.
        now: seconds since the epoch.
        ttl: seconds.
        own: also leases that ``owner`` itself held in an earlier life.

    Returns:
        The jobs.
    """
    expired = (Job.lease_expires_at < now) & (Job.lease_owner != owner)
    guards = (Job.lease_token.is_not(None), expired | (Job.lease_owner == owner) if own else expired)
    values = {"lease_owner": owner, "lease_token": secrets.token_hex(16), "lease_expires_at": now + ttl}
    return session.scalars(update(Job).where(*guards).values(values).returning(Job), execution_options=_PLAIN).all()


def renew(session: Session, job_id: str, token: str, expires: float) -> bool:
    """Prolong one lease.

    Args:
        session: a write transaction.
        job_id: the job.
        token: its lease token.
        expires: seconds since the epoch.

    Returns:
        Whether the lease was still this one.
    """
    guarded = update(Job).where(Job.id == job_id, Job.lease_token == token).values(lease_expires_at=expires)
    return bool(session.scalars(guarded.returning(Job.id)).all())


def guarded_update(
    session: Session, job_id: str, guards: Mapping[str, Any], values: Mapping[str, Any], new_events: int
) -> Job | None:
    """Change one job if its columns have the values that the writer believes in, and count its events up.

    Args:
        session: a write transaction.
        job_id: the job.
        guards: column to value; all must match.
        values: column to new value.
        new_events: how many events the writer appends.

    Returns:
        The job after it, or None: a guard failed.
    """
    where: list[ColumnElement[bool]] = [Job.id == job_id]
    for column, value in guards.items():
        attribute = getattr(Job, column)
        where.append(attribute.is_(None) if value is None else attribute == value)
    changed = {**{column: clean(value) for column, value in values.items()}, "last_seq": Job.last_seq + new_events}
    return session.scalars(
        update(Job).where(*where).values(changed).returning(Job), execution_options=_PLAIN
    ).one_or_none()


def claimable(session: Session, now: float) -> set[str]:
    """Statuses in which a job waits to be claimed (``ix_jobs_status_number``); read-only, so that idling is free.

    Args:
        session: any transaction.
        now: seconds since the epoch.

    Returns:
        Among ``queued`` and ``validating_files``.
    """
    free = (Job.lease_token.is_(None), _due(now), Job.status.in_(("queued", "validating_files")))
    return set(session.scalars(select(Job.status).where(*free).distinct()))


def model_id_taken(session: Session, job: Job, model_id: str) -> bool:
    """Whether another job's model has an id (unique index on ``id``).

    Args:
        session: any transaction.
        job: the job that wants it.
        model_id: the id.

    Returns:
        True: take a longer one.
    """
    others = select(Model.number).where(Model.id == model_id, Model.job_id.is_distinct_from(job.id))
    return session.scalar(others) is not None


def serves(session: Session, job_id: str) -> bool:
    """Whether anything that a job made can be served: its model, or a checkpoint that retention has left.

    Args:
        session: any transaction.
        job_id: the job.

    Returns:
        False: nobody needs the weights that its adapters were trained on.
    """
    made = select(Model.number).where(Model.job_id == job_id)
    saved = select(Checkpoint.number).where(Checkpoint.job_id == job_id, Checkpoint.available)
    return session.scalar(made.limit(1)) is not None or session.scalar(saved.limit(1)) is not None


def put_checkpoint(session: Session, job: Job, row: Checkpoint) -> None:
    """Insert a checkpoint; a step that a resumed run saved again replaces its row (``ix_checkpoints_job_id_step``).

    Where another job's checkpoint has its model id (unique index), it gets a longer one.

    Args:
        session: a write transaction.
        job: its job.
        row: the new row.
    """
    row.path, row.metrics = clean(row.path), clean(row.metrics)
    known = session.scalars(
        select(Checkpoint).where(Checkpoint.job_id == row.job_id, Checkpoint.step == row.step)
    ).one_or_none()
    if known is None:
        others = select(Checkpoint.number).where(Checkpoint.model_id == row.model_id, Checkpoint.job_id != job.id)
        if session.scalar(others) is not None:
            row.model_id = checkpoint_id(job, row.step, whole=True)
        session.add(row)
    else:
        known.created_at, known.kind, known.path = row.created_at, row.kind, row.path
        known.metrics, known.available = row.metrics, True
    session.flush()


def insert_events(session: Session, job: Job, events: Sequence[Event], now: float) -> None:
    """Insert rows whose seqs end at ``job.last_seq``, which the caller has already advanced.

    Their text may come from a user's file or from a run, so what no database can hold is escaped here.

    Args:
        session: a write transaction.
        job: the row after it was counted up.
        events: what to say.
        now: seconds since the epoch, for events that do not say when.
    """
    first = job.last_seq - len(events) + 1
    rows = [
        {
            "job_id": job.id,
            "seq": first + index,
            "created_at": int(event.time if event.time is not None else now),
            "level": event.level,
            "type": event.type,
            "message": clean(event.message),
            "data": clean(dict(event.data)),
        }
        for index, event in enumerate(events)
    ]
    if rows:
        session.execute(insert(JobEvent), rows)
