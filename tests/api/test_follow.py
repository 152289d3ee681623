"""Events and logs: pages, streams, and taking a stream up again without losing or repeating anything."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import psutil
import pytest
from fastapi import FastAPI

from service.api.logs import PIECE
from service.app import create_app
from service.engines.fake import FakeEngine
from service.jobs.logs import LogWriter
from service.jobs.records import Event, NewJob
from service.jobs.store import JobStore
from service.settings import LimitSettings, Settings
from tests.api.fixtures import IdleScheduler
from tests.api.live import Live, serving


def make_job(
    store: JobStore,
    *,
    kind: Literal["fine_tuning", "steering_fit"] = "fine_tuning",
    training_file: str = "file-x",
    validation_file: str | None = None,
) -> str:
    """A job that nothing moves but the test."""
    new = NewJob(
        kind=kind,
        model="tiny-llama",
        method="lora",
        request={},
        resolved={"n_epochs": "auto"},
        seed=1,
        training_file=training_file,
        validation_file=validation_file,
        key_id="key",
        body_hash="0",
    )
    return store.create(new).job.id


def sse(text: str) -> list[tuple[str, str | None, dict[str, Any]]]:
    """Events as (name, id, data)."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "data" in fields:
            found.append((fields.get("event", "message"), fields.get("id"), json.loads(fields["data"])))
    return found


async def test_a_stream_of_events_goes_from_the_first_to_the_end_of_the_job(
    app: FastAPI, client: httpx.AsyncClient
) -> None:
    store: JobStore = app.state.store
    job = make_job(store)
    route = f"/v1/fine_tuning/jobs/{job}/events?stream=true"
    reading = asyncio.create_task(client.get(route))
    for n in range(30):
        await asyncio.to_thread(store.append_event, job, Event(f"step {n}", type="metrics", data={"step": n}))
        await asyncio.sleep(0)
    await asyncio.to_thread(store.request_cancel, job)
    answer = await reading
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = sse(answer.text)
    assert [int(one[1].rpartition("-")[2]) for one in events[:-1] if one[1]] == list(range(1, 34))
    assert events[-1] == ("done", None, {"object": "stream.end", "reason": "settled", "status": "cancelled"})
    assert events[5][2]["object"] == "fine_tuning.job.event" and events[5][2]["data"] == {"step": 3}


async def test_a_stream_is_taken_up_behind_the_last_event(app: FastAPI, client: httpx.AsyncClient) -> None:
    store: JobStore = app.state.store
    job = make_job(store)
    for n in range(5):
        store.append_event(job, Event(f"step {n}"))
    store.request_cancel(job)
    route = f"/v1/fine_tuning/jobs/{job}/events?stream=true"
    everything = [one[1] for one in sse((await client.get(route)).text)[:-1]]
    for at, last in enumerate(everything):
        rest = sse((await client.get(route, headers={"Last-Event-ID": str(last)})).text)
        assert [one[1] for one in rest[:-1]] == everything[at + 1 :]
        same = sse((await client.get(f"{route}&after={last}")).text)
        assert same == rest


@pytest.mark.parametrize("last", ["x", "ftevent-other-1", "ftevent-", "-1", "9" * 100])
async def test_an_event_id_that_is_none_of_this_job(app: FastAPI, client: httpx.AsyncClient, last: str) -> None:
    job = make_job(app.state.store)
    for query in (f"?after={last}", f"?stream=true&after={last}"):
        answer = await client.get(f"/v1/fine_tuning/jobs/{job}/events{query}")
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "after"
    answer = await client.get(f"/v1/fine_tuning/jobs/{job}/events?stream=true", headers={"Last-Event-ID": last})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "Last-Event-ID"


async def test_an_unknown_job_has_neither(client: httpx.AsyncClient) -> None:
    for path in ("events", "events?stream=true", "logs", "logs?stream=true", "checkpoints"):
        answer = await client.get(f"/v1/fine_tuning/jobs/ftjob-none/{path}")
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "job_not_found"


async def test_too_many_streams_are_refused(app: FastAPI, client: httpx.AsyncClient) -> None:
    job = make_job(app.state.store)
    app.state.open_streams = app.state.settings.limits.stream_clients
    answer = await client.get(f"/v1/fine_tuning/jobs/{job}/events?stream=true")
    assert answer.status_code == 429 and answer.headers["Retry-After"]
    app.state.open_streams = 0
    app.state.store.request_cancel(job)
    assert (await client.get(f"/v1/fine_tuning/jobs/{job}/events?stream=true")).status_code == 200
    assert app.state.open_streams == 0


async def test_a_stopping_server_ends_streams_with_an_event(app: FastAPI, client: httpx.AsyncClient) -> None:
    job = make_job(app.state.store)
    reading = [
        asyncio.create_task(client.get(f"/v1/fine_tuning/jobs/{job}/{path}?stream=true")) for path in ("events", "logs")
    ]
    await asyncio.sleep(0.3)
    app.state.draining.begin()
    for one in reading:
        events = sse((await one).text)
        assert events[-1] == ("shutdown", None, {"object": "stream.end", "reason": "server_stopping"})


@pytest.fixture
def log(app: FastAPI, settings: Settings) -> tuple[str, bytes, Path]:
    job = make_job(app.state.store)
    folder = settings.home / "jobs" / job
    folder.mkdir(parents=True)
    text = b"".join(b"line %04d: r\xc3\xa9sum\xc3\xa9\n" % n for n in range(2000))
    writer = LogWriter(folder)
    writer.write(text)
    writer.close()
    return job, text, folder


async def test_a_log_is_text_whole_or_by_range(client: httpx.AsyncClient, log: tuple[str, bytes, Path]) -> None:
    job, text, _ = log
    route = f"/v1/fine_tuning/jobs/{job}/logs"
    whole = await client.get(route)
    assert whole.content == text and whole.headers["content-type"] == "text/plain; charset=utf-8"
    for asked, first, stop in (
        ("bytes=0-0", 0, 1),
        ("bytes=10-99", 10, 100),
        ("bytes=100-", 100, len(text)),
        ("bytes=-50", len(text) - 50, len(text)),
        (f"bytes=5-{10**9}", 5, len(text)),
    ):
        part = await client.get(route, headers={"Range": asked})
        assert part.status_code == 206 and part.content == text[first:stop], asked
        assert part.headers["Content-Range"] == f"bytes {first}-{stop - 1}/{len(text)}"
    for asked in ("bytes=0-1,5-6", "lines=0-1", "bytes=a-b", "bytes=-", "x", "bytes=0-0" + ",0-0" * 10):
        ignored = await client.get(route, headers={"Range": asked})
        assert (ignored.status_code, ignored.content) == (200, text), asked
    for asked in (f"bytes={len(text)}-", "bytes=9-3", "bytes=-0"):
        none = await client.get(route, headers={"Range": asked})
        assert none.status_code == 416 and none.headers["Content-Range"] == f"bytes */{len(text)}"


async def test_the_last_line_of_a_log_is_sent_even_if_nothing_ended_it(
    app: FastAPI, client: httpx.AsyncClient, settings: Settings
) -> None:
    job = make_job(app.state.store)
    folder = settings.home / "jobs" / job
    folder.mkdir(parents=True)
    writer = LogWriter(folder)
    writer.write(b"whole\nKilled")
    writer.close()
    app.state.store.request_cancel(job)
    answer = await asyncio.wait_for(client.get(f"/v1/fine_tuning/jobs/{job}/logs?stream=true"), 20)
    assert "whole" in answer.text and "Killed" in answer.text


async def test_what_rotation_took_is_skipped(app: FastAPI, client: httpx.AsyncClient, settings: Settings) -> None:
    job = make_job(app.state.store)
    folder = settings.home / "jobs" / job
    folder.mkdir(parents=True)
    writer = LogWriter(folder, quota=32768)
    for n in range(4000):
        writer.write(b"line %06d\n" % n)
    writer.close()
    part = await client.get(f"/v1/fine_tuning/jobs/{job}/logs", headers={"Range": "bytes=0-"})
    first, total = (
        int(n) for n in part.headers["Content-Range"].removeprefix("bytes ").replace("/", "-").split("-")[::2]
    )
    assert first > 0 and total == 4000 * 12 and len(part.content) == total - first <= 32768 + 4096
    assert part.content.endswith(b"line 003999\n")


async def test_a_stream_of_log_lines_is_taken_up_by_byte(
    app: FastAPI, client: httpx.AsyncClient, log: tuple[str, bytes, Path]
) -> None:
    job, text, _ = log
    app.state.store.request_cancel(job)
    route = f"/v1/fine_tuning/jobs/{job}/logs?stream=true"
    pieces = sse((await client.get(route)).text)
    assert "".join(one[2]["text"] for one in pieces[:-1]).encode() == text and pieces[-1][0] == "done"
    assert all(one[2]["text"].endswith("\n") for one in pieces[:-1]), "whole lines"
    rest = sse((await client.get(route, headers={"Last-Event-ID": str(pieces[0][1])})).text)
    assert "".join(one[2]["text"] for one in rest[:-1]).encode() == text[int(pieces[0][1] or 0) :]
    bad = await client.get(route, headers={"Last-Event-ID": "x"})
    assert bad.status_code == 400


@pytest.mark.parametrize("character", ["\u00e9", "\u20ac", "\U0001f600"])
@pytest.mark.parametrize("before", range(4))
async def test_a_line_longer_than_a_piece_is_cut_between_characters_and_its_end_is_told(
    app: FastAPI, client: httpx.AsyncClient, settings: Settings, character: str, before: int
) -> None:
    job = make_job(app.state.store)
    folder = settings.home / "jobs" / job
    folder.mkdir(parents=True)
    text = "x" * before + character * (3 * PIECE // 2 // len(character.encode())) + " the last line has no end"
    writer = LogWriter(folder)
    writer.write(text.encode())
    writer.close()
    app.state.store.request_cancel(job)
    pieces = sse((await client.get(f"/v1/fine_tuning/jobs/{job}/logs?stream=true")).text)
    assert "".join(one[2]["text"] for one in pieces[:-1]) == text
    assert len(pieces) == 3 and pieces[-1][0] == "done"


async def test_bytes_that_are_no_text_do_not_hold_a_log_up(
    app: FastAPI, client: httpx.AsyncClient, settings: Settings
) -> None:
    job = make_job(app.state.store)
    folder = settings.home / "jobs" / job
    folder.mkdir(parents=True)
    writer = LogWriter(folder)
    writer.write(b"\xf0\xff" * PIECE + b"\xf0")
    writer.close()
    app.state.store.request_cancel(job)
    pieces = sse((await client.get(f"/v1/fine_tuning/jobs/{job}/logs?stream=true")).text)
    assert pieces[-1][0] == "done" and int(pieces[-2][1] or 0) == 2 * PIECE + 1


@pytest.fixture
def live(tmp_path: Path) -> Iterator[tuple[Live, JobStore, Path]]:
    settings = Settings(home=tmp_path / "home", limits=LimitSettings(min_free_disk_bytes=0), grace_seconds=0.2)
    app = create_app(settings, engine=FakeEngine(), scheduler=IdleScheduler())
    with serving(app, settings) as live:
        yield live, app.state.store, settings.home


def test_fifty_thousand_lines_and_ten_broken_connections(live: tuple[Live, JobStore, Path]) -> None:
    """Promise: no line lost, none twice, flat memory, a first byte at once."""
    server, store, home = live
    job = make_job(store)
    folder = home / "jobs" / job
    folder.mkdir(parents=True)
    lines = 50_000

    def write() -> None:
        writer = LogWriter(folder)
        for n in range(0, lines, 500):
            writer.write(b"".join(b"%05d the run says something about itself\n" % k for k in range(n, n + 500)))
            time.sleep(0.02)
        writer.close()
        store.request_cancel(job)

    thread = threading.Thread(target=write)
    before, most = psutil.Process().memory_info().rss, 0
    thread.start()
    seen: list[int] = []
    drops, last, ended = 0, "0", False
    first: list[float] = []
    with httpx.Client(headers=server.headers, timeout=30) as client:
        while not ended:
            began = time.monotonic()
            headers = {"Last-Event-ID": last}
            got = 0
            with client.stream(
                "GET", f"{server.url}/v1/fine_tuning/jobs/{job}/logs?stream=true", headers=headers
            ) as answer:
                name, data = "message", ""
                for line in answer.iter_lines():
                    if not first or got == 0:
                        first.append(time.monotonic() - began)
                    if line.startswith("event: "):
                        name = line.removeprefix("event: ")
                    elif line.startswith("data: "):
                        data = line.removeprefix("data: ")
                    elif line.startswith("id: "):
                        last = line.removeprefix("id: ")
                    elif line == "" and data:
                        if name == "done":
                            ended = True
                            break
                        seen += [int(text[:5]) for text in json.loads(data)["text"].splitlines()]
                        got, data = got + 1, ""
                        most = max(most, psutil.Process().memory_info().rss)
                        if drops < 10 and got == 3:
                            drops += 1
                            break
    thread.join()
    assert drops == 10 and seen == list(range(lines)), "nothing lost, nothing twice"
    assert most - before <= 20 << 20
    assert min(first) <= 0.2
