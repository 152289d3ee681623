"""`/v1/fine_tuning/jobs`: create, look at and steer the course of jobs; the work itself is the scheduler's."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request
from sqlalchemy.orm import Session

from service.api import methods
from service.api.deps import Caller, Config, Db, Jobs, Mover, needs
from service.api.docs import errors_of
from service.api.errors import bad_request, not_found
from service.api.files import held as find_file
from service.api.model_names import ModelMissing
from service.api.resolve import origin
from service.api.schemas.resources import CheckpointObject, CreateJob, JobError, JobObject, Listing
from service.api.shape import BoundedRoute
from service.db.engine import read
from service.db.tables import Checkpoint, Job
from service.jobs import idempotency, names, starts
from service.jobs.records import NewJob, UnknownJob, new_id
from service.jobs.store import JobStore

router = APIRouter(tags=["fine-tuning"], route_class=BoundedRoute)
OBJECTS = {"fine_tuning": "fine_tuning.job", "steering_fit": "steering.job"}
_METADATA = re.compile(r"metadata\[([^\[\]]{1,64})\]")

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern=r"^[\x21-\x7e]+$",
        description="The same key and body within 24 hours give the same job.",
    ),
]
RetryCount = Annotated[
    str | None,
    Header(
        alias="x-stainless-retry-count",
        description="Sent by the OpenAI SDK. Above 0, a job that the same key created from the same body in the last "
        "ten minutes is the answer.",
    ),
]


def wire(job: Job) -> JobObject:
    """A job's row as the wire shows it."""
    shown = dict(job.resolved)
    basic = {name: shown.get(name) for name in methods.OPENAI} if job.kind == "fine_tuning" else {}
    error = None
    if job.error_code is not None:
        error = JobError(code=job.error_code, message=job.error_message or "", param=job.error_param)
    return JobObject(
        id=job.id,
        object=OBJECTS[job.kind],
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        model=job.start or job.model,
        base=job.model,
        fine_tuned_model=job.result_model,
        vector=job.result_vector,
        status=job.status,
        hyperparameters=basic,
        method={"type": job.method, job.method: {"hyperparameters": shown}},
        training_file=job.training_file,
        validation_file=job.validation_file,
        result_files=[str(name) for name in job.result_files],
        trained_tokens=job.trained_tokens,
        error=error,
        seed=job.seed,
        suffix=job.suffix,
        estimated_finish=job.estimated_finish if job.status == "running" else None,
        metadata={str(key): str(value) for key, value in job.metadata_.items()},
        progress={
            "step": job.step,
            "total_steps": job.total_steps,
            "attempt": job.attempt,
            "grace_seconds": job.grace_seconds,
        },
    )


def body_hash(body: dict[str, Any]) -> str:
    """The sha256 of a request's canonical JSON."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def retries(header: str | None) -> int:
    """The SDK's retry count; what is no small number counts as none."""
    return int(header) if header is not None and re.fullmatch(r"[0-9]{1,3}", header, re.ASCII) else 0


def submit(
    store: JobStore,
    new: NewJob,
    check: Callable[[], NewJob],
    files: Callable[[Session], None],
    *,
    idempotency_key: str | None,
    retry_count: int,
) -> Job:
    """Write a job once, after its checks.

    A repeated request is looked up before the checks, so that it gets its job even if, say, its file was deleted since.

    Args:
        store: The job store.
        new: The job as asked for.
        check: Called before the job is written; raises what is wrong with the request, and returns the job to write.
        files: Called in the transaction that writes the job: raises when a file that it names was deleted since.
        idempotency_key: The request's key, if any.
        retry_count: The SDK's retry count.

    Returns:
        The new job, or the earlier one that this request repeats.
    """
    arrived = store.clock()
    reservation: str | None = None
    if idempotency_key is not None:
        held = store.reserve(new.key_id, idempotency_key, new.body_hash)
        if isinstance(held, Job):
            return held
        reservation = held
    elif retry_count > 0:
        with read(store.engine) as session:
            earlier = idempotency.recent(session, new.key_id, new.body_hash, store.clock())
        if earlier is not None:
            return earlier
    try:
        ready = check()
        return store.create(
            ready,
            idempotency_key=idempotency_key,
            reservation=reservation,
            retry_count=retry_count,
            arrived=arrived,
            confirm=files,
        ).job
    except Exception:
        if idempotency_key is not None and reservation is not None:
            store.release(new.key_id, idempotency_key, reservation)
        raise


def check_data(session: Session, file_id: str, param: str, purposes: tuple[str, ...]) -> None:
    """Refuse a file that does not exist or is for something else.

    Args:
        session: Any transaction; until the end of one that writes, the file cannot be deleted.
        file_id: The id as it was asked for.
        param: The parameter that held it, for the error.
        purposes: What the file may be for; the first is named as the cure.

    Raises:
        APIError: 404 or 400.
    """
    row = find_file(session, file_id, param=param)
    if row.purpose not in purposes:
        message = f"The file {row.id} has the purpose {row.purpose!r}; upload it with purpose {purposes[0]!r}."
        raise bad_request(message, param=param, code="invalid_file_purpose")


@router.post("/v1/fine_tuning/jobs", response_model=JobObject, responses=errors_of(404, 409, 422, 507))
@needs("jobs")
def create_job(
    wanted: CreateJob,
    caller: Caller,
    settings: Config,
    db: Db,
    store: Jobs,
    mover: Mover,
    idempotency_key: IdempotencyKey = None,
    retry_count: RetryCount = None,
) -> JobObject:
    """Create a job. It answers at once; the rows of the files are checked next, in a process of their own."""
    name, asked = methods.chosen(wanted)
    where = "hyperparameters"
    if wanted.method is not None:
        where = f"method.{wanted.method.type}.hyperparameters"
    resolved = methods.check(name, asked, where=where, validated=wanted.validation_file is not None)
    body = wanted.model_dump(exclude_unset=True)
    own = new_id("ftjob")
    new = NewJob(
        id=own,
        kind="fine_tuning",
        model=wanted.model,
        method=name,
        request=body,
        resolved=resolved,
        seed=secrets.randbelow(2**31) if wanted.seed is None else wanted.seed,
        training_file=wanted.training_file,
        validation_file=wanted.validation_file,
        key_id=caller.key_id,
        body_hash=body_hash(body),
        suffix=wanted.suffix,
        metadata=wanted.metadata or {},
    )

    def files(session: Session) -> None:
        check_data(session, wanted.training_file, "training_file", ("fine-tune",))
        if wanted.validation_file is not None:
            check_data(session, wanted.validation_file, "validation_file", ("fine-tune",))

    def check() -> NewJob:
        found = origin(db, settings.home, wanted.model)
        with read(db) as session:
            files(session)
        if found.kind is None:
            return new
        try:
            starts.keep(found, settings.home, own)
        except FileNotFoundError:
            raise ModelMissing(wanted.model) from None
        start = names.start_directory(settings.home, own) if found.adapter else None
        fixed = methods.check(name, asked, where=where, validated=wanted.validation_file is not None, start=start)
        return replace(new, model=found.base, start=wanted.model, start_kind=found.kind, resolved=fixed)

    job: Job | None = None
    try:
        job = submit(store, new, check, files, idempotency_key=idempotency_key, retry_count=retries(retry_count))
    finally:
        if job is None or job.id != own:
            starts.discard(settings.home, own)
    mover.wake()
    return wire(job)


_DEEP_METADATA: dict[str, Any] = {
    "parameters": [
        {
            "name": "metadata",
            "in": "query",
            "style": "deepObject",
            "explode": True,
            "required": False,
            "schema": {
                "type": "object",
                "propertyNames": {"pattern": r"^[^\[\]\u0000]{1,64}$"},
                "additionalProperties": {"type": "string", "pattern": r"^[^\u0000]*$"},
            },
            "description": "Only jobs with these pairs: `metadata[k]=v`.",
        }
    ]
}


@router.get(
    "/v1/fine_tuning/jobs",
    response_model=Listing[JobObject],
    responses=errors_of(404),
    openapi_extra=_DEEP_METADATA,
)
@needs("read")
def list_jobs(
    request: Request,
    store: Jobs,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    kind: Annotated[
        Literal["fine_tuning", "steering_fit", "all"], Query(description="`steering_fit` are the fits of vectors.")
    ] = "fine_tuning",
) -> Listing[JobObject]:
    """Fine-tuning jobs, newest first; with `kind=all` the fits of vectors too, whatever became of them."""
    wanted: dict[str, str] = {}
    for key, value in request.query_params.multi_items():
        if not key.startswith("metadata"):
            continue
        match = _METADATA.fullmatch(key)
        if match is None or "\x00" in key + value:
            raise bad_request("Filter by metadata as metadata[key]=value.", param="metadata")
        wanted[match[1]] = value
    sort = None if kind == "all" else kind
    try:
        page = store.list(after=known_id(after), limit=limit, metadata=wanted or None, kind=sort)
    except UnknownJob:
        raise not_found("job", after or "", param="after", code="job_not_found") from None
    return listing([wire(job) for job in page.data], page.has_more)


def known_id(text: str | None) -> str | None:
    """An id for a query; NUL, which not every database takes, is left out so that nothing is found."""
    return None if text is None else text.replace("\x00", "?")


def listing(data: list[Any], has_more: bool) -> Listing[Any]:
    """A page of objects with ids."""
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return Listing[Any](data=data, has_more=has_more, first_id=first, last_id=last)


@router.get("/v1/fine_tuning/jobs/{fine_tuning_job_id}", response_model=JobObject, responses=errors_of(404))
@needs("read")
def get_job(fine_tuning_job_id: str, store: Jobs) -> JobObject:
    """One job, of fine-tuning or of fitting a vector."""
    return wire(store.get(known_id(fine_tuning_job_id) or ""))


@router.post("/v1/fine_tuning/jobs/{fine_tuning_job_id}/cancel", response_model=JobObject, responses=errors_of(404))
@needs("jobs")
def cancel_job(fine_tuning_job_id: str, store: Jobs, mover: Mover) -> JobObject:
    """Cancel: at once when nothing runs; else `cancelling` until its last process is gone."""
    job = store.request_cancel(known_id(fine_tuning_job_id) or "")
    mover.wake()
    return wire(job)


@router.post("/v1/fine_tuning/jobs/{fine_tuning_job_id}/pause", response_model=JobObject, responses=errors_of(404))
@needs("jobs")
def pause_job(fine_tuning_job_id: str, store: Jobs, mover: Mover) -> JobObject:
    """Pause: the run stops at its next micro-batch and writes a checkpoint."""
    job = store.request_pause(known_id(fine_tuning_job_id) or "")
    mover.wake()
    return wire(job)


@router.post("/v1/fine_tuning/jobs/{fine_tuning_job_id}/resume", response_model=JobObject, responses=errors_of(404))
@needs("jobs")
def resume_job(fine_tuning_job_id: str, store: Jobs, mover: Mover) -> JobObject:
    """Queue a paused job again; it goes on from its checkpoint as if it had never stopped."""
    job = store.request_resume(known_id(fine_tuning_job_id) or "")
    mover.wake()
    return wire(job)


def wire_checkpoint(row: Checkpoint) -> CheckpointObject:
    """A checkpoint's row as the wire shows it."""
    return CheckpointObject(
        id=row.id,
        created_at=row.created_at,
        fine_tuned_model_checkpoint=row.model_id,
        fine_tuning_job_id=row.job_id,
        metrics=dict(row.metrics),
        step_number=row.step,
    )


@router.get(
    "/v1/fine_tuning/jobs/{fine_tuning_job_id}/checkpoints",
    response_model=Listing[CheckpointObject],
    responses=errors_of(404),
)
@needs("read")
def list_checkpoints(
    fine_tuning_job_id: str,
    store: Jobs,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 10,
) -> Listing[CheckpointObject]:
    """Checkpoints that can be used as models, newest first."""
    try:
        page = store.checkpoints(known_id(fine_tuning_job_id) or "", after=known_id(after), limit=limit)
    except UnknownJob:
        raise
    except LookupError:
        raise not_found("checkpoint of this job", after or "", param="after") from None
    return listing([wire_checkpoint(row) for row in page.data], page.has_more)
