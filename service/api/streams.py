"""Server-sent events: formatting, and a response that always closes its source."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import anyio
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from service.api.generation import unless_left
from service.engines.base import EngineUnavailable

T = TypeVar("T")

PING = b": ping\n\n"
"""A comment: keeps proxies from closing a silent stream, and readers skip it."""

DONE = b"data: [DONE]\n\n"
"""OpenAI's end of a generation stream."""


def event(data: dict[str, Any], *, name: str | None = None, identifier: str | None = None) -> bytes:
    """One event as bytes.

    Args:
        data: JSON without NaN.
        name: Event name; none is ``message``.
        identifier: What a reader sends back as ``Last-Event-ID``.

    Returns:
        The event, closed by an empty line.
    """
    lines = [] if name is None else [f"event: {name}"]
    lines.append(f"data: {json.dumps(data, separators=(',', ':'), ensure_ascii=True, allow_nan=False)}")
    if identifier is not None:
        lines.append(f"id: {identifier}")
    return ("\n".join(lines) + "\n\n").encode()


class EventStream(StreamingResponse):
    """Server-sent events whose source is closed however the response ends, even when it never began.

    Args:
        chunks: Encoded events.
        close: Closes what stands behind ``chunks``; a generator that never began closes nothing itself.
        media_type: Content type of the stream.
    """

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        *,
        close: Callable[[], Awaitable[None]] | None = None,
        media_type: str = "text/event-stream",
    ) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(chunks, headers=headers, media_type=media_type)
        self._chunks, self._close = chunks, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream, then close its source."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._chunks.aclose()
                if self._close is not None:
                    await self._close()


async def primed(
    request: Request,
    source: AsyncGenerator[T, None],
    render: Callable[[AsyncGenerator[T, None]], AsyncGenerator[bytes, None]],
) -> EventStream:
    """A stream whose first item has come already, so that an error before it is still an HTTP status.

    Args:
        request: The request; when its client goes away before the first item, the source is closed.
        source: The items; closed by the response, or here when there is no first item.
        render: Turns all items, the first one too, into bytes.

    Returns:
        The response.

    Raises:
        EngineUnavailable: The source ended without an item.
    """

    async def begun() -> T:
        async for item in source:
            return item
        raise EngineUnavailable("The engine ended without an answer; try again.")

    try:
        first = await unless_left(request, begun())
    except BaseException:
        await source.aclose()
        raise

    async def whole() -> AsyncGenerator[T, None]:
        async with aclosing(source):
            yield first
            async for item in source:
                yield item

    return EventStream(render(whole()), close=source.aclose)
