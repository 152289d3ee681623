"""The application: what is built once, what starts and stops with it, and the routers. Nothing else lives here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from anyio import to_thread
from fastapi import Depends, FastAPI

from service.api import (
    chat,
    docs,
    errors,
    files,
    fine_tuning,
    follow,
    health,
    keys,
    logs,
    model_names,
    models,
    vectors,
)
from service.api.deps import guard
from service.api.drain import Draining
from service.api.middleware import Gate
from service.api.parts import SchedulerLike, engine_pool
from service.api.parts import scheduler as scheduler_of
from service.db.engine import connect, migrate
from service.engines.base import Engine
from service.jobs.store import JobStore
from service.log import logger
from service.metrics import Metrics
from service.security.hosts import HostPolicy
from service.security.keys import ensure_admin
from service.settings import Settings
from service.sweep import sweep

log = logger(__name__)
FOLDERS = ("files", "jobs", "vectors", "models", "logs")


def create_app(settings: Settings, *, engine: Engine | None = None, scheduler: SchedulerLike | None = None) -> FastAPI:
    """The service as an ASGI app.

    Args:
        settings: The configuration.
        engine: What generates text; none builds the pool of engine processes.
        scheduler: What runs jobs; none builds the one of this data folder.

    Returns:
        The app; it opens nothing but its database engine until its lifespan starts.
    """
    app = FastAPI(
        title="Gradhelm",
        version=_version(),
        description="Fine-tune language models, steer them while they generate. Works with the `openai` SDK.",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        dependencies=[Depends(guard)],
        lifespan=_lifespan,
        redirect_slashes=False,
    )
    state = app.state
    state.settings = settings
    state.metrics = Metrics()
    state.draining = Draining(settings.grace_seconds)
    state.open_streams = 0
    state.keys_used = {}
    state.db = connect(settings.database)
    state.store = JobStore(state.db)
    state.engine = engine or engine_pool(settings)
    state.scheduler = scheduler or scheduler_of(settings, state.store)
    for module in (health, files, fine_tuning, follow, logs, models, chat, vectors, keys):
        app.include_router(module.router)
    errors.install(app)
    model_names.install(app)
    limits = settings.limits
    form = 1 << 16  # what a form adds around its file
    app.add_middleware(
        Gate,
        policy=HostPolicy(settings.host, settings.allowed_hosts, settings.allowed_origins),
        metrics=state.metrics,
        body_bytes=limits.body_bytes,
        uploads={
            ("POST", "/v1/files"): limits.upload_bytes + form,
            ("POST", "/v1/steering/vectors/import"): limits.vector_bytes + form,
        },
    )

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = docs.describe(app, health.PUBLIC)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _version() -> str:
    try:
        return version("gradhelm")
    except PackageNotFoundError:
        return "0+checkout"  # imported from a checkout that is not installed


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
    """Folders, schema and admin key, then the scheduler; at the end everything in reverse, runs left running."""
    state = app.state
    settings: Settings = state.settings
    await to_thread.run_sync(_prepare, settings, state.db)
    await to_thread.run_sync(state.scheduler.start)
    await to_thread.run_sync(sweep, settings.home, state.db)  # the folder is locked now: what is half there is nobody's
    path = settings.home / "admin.key"
    log.info("started", home=str(settings.home), admin_key=str(path) if path.is_file() else None)
    try:
        yield
    finally:
        state.draining.finish()
        await to_thread.run_sync(_stop_scheduler, state.scheduler, settings)
        try:
            await asyncio.wait_for(state.engine.close(), 5)
        except TimeoutError:
            log.warning("engine_close_timed_out")
        state.db.dispose()
        log.info("stopped")


def _stop_scheduler(scheduler: SchedulerLike, settings: Settings) -> None:
    scheduler.stop(end_runs=settings.jobs.end_with_server, seconds=settings.jobs.stop_seconds)


def _prepare(settings: Settings, db: Any) -> None:
    settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    if settings.home.stat().st_mode & 0o077:  # made by somebody else, or before the server's first start
        try:
            settings.home.chmod(0o700)
        except OSError as error:
            log.warning("data_folder_open_to_others", home=str(settings.home), detail=str(error)[:200])
    for name in FOLDERS:
        (settings.home / name).mkdir(exist_ok=True)
    migrate(db)
    path = settings.home / "admin.key"
    if ensure_admin(db, path):
        log.info("admin_key_written", path=str(path))
