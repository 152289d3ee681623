"""`/v1/files`: data goes in, data and step metrics come out, always as streams."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Query, Request
from sqlalchemy import Engine as Database
from sqlalchemy import delete, or_, select
from sqlalchemy.orm import Session

from core.data.source import looks_like_json_lines
from service.api.deps import Caller, Config, Counts, Db, needs
from service.api.docs import errors_of
from service.api.errors import APIError, bad_request, not_found
from service.api.ranges import FileContent
from service.api.schemas.common import Deleted
from service.api.schemas.resources import FileObject, Listing
from service.api.shape import BoundedRoute
from service.db.engine import read, write
from service.db.tables import File, Job
from service.jobs.records import new_id
from service.jobs.states import TERMINAL
from service.security import uploads
from service.security.paths import inside

router = APIRouter(tags=["files"], route_class=BoundedRoute)
PURPOSES = ("fine-tune", "steering")

_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": "JSON lines."},
                        "purpose": {"type": "string", "enum": list(PURPOSES)},
                    },
                }
            }
        },
    }
}


def wire(row: File) -> FileObject:
    """A file's row as the wire shows it."""
    return FileObject(
        id=row.id,
        bytes=row.bytes,
        created_at=row.created_at,
        expires_at=row.expires_at,
        filename=row.filename,
        purpose=row.purpose,
        status=row.status,
    )


def find(db: Database, file_id: str, *, param: str | None = "file_id") -> File:
    """The row of a file.

    Args:
        db: The database.
        file_id: The id as it was asked for.
        param: The parameter that held it, for the error.

    Returns:
        The row, detached.

    Raises:
        APIError: 404 when there is none.
    """
    with read(db) as session:
        return held(session, file_id, param=param)


def held(session: Session, file_id: str, *, param: str | None = "file_id", alone: bool = False) -> File:
    """The row of a file, which stays until the end of the transaction.

    Args:
        session: Any transaction.
        file_id: The id as it was asked for.
        param: The parameter that held it, for the error.
        alone: Wait for those who hold it, too.

    Returns:
        The row.

    Raises:
        APIError: 404 when there is none.
    """
    # SQLite has one writer at a time, and needs no lock.
    mine = select(File).where(File.id == file_id).with_for_update(read=not alone)
    row = session.scalar(mine) if "\x00" not in file_id else None
    if row is None:
        raise not_found("file", file_id, param=param, code="file_not_found")
    return row


async def body_of(request: Request) -> AsyncIterator[bytes]:
    """The request's body in pieces."""
    async for piece in request.stream():
        yield piece


def declared_length(request: Request) -> int:
    """The request's Content-Length, 0 when it has none that can be read."""
    text = request.headers.get("content-length", "0")
    return int(text[:18]) if text.isdecimal() else 0


@router.post("/v1/files", response_model=FileObject, openapi_extra=_FORM, responses=errors_of(422, 507))
@needs("jobs")
async def upload_file(request: Request, caller: Caller, settings: Config, db: Db, metrics: Counts) -> FileObject:
    """Upload JSON lines. What is not JSON lines at all is refused here; rows are checked when a job uses them."""
    folder = settings.home / "files"
    file_id = new_id("file")
    upload = await uploads.receive(
        body_of(request),
        content_type=request.headers.get("content-type", ""),
        path=folder / f".{file_id}.part",
        limit=settings.limits.upload_bytes,
        min_free=settings.limits.min_free_disk_bytes,
        declared=declared_length(request),
    )
    try:
        row = await to_thread.run_sync(_store, db, upload, file_id, caller.key_id)
    finally:
        upload.path.unlink(missing_ok=True)
    metrics.upload_bytes.inc(upload.size)
    return wire(row)


def _store(db: Database, upload: uploads.Upload, file_id: str, key_id: str) -> File:
    purpose = upload.fields.pop("purpose", None)
    if purpose is None:
        raise bad_request("Missing required parameter: 'purpose'.", param="purpose", code="missing_required_parameter")
    if purpose not in PURPOSES:
        raise bad_request(f"purpose must be one of {', '.join(PURPOSES)}.", param="purpose")
    for name in upload.fields:
        message = f"Unsupported parameter: {name[:64]!r}. It would have no effect."
        raise bad_request(message, param=name[:64], code="unsupported_parameter")
    if upload.size == 0:
        raise bad_request("The file is empty.", param="file", code="empty_file")
    reason = looks_like_json_lines(upload.head)
    if reason is not None:
        raise bad_request(f"{reason[0].upper()}{reason[1:]}.", param="file", code="invalid_file_format")
    row = File(
        id=file_id,
        filename=upload.filename or "upload.jsonl",
        purpose=purpose,
        bytes=upload.size,
        sha256=upload.sha256,
        created_at=int(time.time()),
        status="processed",
        key_id=key_id,
    )
    final = upload.path.with_name(file_id)
    os.replace(upload.path, final)
    try:
        with write(db) as session:
            session.add(row)
    except BaseException:
        final.unlink(missing_ok=True)
        raise
    return row


@router.get("/v1/files", response_model=Listing[FileObject], responses=errors_of(404))
@needs("read")
def list_files(
    db: Db,
    purpose: Annotated[str | None, Query(max_length=32)] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    after: Annotated[str | None, Query(max_length=64)] = None,
) -> Listing[FileObject]:
    """Files, newest first unless `order=asc`."""
    query = select(File).order_by(File.number.asc() if order == "asc" else File.number.desc()).limit(limit + 1)
    if purpose is not None:
        query = query.where(File.purpose == purpose.replace("\x00", ""))
    if after is not None:
        number = find(db, after, param="after").number
        query = query.where(File.number > number if order == "asc" else File.number < number)
    with read(db) as session:
        rows = session.scalars(query).all()
    data = [wire(row) for row in rows[:limit]]
    return Listing[FileObject](
        data=data,
        has_more=len(rows) > limit,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
    )


@router.get("/v1/files/{file_id}", response_model=FileObject, responses=errors_of(404))
@needs("read")
def get_file(file_id: str, db: Db) -> FileObject:
    """One file."""
    return wire(find(db, file_id))


@router.get(
    "/v1/files/{file_id}/content",
    response_class=FileContent,
    responses={
        200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
        206: {"description": "A part of the file."},
        **errors_of(404, 416),
    },
)
@needs("read")
def get_file_content(file_id: str, db: Db, settings: Config) -> FileContent:
    """The file's bytes; a job's `result_files[0]` is the CSV of its step metrics."""
    row = find(db, file_id)
    path = inside(settings.home / "files", row.id)
    content = FileContent(path, media_type="application/octet-stream", filename=row.filename)
    content.gone = not_found("file content", file_id, param="file_id", code="file_not_found")
    return content


@router.delete("/v1/files/{file_id}", response_model=Deleted, responses=errors_of(404))
@needs("jobs")
def delete_file(file_id: str, db: Db, settings: Config) -> Deleted:
    """Delete a file, unless a job that is not over yet needs it."""
    with write(db) as session:
        row = held(session, file_id, alone=True)  # a job that is being written with it is seen below
        user = session.scalar(
            select(Job.id).where(
                or_(Job.training_file == row.id, Job.validation_file == row.id), Job.status.not_in(TERMINAL)
            )
        )
        if user is not None:
            message = f"The job {user} still needs this file; cancel it or wait for its end."
            # 400 and not 409: clients of the OpenAI SDK send a 409 again, and a job ends no sooner for that.
            raise APIError(400, message, code="file_in_use", param="file_id")
        session.execute(delete(File).where(File.id == row.id))
    inside(settings.home / "files", row.id).unlink(missing_ok=True)
    return Deleted(id=row.id, object="file")
