"""The probes, the metrics and the API's own description."""

from __future__ import annotations

import shutil
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from service.api.deps import Counts, Jobs, needs, public
from service.api.docs import errors_of
from service.api.errors import busy
from service.api.shape import BoundedRoute
from service.db.engine import read
from service.jobs.states import STATES

router = APIRouter(tags=["operations"], route_class=BoundedRoute)
PUBLIC = frozenset({"/healthz", "/readyz"})
"""The only paths that answer without a key."""


@router.get("/healthz", response_model=dict[str, str])
@public
async def healthz() -> dict[str, str]:
    """The process lives and its loop turns; `service` says whose server this is."""
    return {"status": "ok", "service": "gradhelm"}


@router.get("/readyz", response_model=dict[str, str], responses={503: {"description": "Not ready."}, **errors_of(507)})
@public
def readyz(request: Request) -> dict[str, str]:
    """Requests are welcome: the database answers, and the server is not stopping."""
    state = request.app.state
    if state.draining.begun.is_set():
        raise busy("The server is stopping.", seconds=5, code="server_stopping")
    with read(state.db) as session:
        session.connection().exec_driver_sql("SELECT 1")
    return {"status": "ready"}


@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
@needs("read")
def metrics(request: Request, counts: Counts, store: Jobs) -> PlainTextResponse:
    """Prometheus metrics."""
    by_status = store.counts()
    for status in STATES:
        counts.jobs.labels(status).set(by_status.get(status, 0))
    counts.disk_free.set(shutil.disk_usage(request.app.state.settings.home).free)
    return PlainTextResponse(generate_latest(counts.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/openapi.json", include_in_schema=False)
@needs("read")
def openapi(request: Request) -> JSONResponse:
    """This API in OpenAPI's form."""
    document: dict[str, Any] = request.app.openapi()
    return JSONResponse(document)
