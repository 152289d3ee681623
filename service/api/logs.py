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

from service.api import streams
from service.api.deps import needs
from service.api.docs import SSE, errors_of
from service.api.drain import Draining
from service.api.errors import APIError, bad_request
from service.api.fine_tuning import known_id
from service.api.follow import SETTLED, opened, paced
from service.jobs import logs
from service.jobs.store import JobStore
from service.security.paths import inside

router = APIRouter(tags=["fine-tuning"])
PIECE = 64 * 1024
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})", re.ASCII)
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
    first, end = await to_thread.run_sync(logs.span, folder)
    start, stop, partial = _range(wanted, first, end)
    headers = {"Accept-Ranges": "bytes"}
    if partial:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{end}"
    return StreamingResponse(
        _pieces(folder, start, stop),
        status_code=206 if partial else 200,
        headers=headers,
        media_type="text/plain; charset=utf-8",
    )


def _range(wanted: str | None, first: int, end: int) -> tuple[int, int, bool]:
    """Begin, end and whether it is a part; what is no single byte range is ignored, as HTTP says.

    Args:
        wanted: The Range header.
        first: First byte that is there.
        end: Where the log ends.

    Returns:
        First byte, one past the last byte, and whether it is a part.

    Raises:
        APIError: 416 when nothing of the range exists.
    """
    match = _RANGE.fullmatch(wanted) if wanted is not None else None
    if match is None or (not match[1] and not match[2]):
        return first, end, False
    if match[1]:
        start, stop = int(match[1]), min(end, int(match[2]) + 1) if match[2] else end
    else:
        start, stop = max(first, end - int(match[2])), end
    start = max(start, first)
    if start >= stop:
        headers = {"Content-Range": f"bytes */{end}"}
        message = f"The log has the bytes {first} to {end}; nothing of the range is there."
        raise APIError(416, message, code="range_not_satisfiable", param="Range", headers=headers)
    return start, stop, True


def _pieces(folder: Path, start: int, stop: int) -> Iterator[bytes]:
    while start < stop:
        piece = logs.read(folder, start, min(PIECE, stop - start))
        if not piece.data:
            return
        yield piece.data[: stop - piece.offset]
        start = piece.next


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
        data = data[: whole or len(data)]
        if not data:
            return [], settled
        position = piece.offset + len(data)
        body = {"object": "log", "offset": piece.offset, "text": data.decode("utf-8", "replace")}
        return [streams.event(body, identifier=str(position))], None

    return paced(step, draining)
