"""How large the JSON of a request may be, judged before it is validated.

Validation names every fault with a place, and a mebibyte of JSON has room for hundreds of thousands of them: seconds in
which the one thread that answers everybody does nothing else. So what no honest request looks like is refused whole.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from service.api.errors import bad_request

MAX_ITEMS = 50_000
"""Values in one body, those inside of others too. 4096 messages of one part each have 28,000."""
MAX_KEYS = 128
"""Names in one object; none of ours has half as many."""


def judge(value: Any) -> int:
    """Count a body's values, without recursion and no further than they may be.

    Args:
        value: The parsed JSON.

    Returns:
        How many values are in it.

    Raises:
        APIError: 400, there are too many, or an object has too many names.
    """
    count, left = 0, [value]
    while left:
        item = left.pop()
        if not isinstance(item, dict | list):
            continue
        if isinstance(item, dict) and len(item) > MAX_KEYS:
            message = f"An object of the body has {len(item)} names; {MAX_KEYS} are the most that one may have."
            raise bad_request(message, code="body_too_complex")
        count += len(item)
        if count > MAX_ITEMS:
            message = f"The body holds more than {MAX_ITEMS} values. Send fewer: text can be joined into fewer parts."
            raise bad_request(message, code="body_too_complex")
        left.extend(item.values() if isinstance(item, dict) else item)
    return count


@contextmanager
def _no_collection() -> Iterator[None]:
    """Parse without looking for garbage: a mebibyte of empty lists takes 16 ms instead of 200."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class BoundedRoute(APIRoute):
    """A route that looks at the shape of a JSON body before the framework validates it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, with the look before it."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def bounded(request: Request) -> Response:
            if "json" in request.headers.get("content-type", ""):
                await request.body()
                with _no_collection():  # nothing is waited for in it: the body is here
                    try:
                        content = await request.json()  # parsed once: the framework finds it on the request
                    except (ValueError, RecursionError):
                        content = None  # the framework says what is wrong with it
                    judge(content)
            elif await request.body():
                message = "The body is not announced as JSON: send it with the header Content-Type: application/json."
                raise bad_request(message, param=None, code="not_json")
            return await handle(request)

        return bounded
