"""Events and logs of a job: as pages, and as streams that a reader can take up again where it lost them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Header, Query, Request
from starlette.responses import JSONResponse, Response

from service.api import streams
from service.api.deps import needs
from service.api.docs import SSE, errors_of
from service.api.drain import Draining
from service.api.errors import APIError, bad_request
from service.api.fine_tuning import known_id, listing
from service.api.schemas.resources import EventObject, Listing
from service.api.shape import BoundedRoute
from service.db.tables import JobEvent
from service.jobs.records import event_seq
from service.jobs.states import TERMINAL
from service.jobs.store import JobStore
from service.metrics import Metrics

router = APIRouter(tags=["fine-tuning"], route_class=BoundedRoute)
SETTLED = TERMINAL | {"paused"}
"""Statuses in which nothing more happens by itself: a stream ends there."""

POLL_SECONDS = 0.25
PING_SECONDS = 15.0
_PAGE = 500


def wire(row: JobEvent) -> EventObject:
    """An event's row as the wire shows it."""
    return EventObject(
        id=row.id,
        created_at=row.created_at,
        level=row.level,  # type: ignore[arg-type]
        message=row.message,
        type=row.type,  # type: ignore[arg-type]
        data=dict(row.data),
    )


def _seq(text: str | None, job_id: str, param: str) -> int | None:
    if text is None:
        return None
    try:
        seq = event_seq(text)
    except ValueError as error:
        raise bad_request(f"{error}.", param=param) from None
    if text.rpartition("-")[0] != f"ftevent-{job_id.rpartition('-')[2]}":
        raise bad_request(f"The event {text[:80]!r} belongs to another job.", param=param)
    return seq


@router.get(
    "/v1/fine_tuning/jobs/{fine_tuning_job_id}/events",
    response_model=Listing[EventObject],
    responses={200: {"content": SSE}, **errors_of(404, 429)},
)
@needs("read")
async def list_events(
    request: Request,
    fine_tuning_job_id: str,
    after: Annotated[str | None, Query(max_length=128, description="Id of the last event seen.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="Of a page.")] = 20,
    stream: Annotated[
        bool, Query(description="Send events as they happen, oldest first, until the job settles.")
    ] = False,
    last_event_id: Annotated[
        str | None, Header(alias="Last-Event-ID", max_length=128, description="As `after`, for a stream.")
    ] = None,
) -> Response:
    """Events of a job: a page, newest first, or with `stream=true` server-sent events, oldest first."""
    store: JobStore = request.app.state.store
    job_id = known_id(fine_tuning_job_id) or ""
    if not stream:
        seq = _seq(after, job_id, "after")
        page = await to_thread.run_sync(lambda: store.events(job_id, after=seq, limit=limit, newest_first=True))
        return JSONResponse(listing([wire(row) for row in page.data], page.has_more).model_dump())
    seen = _seq(last_event_id, job_id, "Last-Event-ID") if last_event_id is not None else _seq(after, job_id, "after")
    await to_thread.run_sync(store.get, job_id)
    return opened(request, lambda: _events(store, job_id, seen or 0, request.app.state.draining))


def opened(request: Request, source: Callable[[], AsyncGenerator[bytes, None]]) -> streams.EventStream:
    """A counted stream.

    Args:
        request: The request.
        source: Makes the encoded events.

    Returns:
        The response.

    Raises:
        APIError: 429 when too many are open.
    """
    state = request.app.state
    metrics: Metrics = state.metrics
    if state.open_streams >= state.settings.limits.stream_clients:
        message = f"{state.open_streams} streams are open, the most allowed. Close one, or poll."
        raise APIError(429, message, code="too_many_streams", headers={"Retry-After": "5"})
    state.open_streams += 1
    metrics.streams.inc()

    async def closed() -> None:
        state.open_streams -= 1
        metrics.streams.dec()

    return streams.EventStream(source(), close=closed)


async def paced(
    step: Callable[[], Awaitable[tuple[list[bytes], str | None]]], draining: Draining
) -> AsyncGenerator[bytes, None]:
    """Ask ``step`` for news until it says why there is no more, or the server stops; the last event tells which.

    Args:
        step: Returns new events, and when there are none and will be none, the job's status.
        draining: The server's stop.
    """
    silent = 0.0
    while True:
        news, settled = await step()
        for item in news:
            silent = 0.0
            yield item
        if news:
            continue
        if settled is not None:
            yield streams.event({"object": "stream.end", "reason": "settled", "status": settled}, name="done")
            return
        if draining.begun.is_set():
            yield streams.event({"object": "stream.end", "reason": "server_stopping"}, name="shutdown")
            return
        try:
            async with asyncio.timeout(POLL_SECONDS):
                await draining.begun.wait()
        except TimeoutError:
            silent += POLL_SECONDS
        if silent >= PING_SECONDS:
            silent = 0.0
            yield streams.PING


def _events(store: JobStore, job_id: str, seen: int, draining: Draining) -> AsyncGenerator[bytes, None]:
    def look(after: int) -> tuple[list[JobEvent], str]:
        status = store.get(job_id).status  # read first: what it says is followed by no later event
        return list(store.events(job_id, after=after, limit=_PAGE).data), status

    async def step() -> tuple[list[bytes], str | None]:
        nonlocal seen
        rows, status = await to_thread.run_sync(look, seen)
        if rows:
            seen = rows[-1].seq
        news = [streams.event(wire(row).model_dump(), identifier=row.id) for row in rows]
        return news, status if status in SETTLED else None

    return paced(step, draining)
