"""What routes ask for: who is asking, the settings, the database, the store, the engine. And what no route may skip.

``guard`` is a dependency of the app itself, so it stands before every route, whatever its path and whoever adds it. A
route says what it needs with ``@needs("jobs")``; one that says nothing needs ``admin``; the two probes are ``@public``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, cast

from fastapi import Depends, FastAPI, Request
from fastapi.routing import iter_route_contexts
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import Engine as Database

from service.api.errors import BEARER, NO_KEY, APIError
from service.api.parts import SchedulerLike
from service.jobs.store import JobStore
from service.metrics import Metrics
from service.security import keys
from service.security.keys import Identity, Scope
from service.settings import Settings

Handler = TypeVar("Handler", bound=Callable[..., Any])

SEEN_SECONDS = 60.0
"""A key's time of last use is written at most this often."""

_bearer = HTTPBearer(auto_error=False, description="An API key, `gh-...`, made with `gradhelm keys create`.")


def needs(scope: Scope) -> Callable[[Handler], Handler]:
    """Mark a route with the scope that its caller's key must have."""

    def mark(handler: Handler) -> Handler:
        handler.__dict__["scope"] = scope
        return handler

    return mark


def public(handler: Handler) -> Handler:
    """Mark a route that answers without a key."""
    handler.__dict__["scope"] = None
    return handler


def scope_of(endpoint: Callable[..., Any]) -> Scope | None:
    """The scope that an endpoint was marked with; ``admin`` when it was not; none when it is public."""
    return cast("Scope | None", endpoint.__dict__.get("scope", "admin"))


def endpoints(app: FastAPI) -> list[tuple[frozenset[str], str, Callable[..., Any]]]:
    """Every route of the app, those of included routers too, as (methods, path, endpoint)."""
    found: list[tuple[frozenset[str], str, Callable[..., Any]]] = []
    for context in iter_route_contexts(app.routes):
        assert context.endpoint is not None, f"{context.path} is no plain route, so nothing guards it"
        found.append((frozenset(context.methods or ()), context.path or "", context.endpoint))
    return found


def guard(request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> None:
    """Refuse a request without a valid key (401) or whose key lacks the route's scope (403)."""
    scope = scope_of(request.scope["endpoint"])
    if scope is None:
        return
    metrics: Metrics = request.app.state.metrics
    identity = keys.identify(request.app.state.db, credentials.credentials) if credentials else None
    if identity is None:
        metrics.auth_failures.labels("key").inc()
        raise APIError(401, NO_KEY, code="invalid_api_key", headers=BEARER)
    if not identity.may(scope):
        metrics.auth_failures.labels("scope").inc()
        raise APIError(403, f"This key lacks the scope {scope!r}.", code="insufficient_scope")
    request.state.identity = identity
    used: dict[str, float] = request.app.state.keys_used
    now = time.monotonic()
    if now - used.get(identity.key_id, -SEEN_SECONDS) >= SEEN_SECONDS:
        used[identity.key_id] = now
        keys.touch(request.app.state.db, identity.key_id)


def _identity(request: Request) -> Identity:
    return cast(Identity, request.state.identity)


def _settings(request: Request) -> Settings:
    return cast(Settings, request.app.state.settings)


def _database(request: Request) -> Database:
    return cast(Database, request.app.state.db)


def _store(request: Request) -> JobStore:
    return cast(JobStore, request.app.state.store)


def _metrics(request: Request) -> Metrics:
    return cast(Metrics, request.app.state.metrics)


def _scheduler(request: Request) -> SchedulerLike:
    return cast(SchedulerLike, request.app.state.scheduler)


Caller = Annotated[Identity, Depends(_identity)]
Config = Annotated[Settings, Depends(_settings)]
Db = Annotated[Database, Depends(_database)]
Jobs = Annotated[JobStore, Depends(_store)]
Counts = Annotated[Metrics, Depends(_metrics)]
Mover = Annotated[SchedulerLike, Depends(_scheduler)]
