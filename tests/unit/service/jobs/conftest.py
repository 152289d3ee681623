"""A migrated database for every test, and the world on it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from service.db.engine import connect, migrate
from service.jobs.store import JobStore
from tests.unit.service.jobs.world import Clock, World


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty database, made once; tests copy it."""
    path = tmp_path_factory.mktemp("db") / "empty.db"
    engine = connect(path)
    migrate(engine)
    engine.dispose()
    return path


@pytest.fixture
def engine(migrated: Path, tmp_path: Path) -> Iterator[Engine]:
    shutil.copy(migrated, tmp_path / "gradhelm.db")
    engine = connect(tmp_path / "gradhelm.db", busy_timeout_ms=200)
    yield engine
    engine.dispose()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(engine: Engine, clock: Clock) -> JobStore:
    return JobStore(engine, clock)


@pytest.fixture
def world(store: JobStore, clock: Clock, tmp_path: Path) -> World:
    return World(store, clock, tmp_path / "home")
