"""A client that leaves frees its row, and a server that stops tells everybody."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.app import create_app
from service.engines.fake import FakeEngine
from service.settings import Settings
from tests.api.fixtures import BASE, IdleScheduler, make_base
from tests.api.live import Live, serving

LONG = " ".join(["word"] * 2000)
TIMES = 25


def until(true: Callable[[], bool], seconds: float = 10.0) -> float:
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds, "it did not happen in time"
        time.sleep(0.005)
    return time.monotonic() - began


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(lambda request: LONG, delay=0.01, context=4096)


@pytest.fixture
def live(tmp_path: Path, engine: FakeEngine) -> Iterator[Live]:
    settings = Settings(home=tmp_path / "home", grace_seconds=1.0, drain_seconds=0.3)
    make_base(settings.home)
    with serving(create_app(settings, engine=engine, scheduler=IdleScheduler()), settings) as live:
        yield live


def request(live: Live, body: dict[str, Any]) -> socket.socket:
    """Send a chat request over a socket of our own, so that we can vanish."""
    data = json.dumps({"model": BASE, "messages": [{"role": "user", "content": "x"}], **body}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{live.port}\r\nAuthorization: Bearer {live.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", live.port), timeout=20)
    connection.sendall(head.encode() + data)
    return connection


def test_closing_a_stream_after_three_tokens_frees_the_row(live: Live, engine: FakeEngine) -> None:
    for _ in range(TIMES):
        connection = request(live, {"stream": True})
        seen = b""
        while seen.count(b"data: ") < 4:
            seen += connection.recv(4096)
        assert len(engine.active) == 1
        connection.close()
        until(lambda: not engine.active)
    assert len(engine.cancelled) == TIMES == len(engine.requests)


def test_closing_while_the_whole_answer_is_awaited_frees_the_rows(live: Live, engine: FakeEngine) -> None:
    for _ in range(5):
        connection = request(live, {"n": 3})
        until(lambda: len(engine.active) == 3)
        connection.close()
        until(lambda: not engine.active)
    assert len(engine.cancelled) == 15
    text = httpx.get(f"{live.url}/metrics", headers=live.headers).text
    assert 'gradhelm_generations_total{outcome="left"} 5.0' in text
    assert "gradhelm_generations_in_flight 0.0" in text


def test_closing_before_the_first_token_frees_the_row(live: Live, engine: FakeEngine) -> None:
    engine.delay = 30.0
    for stream in (True, False):
        connection = request(live, {"stream": stream})
        until(lambda: len(engine.active) == 1)
        connection.close()
        assert until(lambda: not engine.active) < 5


def test_an_error_of_one_choice_frees_the_others(live: Live, engine: FakeEngine) -> None:
    engine.max_requests = 2
    body = {"model": BASE, "messages": [{"role": "user", "content": "x"}], "n": 3}
    for stream in (False, True):
        answer = httpx.post(f"{live.url}/v1/chat/completions", json={**body, "stream": stream}, headers=live.headers)
        assert answer.status_code == 429 and int(answer.headers["Retry-After"]) >= 1
        assert answer.json()["error"]["code"] == "engine_overloaded"
        until(lambda: not engine.active)


def test_a_stop_finishes_answers_ends_streams_and_is_quick(live: Live, engine: FakeEngine) -> None:
    body = {"model": BASE, "messages": [{"role": "user", "content": "x"}]}
    job = {"model": BASE, "training_file": "file-x"}
    assert httpx.post(f"{live.url}/v1/fine_tuning/jobs", json=job, headers=live.headers).status_code == 404
    found: dict[str, Any] = {}

    def short() -> None:
        more = {**body, "max_tokens": 60}
        found["short"] = httpx.post(f"{live.url}/v1/chat/completions", json=more, headers=live.headers, timeout=20)

    def long() -> None:
        found["long"] = httpx.post(f"{live.url}/v1/chat/completions", json=body, headers=live.headers, timeout=20)

    def stream() -> None:
        more = {**body, "stream": True}
        with httpx.stream("POST", f"{live.url}/v1/chat/completions", json=more, headers=live.headers) as answer:
            found["stream"] = [line for line in answer.iter_lines() if line]

    threads = [threading.Thread(target=one) for one in (short, long, stream)]
    for thread in threads:
        thread.start()
    until(lambda: len(engine.active) == 3)
    said: list[int] = []
    watcher = threading.Thread(target=readiness, args=(live, said))
    watcher.start()
    until(lambda: said == [200])
    seconds = live.stop()
    for thread in (*threads, watcher):
        thread.join(20)
    assert seconds <= 10
    assert found["short"].status_code == 200 and found["short"].json()["choices"][0]["finish_reason"] == "length"
    assert found["long"].status_code == 503 and found["long"].headers["Retry-After"]
    last = json.loads(found["stream"][-1].removeprefix("data: "))
    assert last["error"]["code"] == "engine_unavailable", "the stream's last event says why"
    assert said == [200, 503], "readiness falls at once, while the door is still open"
    assert not engine.active and engine.closed


def readiness(live: Live, said: list[int]) -> None:
    """What /readyz says until it says no."""
    while 503 not in said:
        status = httpx.get(f"{live.url}/readyz").status_code
        if status not in said:
            said.append(status)
        time.sleep(0.02)


def test_a_stopping_server_takes_no_new_generation(live: Live) -> None:
    live.server.app.state.draining.begun.set()
    body = {"model": BASE, "messages": [{"role": "user", "content": "x"}]}
    answer = httpx.post(f"{live.url}/v1/chat/completions", json=body, headers=live.headers)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "server_stopping"
    assert answer.headers["Retry-After"]


def test_no_answer_waits_for_a_delayed_acknowledgement(live: Live) -> None:
    """On a kept connection, head and body leave in two writes: with Nagle's algorithm on, each takes 40 ms."""
    with httpx.Client(base_url=live.url) as client:
        assert client.get("/healthz").status_code == 200
        kept = list(live.server.server_state.connections)
        assert kept
        for connection in kept:
            plain = connection.transport.get_extra_info("socket")  # type: ignore[union-attr]
            assert plain.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
