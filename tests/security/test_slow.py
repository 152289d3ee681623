"""Half a request holds nothing for long, and nothing at all without a key."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from service.api import middleware
from service.app import create_app
from service.cli import connection
from service.engines.fake import FakeEngine
from service.settings import Settings
from tests.api.fixtures import IdleScheduler
from tests.api.live import Live, serving
from tests.contract.base import BASE, make_base

HEAD = b"POST /v1/fine_tuning/jobs HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n"


@pytest.fixture
def live(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.4)
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.4)
    app = create_app(settings, engine=FakeEngine(), scheduler=IdleScheduler())
    with serving(app, settings) as live:
        yield live


@contextmanager
def opened(live: Live, *parts: bytes) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", live.port), timeout=5) as made:
        for part in parts:
            made.sendall(part % live.port if b"%d" in part else part)
        yield made


def rest(made: socket.socket) -> bytes:
    """Everything until the other side closes, which it must do within the socket's five seconds of silence."""
    found = b""
    try:
        while piece := made.recv(65536):
            found += piece
    except ConnectionResetError:
        pass
    return found


def test_silence_half_headers_and_headers_by_drops_are_closed(live: Live) -> None:
    whole = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n"
    for parts in ((), (HEAD,), (whole,)):
        with opened(live, *parts) as made:
            began = time.monotonic()
            if parts == (whole,):
                assert b"200 OK" in made.recv(65536)
                made.sendall(b"GET /heal")
            rest(made)
            assert time.monotonic() - began < 3
    began = time.monotonic()
    with opened(live) as made, pytest.raises((BrokenPipeError, ConnectionResetError)):
        while time.monotonic() - began < 5:
            made.sendall(b"G")
            time.sleep(0.05)
    assert 0.3 < time.monotonic() - began < 3


def test_an_answer_that_takes_longer_is_not_cut(live: Live) -> None:
    live.server.app.state.engine.delay = 0.2
    make_base(live.server.app.state.settings.home)
    body = {"model": BASE, "messages": [{"role": "user", "content": "x"}], "max_tokens": 5}
    with httpx.Client(base_url=live.url, headers=live.headers, timeout=20) as client:
        began = time.monotonic()
        assert client.post("/v1/chat/completions", json=body).status_code == 200
        assert time.monotonic() - began > 0.8, "longer than both limits, or the test says nothing"
        time.sleep(0.6)  # idle between two requests: the server's keep-alive, not our limit
        assert client.get("/healthz").status_code == 200


def test_a_body_that_stops_coming_is_a_408(live: Live) -> None:
    more = f"Authorization: Bearer {live.key}\r\nContent-Length: 100\r\n\r\n".encode()
    with opened(live, HEAD, more, b'{"model"') as made:
        answer = rest(made)
        assert answer.startswith(b"HTTP/1.1 408") and b"request_timeout" in answer


@pytest.mark.parametrize("given", [b"", b"Authorization: Bearer gh-wrong\r\n", b"Authorization: Basic eDp5\r\n"])
def test_without_a_key_no_body_is_waited_for(live: Live, given: bytes) -> None:
    with opened(live, HEAD, given, b"Content-Length: 1000000\r\nExpect: 100-continue\r\n\r\n") as made:
        answer = rest(made)
        assert answer.startswith(b"HTTP/1.1 401"), answer
        assert b"invalid_api_key" in answer and b"authentication_error" in answer and b"Bearer" in answer


@pytest.mark.parametrize("body", [b"{", b"", b"[" * 5000, b"\xff"])
async def test_without_a_key_a_bad_body_is_a_401(client: httpx.AsyncClient, body: bytes) -> None:
    headers = {"Content-Type": "application/json", "Authorization": ""}
    for path in ("/v1/fine_tuning/jobs", "/v1/chat/completions", "/v1/files", "/v1/keys"):
        answer = await client.post(path, content=body, headers=headers)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    known = {"Content-Type": "application/json"}
    assert (await client.post("/v1/fine_tuning/jobs", content=body, headers=known)).status_code == 400
