"""At the start, what a kill left half-done goes, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi import FastAPI

from service.app import create_app
from service.db.engine import write
from service.db.tables import File
from service.engines.fake import FakeEngine
from service.settings import Settings
from tests.api.fixtures import IdleScheduler
from tests.api.test_follow import make_job
from tests.api.test_vectors import put_vector


async def restart(settings: Settings) -> None:
    again = create_app(settings, engine=FakeEngine(), scheduler=IdleScheduler())
    async with again.router.lifespan_context(again):
        pass


def put(path: Path) -> Path:
    path.write_bytes(b"{}")
    return path


def add_file(app: FastAPI, settings: Settings) -> Path:
    name = "file-" + "k" * 24
    row = File(id=name, filename="a", purpose="fine-tune", bytes=2, sha256="0", created_at=1, key_id="k")
    with write(app.state.db) as session:
        session.add(row)
    return put(settings.home / "files" / name)


async def test_what_no_row_names_is_removed(app: FastAPI, settings: Settings) -> None:
    files, vectors = settings.home / "files", settings.home / "vectors"
    kept = [add_file(app, settings), put(vectors / f"{put_vector(app, 'vec_' + 'k' * 24, 1)}.safetensors")]
    strays = [
        put(files / ("file-" + "a" * 24)),
        put(files / f".file-{'b' * 24}.part"),
        put(vectors / f"vec_{'a' * 24}.safetensors"),
        put(vectors / f".vec_{'b' * 24}.part"),
    ]
    await restart(settings)
    assert [path for path in strays if path.exists()] == []
    assert all(path.exists() for path in kept)


async def test_what_is_not_ours_stays(app: FastAPI, settings: Settings, tmp_path: Path) -> None:
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
        # what the scheduler copies there just now, for a job that is not over
        put(files / f"file-{live}"),
        put(files / f".file-{live}.part"),
        outside,
        link,
    ]
    await restart(settings)
    assert [path for path in kept if not path.exists()] == []


async def test_a_folder_that_is_a_link_is_left_alone(app: FastAPI, settings: Settings, tmp_path: Path) -> None:
    add_file(app, settings)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (settings.home / "vectors").rmdir()
    (settings.home / "vectors").symlink_to(elsewhere)
    stray = put(elsewhere / f"vec_{'a' * 24}.safetensors")
    await restart(settings)
    assert stray.exists()


@pytest.mark.parametrize("rows_of", ["nothing", "another folder"])
async def test_a_database_of_another_folder_removes_nothing(app: FastAPI, settings: Settings, rows_of: str) -> None:
    stray = put(settings.home / "files" / ("file-" + "a" * 24))
    if rows_of == "another folder":
        add_file(app, settings).unlink()
        make_job(app.state.store)
    await restart(settings)
    assert stray.exists()
