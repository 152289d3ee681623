"""What every request passes before any route: an id, a log line, the Host and Origin check, bounds on its body.

Plain ASGI, so streams pass through unbuffered and nothing is skipped for a route that forgot a dependency.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from uuid import uuid4

import structlog
from anyio import to_thread
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api import errors
from service.api.deps import scope_of
from service.db.engine import DatabaseBusy
from service.log import logger
from service.metrics import Metrics
from service.security import keys
from service.security.hosts import HostPolicy
from service.security.keys import Identity

log = logger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
BODY_SECONDS = 30.0
"""Longest pause between two pieces of a body."""

SECURITY_HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)


def _headers(scope: Scope) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return found


class Gate:
    """The outermost layer.

    Args:
        app: What comes next.
        policy: Hosts and origins that are ours.
        metrics: Where to count.
        body_bytes: Largest body of a route that is not in ``uploads``.
        uploads: Largest body by (method, exact path); the only routes that take more.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        policy: HostPolicy,
        metrics: Metrics,
        body_bytes: int,
        uploads: Mapping[tuple[str, str], int],
    ) -> None:
        self.app, self.policy, self.metrics = app, policy, metrics
        self.body_bytes, self.uploads = body_bytes, dict(uploads)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass on one connection; WebSockets are not served."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        await self._request(scope, receive, send)

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = _headers(scope)
        given = headers.get("x-request-id", [""])[0]
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{uuid4().hex}"
        scope["request_id"] = request_id
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        status, began = 0, time.monotonic()

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = {name for name, _ in message["headers"]}
                extra = [(name, value) for name, value in SECURITY_HEADERS if name not in own]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode()), *extra]
            await send(message)

        self.metrics.in_flight.inc()
        try:
            refusal = self._refusal(scope, headers)
            if refusal is not None:
                await refusal(scope, receive, answer)
            else:
                await self.app(scope, self._bounded(scope, headers, receive), answer)
        except Exception as error:
            response = errors.internal_error(request_id, error)
            if status == 0:
                await response(scope, receive, answer)
            else:
                raise  # half an answer is out; the connection must break so that the client notices
        finally:
            self.metrics.in_flight.dec()
            route = getattr(scope.get("route"), "path", "unmatched")
            seconds = time.monotonic() - began
            self.metrics.requests.labels(scope["method"][:16], route, str(status)).inc()
            self.metrics.request_seconds.labels(route).observe(seconds)
            identity: Identity | None = scope.get("state", {}).get("identity")
            log.info(
                "request",
                method=scope["method"],
                route=route,
                status=status,
                ms=round(seconds * 1000, 1),
                key_id=identity.key_id if identity else None,
            )

    def _limit(self, scope: Scope) -> int:
        return self.uploads.get((scope["method"], scope["path"]), self.body_bytes)

    def _refusal(self, scope: Scope, headers: dict[str, list[str]]) -> JSONResponse | None:
        reason = self.policy.refusal(scope["method"], scope.get("scheme", "http"), headers)
        if reason is not None:
            content = errors.body(403, reason, code="forbidden_origin", param=None)
            return JSONResponse(content, status_code=403, headers={"Connection": "close"})
        declared = headers.get("content-length", ["0"])[0]
        if declared.isdecimal() and int(declared[:20]) > self._limit(scope):
            content = errors.body(413, self._too_large(scope), code="request_too_large", param=None)
            return JSONResponse(content, status_code=413, headers={"Connection": "close"})
        return None

    def _too_large(self, scope: Scope) -> str:
        return f"The body is larger than the {self._limit(scope)} bytes that this route takes."

    def _bounded(self, scope: Scope, headers: dict[str, list[str]], receive: Receive) -> Receive:
        """The body: read for those who have a key only, up to a size, and without long pauses."""
        limit, read, known, whole = self._limit(scope), 0, False, False

        async def counted() -> Message:
            nonlocal read, known, whole
            if not known:
                await to_thread.run_sync(self._identify, scope, headers)
                known = True
            try:
                async with asyncio.timeout(None if whole else BODY_SECONDS):
                    message = await receive()
            except TimeoutError:
                text = f"Nothing of the body came for {BODY_SECONDS:g} seconds. Send the request again."
                raise HTTPException(408, text, headers={"Connection": "close"}) from None
            if message["type"] == "http.request":
                whole = not message.get("more_body", False)
                read += len(message.get("body", b""))
                if read > limit:
                    raise HTTPException(413, self._too_large(scope), headers={"Connection": "close"})
            return message

        return counted

    def _identify(self, scope: Scope, headers: dict[str, list[str]]) -> None:
        """The framework reads a body before it asks the guard, which says whether the key may do what it asks."""
        endpoint = scope.get("endpoint")
        if "identity" in scope.get("state", {}) or (endpoint is not None and scope_of(endpoint) is None):
            return
        kind, _, key = headers.get("authorization", [""])[0].partition(" ")
        with suppress(DatabaseBusy):  # the guard meets it again, and answers
            if kind.lower() == "bearer" and keys.identify(scope["app"].state.db, key.strip()) is not None:
                return
            self.metrics.auth_failures.labels("key").inc()
            raise HTTPException(401, errors.NO_KEY, headers={**errors.BEARER, "Connection": "close"})
