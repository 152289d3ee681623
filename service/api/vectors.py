"""`/v1/steering/vectors`: fit as a job, import, list, get, content, delete.

A fit's vector has its id from the start: while the job is on its way, the vector is there with the job's status.
"""

from __future__ import annotations

import os
import secrets
import time
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Query, Request
from sqlalchemy import Engine as Database
from sqlalchemy import case, delete, func, literal, select, tuple_
from sqlalchemy.orm import Session

from core.config import ConfigError, parse
from service.api.deps import Caller, Config, Counts, Db, Jobs, Mover, needs
from service.api.docs import errors_of
from service.api.errors import APIError, bad_request, not_found
from service.api.files import body_of, declared_length
from service.api.fine_tuning import IdempotencyKey, RetryCount, body_hash, check_data, listing, retries, submit
from service.api.ranges import FileContent
from service.api.resolve import check_base, check_blocks
from service.api.schemas.common import Deleted
from service.api.schemas.resources import FitVector, JobError, Listing, VectorObject
from service.api.shape import BoundedRoute
from service.db.engine import read, write
from service.db.tables import Job, Vector
from service.jobs.names import own_id
from service.jobs.records import NewJob, new_id
from service.jobs.states import TERMINAL
from service.security import uploads
from service.security.paths import inside
from service.security.vector_file import read_vector
from steering.config import FitConfig

_ENDS = {"failed": "failed", "cancelled": "was cancelled"}
router = APIRouter(tags=["steering"], route_class=BoundedRoute)
READY = "ready"
"""Status of a vector that can be used."""

_FIT_FIELDS = ("layers", "site", "positions", "batch_size", "max_length", "dtype")
_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": "A vector's safetensors file."},
                        "name": {"type": "string", "maxLength": 255, "description": "Shown in lists."},
                    },
                }
            }
        },
    }
}


def wire(row: Vector) -> VectorObject:
    """A vector's row as the wire shows it."""
    return VectorObject(
        id=row.id,
        status=READY,
        name=row.name,
        model=row.base,
        method=row.method,
        created_at=row.created_at,
        job_id=row.job_id,
        source="import" if row.source == "import" else "fit",
        layers=[int(layer) for layer in row.layers],
        site=row.site,
        fingerprint=row.fingerprint,
        bytes=row.bytes,
        sha256=row.sha256,
        metadata=dict(row.metadata_),
    )


def wire_job(job: Job) -> VectorObject:
    """A vector that is not there yet, as its job stands."""
    error = None
    if job.error_code is not None:
        error = JobError(code=job.error_code, message=job.error_message or "", param=job.error_param)
    return VectorObject(
        id=own_id(job, "vec_"),
        status=job.status,
        name=job.suffix or own_id(job, "vec_"),
        model=job.model,
        method=job.method,
        created_at=job.created_at,
        job_id=job.id,
        source="fit",
        error=error,
        metadata=dict(job.metadata_),
    )


def find(db: Database, name: str, *, param: str = "vector_id") -> Vector | Job:
    """The row of a vector, or the job that is to make it.

    Args:
        db: The database.
        name: The id as it was asked for.
        param: The parameter that held it, for the error.

    Returns:
        The vector's row, else its job's.

    Raises:
        APIError: 404 when there is neither.
    """
    if "\x00" not in name:
        with read(db) as session:
            row = session.scalar(select(Vector).where(Vector.id == name))
            if row is not None:
                return row
            job_id = f"steerjob-{name.removeprefix('vec_')}"
            job = session.scalar(select(Job).where(Job.id == job_id, Job.kind == "steering_fit"))
            if job is not None and job.status != "succeeded":  # a succeeded one without a row: the vector was deleted
                return job
    raise not_found("steering vector", name, param=param, code="vector_not_found")


@router.post("/v1/steering/vectors", response_model=VectorObject, responses=errors_of(404, 409, 422, 507))
@needs("jobs")
def fit_vector(
    wanted: FitVector,
    caller: Caller,
    settings: Config,
    db: Db,
    store: Jobs,
    mover: Mover,
    idempotency_key: IdempotencyKey = None,
    retry_count: RetryCount = None,
) -> VectorObject:
    """Fit a vector to pairs of texts, as a job. Poll the vector, or follow the job at /v1/fine_tuning/jobs/{job_id}."""
    body = wanted.model_dump(exclude_unset=True)
    asked = {name: body[name] for name in _FIT_FIELDS if body.get(name) is not None}
    try:
        parse(FitConfig, {"model": "m", "data_file": "d", "output_dir": "o", "method": wanted.method, **asked})
    except (ConfigError, ValueError) as error:
        field = error.key if isinstance(error, ConfigError) and error.key else "method"
        raise bad_request(f"{error}.", param=field, code="invalid_value") from None
    new = NewJob(
        kind="steering_fit",
        model=wanted.model,
        method=wanted.method,
        request=body,
        resolved=asked,
        seed=secrets.randbelow(2**31) if wanted.seed is None else wanted.seed,
        training_file=wanted.training_file,
        key_id=caller.key_id,
        suffix=wanted.name,
        body_hash=body_hash({**body, "route": "steering"}),
        metadata=wanted.metadata or {},
    )

    def files(session: Session) -> None:
        check_data(session, wanted.training_file, "training_file", ("steering", "fine-tune"))

    def check() -> NewJob:
        check_base(db, settings.home, wanted.model)
        check_blocks(settings.home, wanted.model, wanted.layers or ())
        with read(db) as session:
            files(session)
        return new

    job = submit(store, new, check, files, idempotency_key=idempotency_key, retry_count=retries(retry_count))
    mover.wake()
    return wire_job(job)


@router.post(
    "/v1/steering/vectors/import", response_model=VectorObject, openapi_extra=_FORM, responses=errors_of(422, 507)
)
@needs("jobs")
async def import_vector(request: Request, caller: Caller, settings: Config, db: Db, metrics: Counts) -> VectorObject:
    """Take a vector that was exported here or elsewhere; it steers only the model whose fingerprint it carries."""
    name = new_id("vec", "_")
    upload = await uploads.receive(
        body_of(request),
        content_type=request.headers.get("content-type", ""),
        path=settings.home / "vectors" / f".{name}.part",
        limit=settings.limits.vector_bytes,
        min_free=settings.limits.min_free_disk_bytes,
        declared=declared_length(request),
    )
    try:
        row = await to_thread.run_sync(_store, db, upload, name, caller.key_id, settings.limits.vector_bytes)
    finally:
        upload.path.unlink(missing_ok=True)
    metrics.upload_bytes.inc(upload.size)
    return wire(row)


def _store(db: Database, upload: uploads.Upload, identifier: str, key_id: str, limit: int) -> Vector:
    shown = upload.fields.pop("name", "") or Path(upload.filename).stem or identifier
    for field in upload.fields:
        message = f"Unsupported parameter: {field[:64]!r}. It would have no effect."
        raise bad_request(message, param=field[:64], code="unsupported_parameter")
    if len(shown) > 255 or "\x00" in shown:
        raise bad_request("The name may have 255 characters and no NUL.", param="name")
    try:
        about = read_vector(upload.path, limit)
    except ValueError as error:
        reason = str(error).removeprefix(f"{upload.path.name}: ")
        raise bad_request(f"The file cannot be used: {reason}.", param="file", code="invalid_vector") from None
    final = upload.path.with_name(f"{identifier}.safetensors")
    row = Vector(
        id=identifier,
        name=shown,
        source="import",
        base=about.base,
        fingerprint=about.fingerprint,
        site=about.site,
        method=about.method,
        layers=list(about.layers),
        path=str(final),
        bytes=upload.size,
        sha256=upload.sha256,
        key_id=key_id,
        created_at=int(time.time()),
        metadata_={**about.metadata, "norms": about.norms},
    )
    os.replace(upload.path, final)
    try:
        with write(db) as session:
            session.add(row)
    except BaseException:
        final.unlink(missing_ok=True)
        raise
    return row


@router.get("/v1/steering/vectors", response_model=Listing[VectorObject], responses=errors_of(404))
@needs("read")
def list_vectors(
    db: Db,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Listing[VectorObject]:
    """Vectors, those whose fit is not over among them, in the order in which they were asked for, newest first."""
    # A fit's place is its job's, before and after it ends: nobody who walks the pages misses it or meets it twice.
    fits = select(Job).where(Job.kind == "steering_fit", Job.status.not_in(TERMINAL))
    vectors = select(Vector, Job).join(Job, Job.id == Vector.job_id, isouter=True)
    fit_place = tuple_(Job.created_at, literal(1), Job.number)
    parts = (
        func.coalesce(Job.created_at, Vector.created_at),
        case((Job.id.is_(None), 0), else_=1),
        func.coalesce(Job.number, Vector.number),
    )
    last = None if after is None else find(db, after, param="after")
    with read(db) as session:
        if last is not None:
            job = last if isinstance(last, Job) else session.scalar(select(Job).where(Job.id == last.job_id))
            row = last if job is None else job
            bound = tuple_(literal(row.created_at), literal(0 if job is None else 1), literal(row.number))
            fits, vectors = fits.where(fit_place < bound), vectors.where(tuple_(*parts) < bound)
        found: list[tuple[tuple[int, int, int], VectorObject]] = [
            ((job.created_at, 1, job.number), wire_job(job))
            for job in session.scalars(fits.order_by(Job.created_at.desc(), Job.number.desc()).limit(limit + 1))
        ]
        for vector, job in session.execute(vectors.order_by(*(part.desc() for part in parts)).limit(limit + 1)):
            row = vector if job is None else job
            found.append(((row.created_at, 0 if job is None else 1, row.number), wire(vector)))
    found.sort(key=itemgetter(0), reverse=True)
    return listing([shown for _, shown in found[:limit]], len(found) > limit)


@router.get("/v1/steering/vectors/{vector_id}", response_model=VectorObject, responses=errors_of(404))
@needs("read")
def get_vector(vector_id: str, db: Db) -> VectorObject:
    """One vector, or how its fit stands."""
    found = find(db, vector_id)
    return wire(found) if isinstance(found, Vector) else wire_job(found)


@router.get(
    "/v1/steering/vectors/{vector_id}/content",
    response_class=FileContent,
    responses={
        200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
        206: {"description": "A part of the file."},
        **errors_of(404, 416),
    },
)
@needs("read")
def get_vector_content(vector_id: str, db: Db, settings: Config) -> FileContent:
    """The vector's safetensors file."""
    found = find(db, vector_id)
    if isinstance(found, Job):
        message = f"The vector is not fitted yet: its job is {found.status}."
        if found.status in _ENDS:
            message = f"There is no vector: its job {found.id} {_ENDS[found.status]} before it made one."
        raise APIError(404, message, code="vector_not_ready")
    path = inside(settings.home / "vectors", f"{found.id}.safetensors")
    content = FileContent(path, media_type="application/octet-stream", filename=f"{found.id}.safetensors")
    content.gone = not_found("steering vector", vector_id, param="vector_id", code="vector_not_found")
    return content


@router.delete("/v1/steering/vectors/{vector_id}", response_model=Deleted, responses=errors_of(404))
@needs("jobs")
def delete_vector(vector_id: str, db: Db, settings: Config) -> Deleted:
    """Delete a vector and its file. A fit that is not over is cancelled as a job."""
    found = find(db, vector_id)
    if isinstance(found, Job):
        message = f"The vector is not fitted yet; cancel its job {found.id} instead."
        if found.status in _ENDS:
            message = f"There is no vector to delete: its job {found.id} {_ENDS[found.status]} before it made one."
        raise APIError(400, message, code="vector_not_ready", param="vector_id")
    with write(db) as session:
        session.execute(delete(Vector).where(Vector.id == found.id))
    inside(settings.home / "vectors", f"{found.id}.safetensors").unlink(missing_ok=True)
    return Deleted(id=found.id, object="steering.vector")
