"""Connections, transactions and migrations, on SQLite (WAL) and PostgreSQL alike.

``read`` and ``write`` are the only ways to a session. A write transaction on SQLite starts with ``BEGIN IMMEDIATE``: it
waits for the lock at its beginning, where nothing is lost yet, instead of failing in the middle.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

BUSY_TIMEOUT_MS = 2000
"""How long SQLite waits for another writer, milliseconds; after that the API answers 503."""

_TURNS: WeakKeyDictionary[Engine, tuple[threading.Lock, float]] = WeakKeyDictionary()

_BUSY = ("database is locked", "database table is locked", "database is busy")
_FULL = ("database or disk is full", "no space left")
_DISK = "disk i/o error"  # a full disk says so; this is a disk that fails, or a file system that went away


class DatabaseBusy(RuntimeError):
    """The database is locked, full or away for now. Nothing was written; try again in a moment (HTTP 503)."""


class DatabaseFull(DatabaseBusy):
    """The disk under the database is full. Nothing was written; free some space and try again (HTTP 507)."""


class DatabaseNewer(RuntimeError):
    """A newer version of this program has changed the schema; this one cannot know how to read it."""


def connect(url: str | Path, *, busy_timeout_ms: int = BUSY_TIMEOUT_MS) -> Engine:
    """Open a database.

    Args:
        url: a SQLAlchemy URL, or the path of a SQLite file.
        busy_timeout_ms: how long a SQLite writer waits for another one, milliseconds.

    Returns:
        An engine; SQLite connections get WAL, foreign keys, ``synchronous=NORMAL`` (but see ``write``) and the busy
        timeout.
    """
    if isinstance(url, Path):
        url = f"sqlite:///{url}"
    if not url.startswith("sqlite"):
        return create_engine(url, pool_pre_ping=True, pool_timeout=busy_timeout_ms / 1000)
    engine = create_engine(
        url,
        pool_size=16,
        max_overflow=32,
        pool_timeout=busy_timeout_ms / 1000,
        connect_args={"check_same_thread": False},
    )

    _TURNS[engine] = threading.Lock(), busy_timeout_ms / 1000

    @event.listens_for(engine, "connect")
    def _on_connect(connection: sqlite3.Connection, _record: Any) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves, below
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout={busy_timeout_ms}")
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("gradhelm_write", False)
        if writes:
            durable = connection.get_execution_options().get("gradhelm_durable", False)
            connection.exec_driver_sql(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


@contextmanager
def read(engine: Engine) -> Iterator[Session]:
    """A session that only reads; its objects stay usable afterwards.

    Args:
        engine: from ``connect``.

    Yields:
        A session on one snapshot.

    Raises:
        DatabaseBusy: the database cannot answer now.
    """
    with _translated(), engine.connect() as connection, Session(connection, expire_on_commit=False) as session:
        yield session
        session.expunge_all()  # a rollback would expire them


@contextmanager
def write(engine: Engine, *, durable: bool = False) -> Iterator[Session]:
    """One write transaction, committed at the end, rolled back on any exception. Keep it short.

    Args:
        engine: from ``connect``.
        durable: it has reached the disk when this ends, with all before it: for what a client is told is done. Without
            it, SQLite may lose the last moments in a power cut (never in a kill), whole transactions of them.

    Yields:
        A session; its objects stay usable after the commit.

    Raises:
        DatabaseBusy: locked for longer than the busy timeout, full, or away; nothing was written.
    """
    with (
        _turn(engine),
        _translated(),
        engine.connect().execution_options(gradhelm_write=True, gradhelm_durable=durable) as connection,
        connection.begin(),
        Session(connection, expire_on_commit=False) as session,
    ):
        yield session
        session.commit()  # flushes; the connection's own transaction commits after it


@contextmanager
def _turn(engine: Engine) -> Iterator[None]:
    """Let this process's writers to SQLite in one by one.

    SQLite's own wait polls with growing pauses: under load a writer would lose its place to others again and again.
    """
    turn = _TURNS.get(engine)
    if turn is None:
        yield
        return
    lock, seconds = turn
    if not lock.acquire(timeout=seconds):
        raise DatabaseBusy("the database is busy; try again in a moment")
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _translated() -> Iterator[None]:
    """Turn "try again later" errors of the drivers into ``DatabaseBusy``."""
    try:
        yield
    except PoolTimeout as error:
        raise DatabaseBusy("all database connections are in use; try again in a moment") from error
    except DBAPIError as error:
        text = str(error.orig).lower()
        if any(word in text for word in _FULL):
            raise DatabaseFull("the disk under the database is full; free some space and try again") from error
        if _DISK in text:
            raise DatabaseBusy("the disk under the database reports an error; see the system's log") from error
        if any(word in text for word in _BUSY) or error.connection_invalidated:
            raise DatabaseBusy("the database is busy; try again in a moment") from error
        if isinstance(error, OperationalError) and not isinstance(error.orig, sqlite3.Error):
            raise DatabaseBusy("the database cannot be reached; try again in a moment") from error
        raise


def migrate(engine: Engine, revision: str = "head") -> None:
    """Bring the schema to ``revision``, in one transaction; needs no ini file and does not log.

    Args:
        engine: from ``connect``.
        revision: alembic revision to upgrade to.

    Raises:
        DatabaseBusy: as ``write``.
        DatabaseNewer: it has a revision that this version does not know.
    """
    from alembic import command
    from alembic.config import Config
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    with _translated(), engine.connect().execution_options(gradhelm_write=True) as connection, connection.begin():
        known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
        found = MigrationContext.configure(connection).get_current_revision()
        if found is not None and found not in known:
            raise DatabaseNewer(
                f"the database was written by a newer version of gradhelm (schema {found}, known are up to {max(known)}"
                "): start that version, or name another data folder in GRADHELM_HOME"
            )
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
