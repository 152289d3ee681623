"""Runs the command line in this process, and a scripted server that misbehaves exactly as told."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from service.cli import main


@dataclass
class Result:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as JSON."""
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        """Standard output as lines of JSON."""
        return [json.loads(text) for text in self.out.splitlines()]


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Run]:
    """`run("jobs", "list")` as a shell would, with a data folder of the test's own and no keys in the environment."""
    for name in ("GRADHELM_URL", "GRADHELM_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GRADHELM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "100")

    def command(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["gradhelm", *map(str, arguments)])
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        sys.stdout.flush()
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    # `serve` hands its options on in the environment: nothing of it may outlive the test.
    with mock.patch.dict(os.environ):
        yield command


@dataclass
class Reply:
    """One answer of the scripted server; `cut` breaks the connection in the middle of the body."""

    body: bytes | dict[str, Any] = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False


@dataclass
class Asked:
    """One request that arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Script:
    """Answers by "METHOD path"; the last one of a list is repeated."""

    url: str
    replies: dict[str, list[Reply]] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)

    def on(self, route: str, *replies: Reply) -> None:
        """Set the answers of a route."""
        self.replies[route] = list(replies)

    def sent(self, route: str) -> list[Asked]:
        """Requests that a route got."""
        return [one for one in self.asked if f"{one.method} {one.path.partition('?')[0]}" == route]


@pytest.fixture
def script() -> Iterator[Script]:
    """A real HTTP server on a loopback port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            return

        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            route = f"{self.command} {self.path.partition('?')[0]}"
            state.asked.append(Asked(self.command, self.path, dict(self.headers), body))
            left = state.replies.get(route) or [Reply({"error": {"message": f"no {route}"}}, 404)]
            reply = left.pop(0) if len(left) > 1 else left[0]
            raw = json.dumps(reply.body).encode() if isinstance(reply.body, dict) else reply.body
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(raw) + (1000 if reply.cut else 0)))
            self.end_headers()
            self.wfile.write(raw)
            if reply.cut:
                self.close_connection = True

        do_GET = do_POST = do_DELETE = _answer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Script(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()
