"""Requests that meet: an attempt and its own retry, a job and the deletion of its file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from openai import OpenAI

from service.api import fine_tuning
from service.api.files import delete_file
from service.app import create_app
from service.engines.fake import FakeEngine
from service.settings import LimitSettings, Settings
from tests.api.fixtures import BASE, IdleScheduler, make_base
from tests.api.live import Live, serving
from tests.api.test_files import upload


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    settings = Settings(home=tmp_path / "home", limits=LimitSettings(min_free_disk_bytes=0), drain_seconds=0.0)
    make_base(settings.home)
    with serving(create_app(settings, engine=FakeEngine(), scheduler=IdleScheduler()), settings) as live:
        yield live


def test_a_retry_that_overtakes_its_own_first_attempt_makes_no_second_job(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    ended: list[str] = []
    check, submit = fine_tuning.check_data, fine_tuning.submit

    def slow(*arguments: Any) -> None:
        calls.append("check")
        if len(calls) == 1:
            time.sleep(2.0)
        check(*arguments)

    def watched(*arguments: Any, **more: Any) -> Any:
        job = submit(*arguments, **more)
        ended.append(job.id)
        return job

    monkeypatch.setattr(fine_tuning, "check_data", slow)
    monkeypatch.setattr(fine_tuning, "submit", watched)
    with OpenAI(base_url=f"{live.url}/v1", api_key=live.key, timeout=0.8) as client:
        data = client.files.create(file=("rows.jsonl", b'{"messages": []}\n'), purpose="fine-tune").id
        made = client.fine_tuning.jobs.create(model=BASE, training_file=data)
        deadline = time.monotonic() + 20
        while len(ended) < 2:
            assert time.monotonic() < deadline, "the first attempt never ended"
            time.sleep(0.02)
        assert set(ended) == {made.id}
        assert [job.id for job in client.fine_tuning.jobs.list()] == [made.id]


@pytest.mark.parametrize("which", ["training_file", "validation_file"])
async def test_a_file_deleted_between_the_check_and_the_write_makes_no_job(
    app: FastAPI, client: httpx.AsyncClient, base: str, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    kept, lost = [(await upload(client)).json()["id"] for _ in range(2)]
    names = {"training_file": kept, "validation_file": kept, which: lost}
    create = app.state.store.create

    def late(*arguments: Any, **more: Any) -> Any:
        delete_file(lost, app.state.db, app.state.settings)
        return create(*arguments, **more)

    monkeypatch.setattr(app.state.store, "create", late)
    answer = await client.post("/v1/fine_tuning/jobs", json={"model": base, **names})
    assert answer.status_code == 404, answer.text
    assert answer.json()["error"]["code"] == "file_not_found" and answer.json()["error"]["param"] == which
    assert (await client.get("/v1/fine_tuning/jobs")).json()["data"] == []


async def test_a_fit_whose_file_is_deleted_meanwhile_is_not_made(
    app: FastAPI, client: httpx.AsyncClient, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = (await upload(client, purpose="steering")).json()["id"]
    create = app.state.store.create

    def late(*arguments: Any, **more: Any) -> Any:
        delete_file(lost, app.state.db, app.state.settings)
        return create(*arguments, **more)

    monkeypatch.setattr(app.state.store, "create", late)
    answer = await client.post("/v1/steering/vectors", json={"model": base, "training_file": lost, "name": "x"})
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "file_not_found", answer.text


async def test_what_is_asked_for_wakes_the_scheduler(app: FastAPI, client: httpx.AsyncClient, base: str) -> None:
    calls: list[str] = app.state.scheduler.calls
    data = (await upload(client)).json()["id"]
    calls.clear()
    made = await client.post("/v1/fine_tuning/jobs", json={"model": base, "training_file": data})
    assert made.status_code == 200 and calls == ["wake"], "a new job waits for no poll"
    route = f"/v1/fine_tuning/jobs/{made.json()['id']}"
    assert (await client.post(f"{route}/cancel")).status_code == 200 and calls == ["wake", "wake"]
    pairs = (await upload(client, purpose="steering")).json()["id"]
    calls.clear()
    fit = await client.post("/v1/steering/vectors", json={"model": base, "training_file": pairs})
    assert fit.status_code == 200 and calls == ["wake"]
