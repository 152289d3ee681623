"""uvicorn with a graceful stop: first not ready, then no new connections, then an end that nothing can delay."""

from __future__ import annotations

import asyncio
import math
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.cli.connection import PatientProtocol
from service.settings import Settings

MARGIN_SECONDS = 1.0


class GracefulServer(uvicorn.Server):
    """Serves one app. SIGTERM or SIGINT begins the stop; a second SIGINT does not wait for anything.

    Args:
        app: from ``create_app``.
        settings: its settings.
        ready: called when requests are taken.
    """

    def __init__(self, app: FastAPI, settings: Settings, *, ready: Callable[[], None] | None = None) -> None:
        self.app, self.drain_seconds, self.ready = app, settings.drain_seconds, ready
        super().__init__(
            uvicorn.Config(
                app,
                http=PatientProtocol,
                log_config=None,
                access_log=False,
                lifespan="off",  # ours, in serve_app: what goes wrong there must reach the caller
                server_header=False,
                # Connections that are still busy then are cut: generations ended at the grace time at the latest.
                timeout_graceful_shutdown=math.ceil(settings.grace_seconds + MARGIN_SECONDS),
            )
        )
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve_app(self, listener: socket.socket) -> None:
        """Start the app, serve until a signal, stop the app.

        Args:
            listener: a listening socket.

        Raises:
            Exception: whatever the app's start or stop raises.
        """
        async with self.app.router.lifespan_context(self.app):
            await self.serve(sockets=[listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to serve; remembers the loop that a signal must reach."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets=sockets)
        if self.started and self.ready is not None:
            self.ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: tell the app now, close the door ``drain_seconds`` later."""
        draining = self.app.state.draining.begun.is_set() or self.should_exit
        if self._loop is None or (draining and sig == signal.SIGINT):
            super().handle_exit(sig, frame)
            self.force_exit = self.force_exit or draining
            return
        self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        """In the loop: readiness and new generations end, event streams send their last event; then the server ends.

        A stop that was asked for is no failure, so the signal is not raised again and the exit code is 0.
        """
        assert self._loop is not None, "startup comes first"
        if not self.app.state.draining.begun.is_set():
            self.app.state.draining.begin()
            self._loop.call_later(self.drain_seconds, self._close)

    def _close(self) -> None:
        self.should_exit = True
