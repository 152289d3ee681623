"""What goes away while it is asked for: files, the beginning of a log, fits that made nothing, disks."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy.exc import OperationalError

from service.api import logs as route
from service.api.docs import describe
from service.api.health import PUBLIC
from service.db.engine import DatabaseBusy, DatabaseFull, _translated
from service.jobs import logs
from service.jobs.logs import LogWriter
from service.settings import Settings
from tests.api.test_files import upload
from tests.api.test_follow import make_job
from tests.api.test_vector_file import vector_bytes


@pytest.mark.parametrize("headers", [{}, {"Range": "bytes=0-0"}])
@pytest.mark.parametrize("when", ["before", "after the look"])
@pytest.mark.parametrize("what", ["files", "steering/vectors"])
async def test_a_file_that_goes_before_it_is_sent_is_a_404(
    client: httpx.AsyncClient, settings: Settings, monkeypatch: pytest.MonkeyPatch, what: str, when: str, headers: Any
) -> None:
    if what == "files":
        name, code = (await upload(client)).json()["id"], "file_not_found"
        path = settings.home / "files" / name
    else:
        data = vector_bytes("sha256:1")
        name = (await client.post("/v1/steering/vectors/import", files={"file": ("v", data)})).json()["id"]
        path, code = settings.home / "vectors" / f"{name}.safetensors", "vector_not_found"
    stat: Callable[..., os.stat_result] = os.stat

    def last_look(where: Any, *more: Any, **named: Any) -> os.stat_result:
        found = stat(where, *more, **named)
        if Path(str(where)) == path:
            path.unlink()
        return found

    if when == "before":
        path.unlink()
    else:
        monkeypatch.setattr("service.api.ranges.os.stat", last_look)
    answer = await client.get(f"/v1/{what}/{name}/content", headers=headers)
    monkeypatch.undo()
    assert answer.status_code == 404 and answer.json()["error"]["code"] == code, answer.text


@pytest.fixture
def rotating(app: FastAPI, settings: Settings) -> tuple[str, Path, Callable[[int], None]]:
    """A job with a log, and what writes more lines to it."""
    job = make_job(app.state.store)
    folder = settings.home / "jobs" / job
    folder.mkdir(parents=True)
    writer, count = LogWriter(folder, quota=32768), 0

    def more(lines: int) -> None:
        nonlocal count
        for count in range(count, count + lines):  # noqa: B020
            writer.write(b"line %06d\n" % count)
        count += 1

    more(1000)
    return job, folder, more


async def test_a_range_whose_beginning_rotates_away_meanwhile_is_what_is_left_of_it(
    client: httpx.AsyncClient, rotating: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _, more = rotating
    span, looks = logs.span, []

    def grown(folder: Path) -> tuple[int, int]:
        found = span(folder)
        looks.append(found)
        if len(looks) == 1:
            more(8000)
        return found

    monkeypatch.setattr(route.logs, "span", grown)
    part = await client.get(f"/v1/fine_tuning/jobs/{job}/logs", headers={"Range": "bytes=0-"})
    first, last = part.headers["Content-Range"].removeprefix("bytes ").partition("/")[0].split("-")
    assert part.status_code == 206 and int(first) > 0
    assert len(part.content) == int(last) + 1 - int(first) > 0, "the head promises what comes"
    assert part.content.endswith(b"line 008999\n")


async def test_a_range_that_is_gone_is_refused(client: httpx.AsyncClient, rotating: Any, monkeypatch: Any) -> None:
    job, _, more = rotating
    span, looks = logs.span, []

    def grown(folder: Path) -> tuple[int, int]:
        looks.append(found := span(folder))
        if len(looks) == 1:
            more(8000)
        return found

    monkeypatch.setattr(route.logs, "span", grown)
    part = await client.get(f"/v1/fine_tuning/jobs/{job}/logs", headers={"Range": "bytes=0-99"})
    assert part.status_code == 416 and part.json()["error"]["code"] == "range_not_satisfiable"


def test_a_log_that_rotates_away_under_its_reader_ends_there(rotating: Any) -> None:
    _, folder, more = rotating
    begun = logs.read(folder, 0, 120)
    pieces = route._pieces(folder, 0, 6000, begun.data)
    assert next(pieces) == begun.data
    more(8000)
    assert list(pieces) == [], "nothing from elsewhere in place of what is gone"


@pytest.mark.parametrize("status", ["failed", "cancelled"])
async def test_a_fit_that_made_nothing_says_how_it_ended(app: FastAPI, client: httpx.AsyncClient, status: str) -> None:
    job = make_job(app.state.store, kind="steering_fit")
    vector = f"/v1/steering/vectors/vec_{job.removeprefix('steerjob-')}"
    waiting = (await client.delete(vector)).json()["error"]["message"]
    assert f"cancel its job {job}" in waiting
    if status == "cancelled":
        app.state.store.request_cancel(job)
    else:
        app.state.store.transition(job, "validating_files", "failed", values={"error_code": "bad_data"})
    deleted, content = await client.delete(vector), await client.get(f"{vector}/content")
    assert (deleted.status_code, content.status_code) == (400, 404)
    for answer in (deleted, content):
        message = answer.json()["error"]["message"]
        assert f"{job} {'failed' if status == 'failed' else 'was cancelled'}" in message and "cancel its" not in message


def test_a_disk_that_fails_is_a_503_and_one_that_is_full_a_507() -> None:
    for said, kind in (("disk I/O error", DatabaseBusy), ("database or disk is full", DatabaseFull)):
        with pytest.raises(DatabaseBusy) as caught, _translated():
            raise OperationalError("INSERT", {}, sqlite3.OperationalError(said))
        assert type(caught.value) is kind


def test_every_route_that_asks_the_database_declares_that_the_disk_may_be_full(app: FastAPI) -> None:
    paths = describe(app, PUBLIC)["paths"]
    without = [
        (path, verb)
        for path, item in paths.items()
        for verb, operation in item.items()
        if path != "/healthz" and "507" not in operation["responses"]
    ]
    assert without == []
