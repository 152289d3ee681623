"""The models and the migrated schema are the same, and a database with data in it can be upgraded."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, event, insert, select, text

from service.db.engine import DatabaseBusy, DatabaseNewer, connect, migrate, read, write
from service.db.tables import Base, Job, JobEvent
from service.jobs.records import Event
from service.jobs.store import JobStore
from tests.unit.service.jobs.world import new_job

MIGRATIONS = Path(connect.__code__.co_filename).parent / "migrations"
REVISIONS = [script.revision for script in ScriptDirectory(str(MIGRATIONS)).walk_revisions()][::-1]
ROW = {
    "id": "ftjob-1", "kind": "fine_tuning", "status": "validating_files", "created_at": 1, "key_id": "k",
    "body_hash": "b", "model": "m", "method": "lora", "request": {"a": 1}, "resolved": {}, "seed": 1,
    "training_file": "f", "result_files": [], "metadata_": {"team": "x"},
}  # fmt: skip


def schema(engine: Engine) -> set[str]:
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")).scalars().all()
    return {" ".join(sorted(sql.replace(",", " ").split())) for sql in rows if "alembic_version" not in sql}


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = connect(tmp_path / "a.db")
    yield engine
    engine.dispose()


def test_models_equal_the_migrated_schema(engine: Engine, tmp_path: Path) -> None:
    migrate(engine)
    created = connect(tmp_path / "b.db")
    Base.metadata.create_all(created)
    assert schema(engine) == schema(created)  # checks too, which alembic's comparison does not see
    created.dispose()
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


@pytest.mark.parametrize("revision", REVISIONS)
def test_a_filled_database_is_upgraded(engine: Engine, revision: str) -> None:
    migrate(engine, revision)
    with write(engine) as session:
        session.execute(insert(Job), [ROW])
        session.execute(
            insert(JobEvent),
            [
                {
                    "job_id": "ftjob-1",
                    "seq": 1,
                    "created_at": 1,
                    "level": "info",
                    "type": "message",
                    "message": "x",
                    "data": {},
                }
            ],
        )
    migrate(engine)
    migrate(engine)
    with read(engine) as session:
        job = session.scalars(select(Job)).one()
        assert (job.request, job.metadata_) == ({"a": 1}, {"team": "x"})
        assert session.scalars(select(JobEvent)).one().message == "x"


def test_it_runs_from_any_folder(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    migrate(engine)
    assert not (tmp_path / "alembic.ini").exists()


def test_pragmas(engine: Engine) -> None:
    with engine.connect() as connection:
        values = [
            connection.execute(text(f"PRAGMA {name}")).scalar_one()
            for name in ("journal_mode", "foreign_keys", "synchronous", "busy_timeout")
        ]
    assert values == ["wal", 1, 1, 2000]


def test_a_write_is_rolled_back_as_a_whole(engine: Engine) -> None:
    migrate(engine)
    with pytest.raises(KeyError), write(engine) as session:
        session.execute(insert(Job), [ROW])
        raise KeyError
    with read(engine) as session:
        assert session.scalars(select(Job)).all() == []


def test_a_lock_of_another_process_is_busy(tmp_path: Path) -> None:
    one, two = (connect(tmp_path / "a.db", busy_timeout_ms=50) for _ in range(2))
    migrate(one)
    with write(one), pytest.raises(DatabaseBusy), write(two):
        pass
    one.dispose()
    two.dispose()


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL of our own, on a unix socket; skipped where it or its driver is not installed."""
    server = shutil.which("postgres") or ""
    initdb = shutil.which("initdb") or str(Path(os.path.realpath(server)).parent / "initdb")
    if not server or not Path(initdb).exists():
        pytest.skip("no PostgreSQL on this machine")
    pytest.importorskip("psycopg", reason="no psycopg here: pip install -c constraints.txt -e '.[postgres]'")
    folder = tmp_path_factory.mktemp("pg")
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    if user:
        for path in (folder, *folder.parents[:2]):
            path.chmod(0o755)
        os.chown(folder, 65534, 65534)
    data, socket = folder / "data", folder
    env = {"PATH": os.environ["PATH"], "LC_ALL": "C"}
    made = subprocess.run(
        [*user, initdb, "-D", data, "-U", "g", "-A", "trust", "-N", "-E", "UTF8"], capture_output=True, env=env
    )
    if made.returncode:
        pytest.skip(f"initdb: {made.stderr.decode()[-300:]}")
    argv = [*user, server, "-D", data, "-k", socket, "-c", "listen_addresses=", "-c", "fsync=off"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, env=env)
    try:
        import time

        for _ in range(200):
            if (socket / ".s.PGSQL.5432").exists():
                break
            time.sleep(0.05)
        yield f"postgresql+psycopg://g@/postgres?host={socket}"
    finally:
        process.send_signal(signal.SIGINT)  # a fast shutdown; SIGTERM waits for clients that a failed test left
        process.wait(20)


@pytest.mark.slow
def test_postgresql_has_the_same_schema_and_claims_once(postgres: str) -> None:
    """Slow: starts a database server. It earns that by being the only proof that the SQL is portable."""
    import threading
    import time

    from service.jobs.records import IdempotencyInFlight
    from service.jobs.store import JobStore
    from tests.unit.service.jobs.world import new_job

    for _ in range(50):
        engine = connect(postgres)
        try:
            migrate(engine)
            break
        except DatabaseBusy:
            time.sleep(0.1)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    store = JobStore(engine)
    ids = {store.create(new_job(metadata={"odd 'k\"": "v"}), idempotency_key=f"k{i}").job.id for i in range(50)}
    assert store.create(new_job(), idempotency_key="k0").replayed
    assert len(store.list(metadata={"odd 'k\"": "v"}, limit=100).data) == 50
    got: list[str] = []

    def work() -> None:
        while (job := store.claim("me", 30, status="validating_files")) is not None:
            got.append(job.id)
            store.transition(job.id, "validating_files", "queued", token=job.lease_token)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == sorted(ids)
    assert store.claimable() == {"queued"}
    assert store.request_cancel(got[0]).status == "cancelled"
    assert len(store.events(got[0]).data) == 3
    running = store.claim("me", 30)
    assert running is not None
    assert store.renew({running.id: running.lease_token or "", got[0]: "stale"}, 30) == {got[0]}
    plain = store.create(new_job(body_hash="c" * 64)).job.id
    assert store.create(new_job(body_hash="c" * 64), retry_count=1).job.id == plain
    for turn in range(20):
        barrier, outcomes = threading.Barrier(4), list[object]()

        def reserve(key: str, barrier: threading.Barrier, outcomes: list[object]) -> None:
            barrier.wait()
            try:
                outcomes.append(store.reserve("key_1", key, "b" * 64))
            except Exception as error:
                outcomes.append(type(error))

        threads = [threading.Thread(target=reserve, args=(f"race-{turn}", barrier, outcomes)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert outcomes.count(IdempotencyInFlight) == 3, outcomes
        assert sum(isinstance(outcome, str) for outcome in outcomes) == 1, outcomes
    engine.dispose()


def test_a_database_of_a_newer_version_is_refused_in_words(engine: Engine) -> None:
    migrate(engine)
    with engine.connect() as connection, connection.begin():
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(DatabaseNewer, match=r"newer version .*schema 9999, known are up to \d+\): start that version"):
        migrate(engine)


def test_a_job_that_was_accepted_is_on_the_disk_and_what_only_watches_is_not_waited_for(engine: Engine) -> None:
    migrate(engine)
    store, said = JobStore(engine), []

    def heard(_connection: object, _cursor: object, statement: str, *_more: object) -> None:
        said.extend([statement] if "synchronous" in statement else [])

    event.listen(engine, "before_cursor_execute", heard)
    job_id = store.create(new_job()).job.id
    store.append_event(job_id, Event("x"))
    assert said == ["PRAGMA synchronous=FULL", "PRAGMA synchronous=NORMAL"]
    with write(engine, durable=True) as session:
        assert session.execute(text("PRAGMA synchronous")).scalar_one() == 2
