"""At the start, what a kill left half-done goes, and nothing else."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from fastapi import FastAPI

from service.app import create_app
from service.db.engine import write
from service.db.tables import File
from service.engines.fake import FakeEngine
from service.jobs.store import JobStore
from service.settings import Settings
from service.sweep import sweep
from tests.api.fixtures import IdleScheduler
from tests.api.test_follow import make_job
from tests.api.test_vectors import put_vector
from tests.unit.service.jobs.world import new_job


async def restart(settings: Settings, monkeypatch: pytest.MonkeyPatch, *, days: float = 2.0) -> None:
    """A start as many days from now: nobody can set when a file was last touched back."""
    later = time.time() + days * 86400
    with monkeypatch.context() as patched:
        patched.setattr("service.app.sweep", lambda home, db: sweep(home, db, now=later))
        await start(settings)


async def start(settings: Settings) -> None:
    again = create_app(settings, engine=FakeEngine(), scheduler=IdleScheduler())
    async with again.router.lifespan_context(again):
        pass


async def test_a_start_deletes_halves_at_once_and_leaves_what_is_whole_and_new(
    app: FastAPI, settings: Settings
) -> None:
    add_file(app, settings)
    half = put(settings.home / "files" / f".file-{'b' * 24}.part")
    whole = put(settings.home / "files" / ("file-" + "a" * 24))
    await start(settings)
    assert not half.exists() and whole.exists()


def put(path: Path) -> Path:
    path.write_bytes(b"{}")
    return path


def add_file(app: FastAPI, settings: Settings) -> Path:
    name = "file-" + "k" * 24
    row = File(id=name, filename="a", purpose="fine-tune", bytes=2, sha256="0", created_at=1, key_id="k")
    with write(app.state.db) as session:
        session.add(row)
    return put(settings.home / "files" / name)


async def test_what_no_row_names_is_put_aside_and_halves_go(
    app: FastAPI, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, vectors, trash = (settings.home / name for name in ("files", "vectors", "trash"))
    kept = [add_file(app, settings), put(vectors / f"{put_vector(app, 'vec_' + 'k' * 24, 1)}.safetensors")]
    strays = [put(files / ("file-" + "a" * 24)), put(vectors / f"vec_{'a' * 24}.safetensors")]
    halves = [put(files / f".file-{'b' * 24}.part"), put(vectors / f".vec_{'b' * 24}.part")]
    halves.append(put(vectors / f".vec_{'b' * 24}.safetensors.part"))
    await restart(settings, monkeypatch)
    assert [path for path in [*strays, *halves] if path.exists()] == []
    assert all(path.exists() for path in kept)
    aside = sorted(path for path in trash.rglob("*") if path.is_file())
    assert aside == [trash / path.relative_to(settings.home) for path in strays], "halves are in nobody's way there"
    assert all(path.read_bytes() == b"{}" for path in aside)
    await restart(settings, monkeypatch, days=10_000)
    assert all(path.exists() for path in aside), "nothing ever empties the trash"


async def test_a_file_that_was_touched_within_a_day_stays_whatever_the_database_knows(
    app: FastAPI, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_file(app, settings)
    stray = put(settings.home / "files" / ("file-" + "a" * 24))
    os.utime(stray, (0, 0))  # restored with its old time of change: what counts is when it came to lie there
    await restart(settings, monkeypatch, days=0.98)
    assert stray.exists()
    await restart(settings, monkeypatch, days=1.02)
    assert not stray.exists()


async def test_what_an_older_database_does_not_know_comes_back_as_it_was(
    app: FastAPI, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_file(app, settings)
    newer = put(settings.home / "files" / ("file-" + "n" * 24))
    await restart(settings, monkeypatch)
    aside = settings.home / "trash" / "files" / newer.name
    aside.rename(newer)
    row = File(id=newer.name, filename="b", purpose="fine-tune", bytes=2, sha256="0", created_at=1, key_id="k")
    with write(app.state.db) as session:
        session.add(row)
    await restart(settings, monkeypatch)
    assert newer.read_bytes() == b"{}" and not aside.exists()


@pytest.mark.parametrize("why", ["a file is there", "the trash is a link", "the trash is a file"])
async def test_what_cannot_be_put_aside_stays_and_the_server_starts(
    app: FastAPI, settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, why: str
) -> None:
    add_file(app, settings)
    stray = put(settings.home / "files" / ("file-" + "a" * 24))
    trash = settings.home / "trash"
    if why == "a file is there":
        (trash / "files").mkdir(parents=True)
        (trash / "files" / stray.name).write_bytes(b"earlier")
    elif why == "the trash is a link":
        (tmp_path / "elsewhere").mkdir()
        trash.symlink_to(tmp_path / "elsewhere")
    else:
        trash.write_bytes(b"")
    await restart(settings, monkeypatch)
    assert stray.exists()
    assert not (tmp_path / "elsewhere" / "files").exists()
    assert why != "a file is there" or (trash / "files" / stray.name).read_bytes() == b"earlier"


async def test_what_is_not_ours_stays(
    app: FastAPI, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, vectors = settings.home / "files", settings.home / "vectors"
    add_file(app, settings)
    job = make_job(app.state.store)
    folder = settings.home / "jobs" / job
    (folder / "artifact").mkdir(parents=True)
    outside = put(tmp_path / "outside")
    link = files / ("file-" + "l" * 24)
    link.symlink_to(outside)
    deep = files / ("file-" + "d" * 24)
    deep.mkdir()
    live = job.removeprefix("ftjob-")
    kept = [
        put(folder / "run.yaml"),
        put(files / "notes.txt"),
        put(files / "file-short"),
        put(files / f"file-{'x' * 24}.bak"),
        put(vectors / f"vec_{'x' * 24}"),
        put(vectors / "mine.safetensors"),
        put(deep / "inner"),
        # halves, but not of our making
        put(files / ".notes.part"),
        put(files / f".vec_{'x' * 24}.part"),
        put(files / f".file-{'x' * 24}.bak.part"),
        put(vectors / ".mine.safetensors.part"),
        put(vectors / f".file-{'x' * 24}.part"),
        # what the scheduler copies there just now, for a job that is not over
        put(files / f"file-{live}"),
        put(files / f".file-{live}.part"),
        outside,
        link,
    ]
    await restart(settings, monkeypatch)
    assert [path for path in kept if not path.exists()] == []


async def test_a_folder_that_is_a_link_is_left_alone(
    app: FastAPI, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_file(app, settings)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (settings.home / "vectors").rmdir()
    (settings.home / "vectors").symlink_to(elsewhere)
    stray = put(elsewhere / f"vec_{'a' * 24}.safetensors")
    await restart(settings, monkeypatch)
    assert stray.exists()


@pytest.mark.parametrize("rows_of", ["nothing", "another folder"])
async def test_a_database_of_another_folder_removes_nothing(
    app: FastAPI, settings: Settings, rows_of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stray = put(settings.home / "files" / ("file-" + "a" * 24))
    if rows_of == "another folder":
        add_file(app, settings).unlink()
        make_job(app.state.store)
    await restart(settings, monkeypatch)
    assert stray.exists()


async def test_a_start_frees_the_keys_of_requests_that_a_kill_ended(app: FastAPI, settings: Settings) -> None:
    store: JobStore = app.state.store
    store.reserve("key_1", "died", "b" * 64)
    done = store.create(new_job(), idempotency_key="done").job
    await start(settings)
    assert isinstance(store.reserve("key_1", "died", "c" * 64), str), "no 409, and another body is no 422"
    again = store.reserve("key_1", "done", "b" * 64)
    assert not isinstance(again, str) and again.id == done.id
