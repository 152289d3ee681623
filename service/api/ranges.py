"""Byte ranges as HTTP has them: one at a time; several at once, and what is no range, give the whole."""

from __future__ import annotations

import os
import re

from anyio import to_thread
from fastapi.responses import FileResponse
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from service.api.errors import APIError

_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})", re.ASCII)


def chosen(wanted: str | None, first: int, end: int, *, what: str) -> tuple[int, int, bool]:
    """Begin, end and whether it is a part; what is no single byte range is ignored, as HTTP says.

    Args:
        wanted: The Range header.
        first: First byte that is there.
        end: One past the last byte.
        what: What has the bytes, for the error.

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
        message = f"The {what} has the bytes {first} to {end}; nothing of the range is there."
        raise APIError(416, message, code="range_not_satisfiable", param="Range", headers=headers)
    return start, stop, True


class FileContent(FileResponse):
    """A file, whole or by range; what cannot be sent is an error in the API's own shape, not the framework's."""

    gone: APIError | None = None
    """What to answer when the file is deleted before its first byte is read."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        begin: Message | None = None

        async def later(message: Message) -> None:
            """Hold the head back until there is a byte: the file is opened between the two."""
            nonlocal begin
            if message["type"] == "http.response.start":
                begin = message
                return
            if begin is not None:
                head, begin = begin, None
                await send(head)
            await send(message)

        try:
            if self.stat_result is None:  # the framework then does not look again
                self.stat_result = await to_thread.run_sync(os.stat, self.path)
                self.set_stat_headers(self.stat_result)
            await super().__call__(self._within(scope, self.stat_result.st_size), receive, later)
        except FileNotFoundError:
            if self.gone is None:
                raise
            raise self.gone from None

    def _within(self, scope: Scope, size: int) -> Scope:
        """The request with a range that is in the file, or with none."""
        headers = Headers(scope=scope)
        kept = [(name, value) for name, value in scope["headers"] if name.lower() != b"range"]
        try:
            start, stop, partial = chosen(headers.get("range"), 0, size, what="file")
        except APIError:
            if "if-range" not in headers:  # with it, a range of another version of the file means the whole
                raise
            partial = False
        if partial:
            kept.append((b"range", f"bytes={start}-{stop - 1}".encode()))
        return {**scope, "headers": kept}
