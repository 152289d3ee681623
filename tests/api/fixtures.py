"""An app with the fake engine and a scheduler that never runs anything, spoken to in process."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
import structlog
from fastapi import FastAPI

from service.app import create_app
from service.engines.fake import FakeEngine
from service.settings import LimitSettings, Settings
from tests.contract.base import BASE, make_base

HOST = "127.0.0.1:8000"
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


class IdleScheduler:
    """Starts and stops; jobs stay where they were put."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def start(self) -> None:
        self.calls.append("start")

    def stop(self, *, end_runs: bool = False, seconds: float = 60.0) -> None:
        self.calls.append("stop")

    def wake(self) -> None:
        self.calls.append("wake")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    limits = LimitSettings(upload_bytes=1 << 20, min_free_disk_bytes=0, vector_bytes=1 << 20)
    return Settings(home=tmp_path / "home", limits=limits, grace_seconds=0.2, drain_seconds=0.0)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def app(settings: Settings, engine: FakeEngine) -> AsyncIterator[FastAPI]:
    app = create_app(settings, engine=engine, scheduler=IdleScheduler())
    async with app.router.lifespan_context(app):
        yield app


@pytest.fixture
def key(settings: Settings, app: FastAPI) -> str:
    return (settings.home / "admin.key").read_text().strip()


@pytest.fixture
async def client(app: FastAPI, key: str) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=True)
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(transport=transport, base_url=f"http://{HOST}", headers=headers) as client:
        yield client


@pytest.fixture
def base(settings: Settings, app: FastAPI) -> Iterator[str]:
    """A base model by its catalog name: the files that a name is looked up by, without weights to load."""
    make_base(settings.home)
    yield BASE
