"""The log of a job's run: as text, whole or by byte range, and as a stream that is taken up again by byte offset.

Offsets are absolute: rotation drops the oldest bytes and renames nothing. A range whose beginning is gone is answered
from the oldest byte there is; Content-Range and ``offset`` say so.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Header, Query, Request
from starlette.responses import Response, StreamingResponse

from service.api import ranges, streams
from service.api.deps import needs
from service.api.docs import SSE, errors_of
from service.api.drain import Draining
from service.api.errors import bad_request
from service.api.fine_tuning import known_id
from service.api.follow import SETTLED, opened, paced
from service.api.shape import BoundedRoute
from service.jobs import logs
from service.jobs.store import JobStore
from service.security.paths import inside

router = APIRouter(tags=["fine-tuning"], route_class=BoundedRoute)
PIECE = 64 * 1024
_LOOKS = 3
_TEXT = {"text/plain": {"schema": {"type": "string"}}, **SSE}


@router.get(
    "/v1/fine_tuning/jobs/{fine_tuning_job_id}/logs",
    response_class=Response,
    responses={
        200: {"content": _TEXT},
        206: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "The range asked for."},
        **errors_of(404, 416, 429),
    },
)
@needs("read")
async def get_logs(
    request: Request,
    fine_tuning_job_id: str,
    stream: Annotated[bool, Query(description="Send new text as it comes, until the job settles.")] = False,
    offset: Annotated[int, Query(ge=0, lt=2**53, description="First byte of a stream.")] = 0,
    last_event_id: Annotated[
        str | None, Header(alias="Last-Event-ID", max_length=20, description="Byte offset to go on from.")
    ] = None,
    wanted: Annotated[str | None, Header(alias="Range", max_length=64, description="`bytes=first-last`.")] = None,
) -> Response:
    """What the run wrote: text (`Range: bytes=...` for a part), or with `stream=true` server-sent events."""
    state = request.app.state
    store: JobStore = state.store
    job = await to_thread.run_sync(store.get, known_id(fine_tuning_job_id) or "")
    folder = inside(state.settings.home / "jobs", job.id)
    if stream:
        if last_event_id is not None:
            if not re.fullmatch(r"[0-9]{1,15}", last_event_id, re.ASCII):
                raise bad_request("Last-Event-ID is the byte offset of the last event.", param="Last-Event-ID")
            offset = int(last_event_id)
        return opened(request, lambda: _follow(store, job.id, folder, offset, state.draining))
    for _ in range(_LOOKS):
        first, end = await to_thread.run_sync(logs.span, folder)
        start, stop, partial = ranges.chosen(wanted, first, end, what="log")
        begun = await to_thread.run_sync(logs.read, folder, start, min(PIECE, stop - start))
        if begun.offset == start and (begun.data or start == stop):
            break  # else the oldest bytes went while we looked, and the head must not promise them
    headers = {"Accept-Ranges": "bytes"}
    if partial:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{end}"
    return StreamingResponse(
        _pieces(folder, start, stop, begun.data),
        status_code=206 if partial else 200,
        headers=headers,
        media_type="text/plain; charset=utf-8",
    )


def _pieces(folder: Path, start: int, stop: int, begun: bytes) -> Iterator[bytes]:
    """The bytes from `start` on, those that were read already first; ends early where the next are gone meanwhile."""
    yield begun
    start += len(begun)
    while start < stop:
        piece = logs.read(folder, start, min(PIECE, stop - start))
        if not piece.data or piece.offset != start:
            return
        yield piece.data
        start = piece.next


def _characters(data: bytes) -> bytes:
    """The bytes without the beginning of a UTF-8 character whose rest is yet to come, unless they are nothing else."""
    for back in range(1, min(4, len(data))):
        byte = data[-back]
        if byte & 0xC0 != 0x80:  # the first byte of a character, which says how many there are
            long = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
            return data[:-back] if long > back else data
    return data


def _follow(
    store: JobStore, job_id: str, folder: Path, position: int, draining: Draining
) -> AsyncGenerator[bytes, None]:
    """Whole lines where lines end; the rest when the job has settled or a piece is full without an end."""

    def look(at: int) -> tuple[logs.Piece, str]:
        status = store.get(job_id).status
        return logs.read(folder, at, PIECE), status

    async def step() -> tuple[list[bytes], str | None]:
        nonlocal position
        piece, status = await to_thread.run_sync(look, position)
        settled = status if status in SETTLED else None
        data = piece.data
        whole = data.rfind(b"\n") + 1
        if whole == 0 and len(data) < PIECE and settled is None:
            return [], None
        data = data[:whole] if whole else _characters(data)
        if not data:
            return [], settled
        position = piece.offset + len(data)
        body = {"object": "log", "offset": piece.offset, "text": data.decode("utf-8", "replace")}
        return [streams.event(body, identifier=str(position))], None

    return paced(step, draining)
