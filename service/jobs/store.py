"""The door to the job tables: every change of a job is one short transaction with a guarded ``UPDATE ... RETURNING``.

Requests from users (cancel, pause, resume) are guarded by the status they saw; the scheduler's writes are guarded by
the lease token as well. 0 rows mean ``StaleWrite``: someone else was faster, and the caller drops its result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Engine, delete, func, select, update
from sqlalchemy.orm import Session

from service.db import queries
from service.db.engine import read, write
from service.db.tables import Checkpoint, Idempotency, Job, JobEvent
from service.jobs import idempotency
from service.jobs.records import Created, Event, NewJob, Page, StaleWrite, UnknownJob, new_id
from service.jobs.states import ACTIVE, TERMINAL, IllegalTransition, check

_FREE = {"lease_owner": None, "lease_token": None, "lease_expires_at": None, "stop_deadline": None}


class JobStore:
    """Jobs, their events and their checkpoints, in one database."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.time) -> None:
        """Bind to a database.

        Args:
            engine: from ``service.db.engine.connect``, migrated.
            clock: seconds since the epoch; tests give their own.
        """
        self.engine = engine
        self.clock = clock

    # ---- what the API asks -----------------------------------------------------------------------------------------

    def create(
        self,
        new: NewJob,
        *,
        idempotency_key: str | None = None,
        reservation: str | None = None,
        retry_count: int = 0,
        arrived: float | None = None,
        confirm: Callable[[Session], None] | None = None,
    ) -> Created:
        """Write one job in ``validating_files``, once.

        Args:
            new: what was asked.
            idempotency_key: the ``Idempotency-Key`` header; it wins over ``retry_count``.
            reservation: the token of an earlier ``reserve`` of that key by this request.
            retry_count: the SDK's ``x-stainless-retry-count``; see ``idempotency.repeated``.
            arrived: when the request came, before its checks, on this store's clock.
            confirm: called in the transaction that writes a new job; what it raises, the job is not written for.

        Returns:
            The job, and whether it had been there before.

        Raises:
            IdempotencyMismatch: the key was used with another body (422).
            IdempotencyInFlight: the key's first request has not been answered yet (409).
        """
        now = self.clock()
        with write(self.engine, durable=True) as session:
            if idempotency_key is not None:
                earlier: Job | str | None = idempotency.enter(
                    session, new.key_id, idempotency_key, new.body_hash, reservation, now
                )
            else:
                earlier = idempotency.repeated(session, new, now=now, retry_count=retry_count, arrived=arrived)
            if isinstance(earlier, Job):
                return Created(earlier, replayed=True)
            if confirm is not None:
                confirm(session)
            job = Job(
                id=new.id or new_id("ftjob" if new.kind == "fine_tuning" else "steerjob"),
                kind=new.kind,
                status="validating_files",
                created_at=int(now),
                key_id=new.key_id,
                body_hash=new.body_hash,
                retried_at=now if retry_count > 0 and idempotency_key is None else None,
                model=new.model,
                start=new.start,
                start_kind=new.start_kind,
                method=new.method,
                request=dict(new.request),
                resolved=dict(new.resolved),
                suffix=new.suffix,
                seed=new.seed,
                training_file=new.training_file,
                validation_file=new.validation_file,
                metadata_=dict(new.metadata),
                result_files=[],
                last_seq=0,
            )
            session.add(job)
            session.flush()
            begun = f", which starts from {job.start}" if job.start else ""
            said = [Event(f"Created job {job.id}{begun}"), Event(f"Validating training file {job.training_file}")]
            job.last_seq = len(said)
            queries.insert_events(session, job, said, now)
            if idempotency_key is not None:
                idempotency.complete(session, new.key_id, idempotency_key, job.id)
            session.flush()
            return Created(job, replayed=False)

    def reserve(self, key_id: str, key: str, body_hash: str) -> Job | str:
        """Take an ``Idempotency-Key`` before slow checks, so that a concurrent twin is told to wait.

        Args:
            key_id: the API key that asks.
            key: the header's value.
            body_hash: sha256 of the body.

        Returns:
            The job of an earlier request (answer with it), or a token to pass to ``create`` or ``release``.

        Raises:
            IdempotencyMismatch: the key was used with another body.
            IdempotencyInFlight: another request holds it now.
        """
        with write(self.engine) as session:
            return idempotency.enter(session, key_id, key, body_hash, None, self.clock())

    def release(self, key_id: str, key: str, token: str) -> None:
        """Give a reserved key back: its request was refused, so a corrected one may use it.

        Args:
            key_id: the API key.
            key: the header's value.
            token: from ``reserve``.
        """
        with write(self.engine) as session:
            idempotency.release(session, key_id, key, token)

    def get(self, job_id: str) -> Job:
        """One job.

        Args:
            job_id: its id.

        Returns:
            The row as it is now, detached.

        Raises:
            UnknownJob: there is none.
        """
        with read(self.engine) as session:
            return _get(session, job_id)

    def list(
        self,
        *,
        after: str | None = None,
        limit: int = 20,
        metadata: Mapping[str, str] | None = None,
        kind: str | None = None,
        status: str | None = None,
    ) -> Page[Job]:
        """Jobs, newest first.

        Args:
            after: id of the last job of the page before.
            limit: rows at most.
            metadata: pairs that must all be present.
            kind: ``fine_tuning`` or ``steering_fit`` only.
            status: in this status only.

        Returns:
            A page.

        Raises:
            UnknownJob: ``after`` names no job.
        """
        with read(self.engine) as session:
            before = _get(session, after).number if after is not None else None
            rows = queries.jobs_page(
                session, before=before, limit=limit + 1, metadata=metadata or {}, kind=kind, status=status
            )
        return Page(rows[:limit], has_more=len(rows) > limit)

    def counts(self) -> Mapping[str, int]:
        """How many jobs are in each status (absent: none)."""
        with read(self.engine) as session:
            rows = session.execute(select(Job.status, func.count()).group_by(Job.status)).all()
        return {status: count for status, count in rows}  # noqa: C416  (mypy takes no Row for a pair)

    def request_cancel(self, job_id: str) -> Job:
        """Cancel: at once when nothing runs, else ``cancelling`` until the last process is gone.

        Args:
            job_id: the job.

        Returns:
            The job after it; a job that is being cancelled already is returned as it is.

        Raises:
            UnknownJob: there is none.
            IllegalTransition: it is over.
        """

        def target(job: Job) -> str | None:
            if job.status == "cancelling":
                return None
            return "cancelling" if job.lease_token is not None else "cancelled"

        return self._request(job_id, target, {"cancelling": "Cancel requested", "cancelled": "Job cancelled"})

    def request_pause(self, job_id: str) -> Job:
        """Pause: a running job stops at its next micro-batch and writes a checkpoint, a queued one just waits.

        Args:
            job_id: the job.

        Returns:
            The job after it.

        Raises:
            UnknownJob: there is none.
            IllegalTransition: from its status there is no pause.
        """

        def target(job: Job) -> str | None:
            if job.status in ("pausing", "paused"):
                return None
            return "paused" if job.status == "queued" else "pausing"

        return self._request(job_id, target, {"pausing": "Pause requested", "paused": "Job paused"})

    def request_resume(self, job_id: str) -> Job:
        """Resume a paused job: it is queued again and continues from its last checkpoint.

        Args:
            job_id: the job.

        Returns:
            The job after it.

        Raises:
            UnknownJob: there is none.
            IllegalTransition: it is not paused.
        """

        def target(job: Job) -> str | None:
            if job.status != "paused":  # a retry's `queued` is the scheduler's, not a user's
                raise IllegalTransition(job.id, job.status, "queued")
            return "queued"

        return self._request(job_id, target, {"queued": "Resume requested; job queued"})

    def events(
        self, job_id: str, *, after: int | None = None, limit: int = 20, newest_first: bool = False
    ) -> Page[JobEvent]:
        """Events of a job.

        Args:
            job_id: the job.
            after: seq of the last event seen, in the order of the listing.
            limit: rows at most.
            newest_first: the order of the wire's pages; streams ask the other way round.

        Returns:
            A page.

        Raises:
            UnknownJob: there is no such job.
        """
        with read(self.engine) as session:
            rows = queries.events_page(session, job_id, after=after, limit=limit + 1, newest_first=newest_first)
            if not rows:
                _get(session, job_id)
        return Page(rows[:limit], has_more=len(rows) > limit)

    def checkpoints(
        self, job_id: str, *, after: str | None = None, limit: int = 10, available: bool = True
    ) -> Page[Checkpoint]:
        """Checkpoints of a job, newest first.

        Args:
            job_id: the job.
            after: id of the last checkpoint of the page before.
            limit: rows at most.
            available: only those that retention has not removed.

        Returns:
            A page.

        Raises:
            UnknownJob: there is no such job.
            LookupError: ``after`` is no checkpoint of this job.
        """
        with read(self.engine) as session:
            _get(session, job_id)
            rows = queries.checkpoints_page(session, job_id, after=after, limit=limit + 1, available=available)
        return Page(rows[:limit], has_more=len(rows) > limit)

    def append_event(self, job_id: str, event: Event, *, token: str | None = None) -> int:
        """Add one event.

        Args:
            job_id: the job.
            event: what to say.
            token: of the lease, when the writer works for the job.

        Returns:
            Its seq.

        Raises:
            StaleWrite: no such job, or another lease.
        """
        return self.apply(job_id, token=token, events=[event]).last_seq

    # ---- what the scheduler does -----------------------------------------------------------------------------------

    def claim(self, owner: str, ttl: float, *, status: str = "queued") -> Job | None:
        """Take the oldest free job: at most one claimer gets it.

        Args:
            owner: who claims; shown on the row.
            ttl: seconds until the lease runs out unless renewed.
            status: ``queued`` (it becomes ``running``) or ``validating_files`` (it keeps its status).

        Returns:
            The job with its new ``lease_token``, or None.
        """
        target = "running" if status == "queued" else status
        with write(self.engine) as session:
            return queries.claim(session, status=status, target=target, owner=owner, now=self.clock(), ttl=ttl)

    def take_over(self, owner: str, ttl: float, *, own: bool = False) -> Sequence[Job]:
        """Give leases that ran out to a new owner; their old tokens are worth nothing from here on.

        Args:
            owner: the new owner.
            ttl: seconds, as in ``claim``.
            own: also leases that this very owner held in an earlier life. Only for a server that has proved, by the
                data folder's lock, that no other one lives under its name.

        Returns:
            The jobs, to be looked after: what became of their processes is not known yet.
        """
        with write(self.engine) as session:
            return queries.take_over(session, owner=owner, now=self.clock(), ttl=ttl, own=own)

    def renew(self, tokens: Mapping[str, str], ttl: float) -> set[str]:
        """Prolong leases.

        Args:
            tokens: job id to lease token.
            ttl: seconds from now.

        Returns:
            Ids of the jobs whose lease is no longer ours: let go of them, touch nothing.
        """
        expires = self.clock() + ttl
        with write(self.engine) as session:
            return {job_id for job_id, token in tokens.items() if not queries.renew(session, job_id, token, expires)}

    def claimable(self) -> set[str]:
        """Statuses in which a job waits for ``claim``."""
        with read(self.engine) as session:
            return queries.claimable(session, self.clock())

    def leased(self, tokens: Mapping[str, str]) -> Mapping[str, Job]:
        """The rows behind some leases, as they are now; those of other tokens are left out.

        Args:
            tokens: job id to lease token.

        Returns:
            Job id to row.
        """
        with read(self.engine) as session:
            rows = session.scalars(select(Job).where(Job.id.in_(tokens))).all()
        return {job.id: job for job in rows if job.lease_token == tokens[job.id]}

    def transition(
        self,
        job_id: str,
        source: str,
        target: str,
        *,
        token: str | None = None,
        events: Sequence[Event] = (),
        values: Mapping[str, Any] | None = None,
        rows: Iterable[Any] = (),
    ) -> Job:
        """Change the status, and whatever belongs to that change, at once.

        Args:
            job_id: the job.
            source: the status it must be in.
            target: the status it gets; the lease ends unless the target needs one.
            token: the lease token; required when the job is leased.
            events: events to append.
            values: further columns of the job.
            rows: further ORM rows to insert in the same transaction (a model, a vector, a file).

        Returns:
            The job after it.

        Raises:
            IllegalTransition: the state machine does not allow it.
            StaleWrite: the job is not in ``source`` any more, or the lease is another's. Nothing was written.
        """
        check(job_id, source, target)
        changes = {**(values or {}), "status": target}
        if target not in ACTIVE:
            changes |= _FREE
        if target in TERMINAL:
            changes["finished_at"] = int(self.clock())
        return self.apply(job_id, source=source, token=token, events=events, values=changes, rows=rows)

    def apply(
        self,
        job_id: str,
        *,
        source: str | None = None,
        token: str | None = None,
        offset: int | None = None,
        events: Sequence[Event] = (),
        values: Mapping[str, Any] | None = None,
        rows: Iterable[Any] = (),
        checkpoints: Iterable[Checkpoint] = (),
        gone: Iterable[str] = (),
    ) -> Job:
        """One guarded update of a job with its events and new rows. ``transition`` is this plus the state machine.

        Args:
            job_id: the job.
            source: the status it must be in, if that matters.
            token: the lease token it must have; None: it must not matter, or there must be no lease when ``source``
                is given.
            offset: the ``events_offset`` it must have, so that no line of events.jsonl is taken over twice.
            events: events to append.
            values: columns to set.
            rows: ORM rows to insert.
            checkpoints: new checkpoints; a step saved again replaces the earlier one.
            gone: ids of checkpoints whose directories are gone.

        Returns:
            The job after it.

        Raises:
            StaleWrite: one of the guards failed. Nothing was written.
        """
        guards: dict[str, Any] = {}
        if source is not None:
            guards |= {"status": source, "lease_token": token}
        if token is not None:
            guards["lease_token"] = token
        if offset is not None:
            guards["events_offset"] = offset
        with write(self.engine) as session:
            job = queries.guarded_update(session, job_id, guards, values or {}, len(events))
            if job is None:
                raise StaleWrite(f"job {job_id} was changed by someone else; this result is dropped")
            queries.insert_events(session, job, events, self.clock())
            session.add_all(rows)
            for checkpoint in checkpoints:
                queries.put_checkpoint(session, job, checkpoint)
            missing = tuple(gone)
            if missing:
                session.execute(update(Checkpoint).where(Checkpoint.id.in_(missing)).values(available=False))
            session.flush()
            return job

    def prune_idempotency(self) -> None:
        """Forget idempotency keys older than 24 hours."""
        with write(self.engine) as session:
            session.execute(delete(Idempotency).where(idempotency.expired(self.clock())))

    # ---- helpers ---------------------------------------------------------------------------------------------------

    def _request(self, job_id: str, target: Callable[[Job], str | None], said: Mapping[str, str]) -> Job:
        """A user's wish: look, decide, and write only if nothing has moved in between; else look again."""
        while True:
            job = self.get(job_id)
            wanted = target(job)
            if wanted is None:
                return job
            check(job.id, job.status, wanted)
            try:
                return self.transition(job.id, job.status, wanted, token=job.lease_token, events=[Event(said[wanted])])
            except StaleWrite:
                continue


def _get(session: Session, job_id: str) -> Job:
    job = queries.job_by_id(session, job_id)
    if job is None:
        raise UnknownJob(job_id)
    return job
