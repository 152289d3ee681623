"""A real uvicorn on a loopback port, in a thread of the test's own process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fastapi import FastAPI

from service.cli.serve import address, listen
from service.cli.server import GracefulServer
from service.settings import Settings


@dataclass
class Live:
    """Where it listens, its admin key, and the server itself."""

    url: str
    port: int
    key: str
    server: GracefulServer
    thread: threading.Thread

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def stop(self) -> float:
        """Stop as on SIGTERM; seconds until the thread is gone."""
        began = time.monotonic()
        loop = self.server._loop
        assert loop is not None
        loop.call_soon_threadsafe(self.server._stop)
        self.thread.join(30)
        assert not self.thread.is_alive()
        return time.monotonic() - began


@contextmanager
def serving(app: FastAPI, settings: Settings) -> Iterator[Live]:
    """Serve an app that is not started yet."""
    listener = listen("127.0.0.1", 0)
    server = GracefulServer(app, settings)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve_app(listener)), daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        url = address(listener)
        key = (settings.home / "admin.key").read_text().strip()
        yield Live(url, int(url.rpartition(":")[2]), key, server, thread)
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
