"""The engine on transformers, seen from the service: a child process that starts when it is needed. No torch here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

import psutil

from service.engines.base import BadRequest, Chunk, EngineBusy, EngineError, EngineUnavailable, Request
from service.engines.child import Child
from service.engines.options import EngineOptions


class TransformersEngine:
    """Serves one base directory; a process that died is started again by the next request.

    Args:
        base: directory of the model.
        options: what its process may take.
        merge: directory of an adapter to be merged into the base, for what cannot share a batch.
    """

    def __init__(self, base: str, options: EngineOptions | None = None, *, merge: str | None = None) -> None:
        self.base = base
        self.merge = merge
        self.options = options or EngineOptions()
        self.last_used = time.monotonic()
        self.in_flight = 0
        self.starts = 0
        self._child: Child | None = None
        self._starting: asyncio.Task[Child] | None = None
        self._closed = False
        self._seconds = 1.0  # running mean of how long a request takes

    @property
    def child(self) -> Child | None:
        """The living process, if there is one."""
        return self._child if self._child is not None and not self._child.dead else None

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """Stream a completion; see ``Engine``.

        Args:
            request: for this base.

        Yields:
            Chunks, the last with a finish reason.

        Raises:
            EngineError: see its classes.
        """
        if request.base != self.base:
            raise BadRequest("model_not_found", "The request is for another model.", param="model")
        places = self.options.rows + self.options.waiting
        if self.in_flight >= places:
            wait = max(1, min(60, round(self._seconds * self.options.waiting / self.options.rows)))
            message = f"{self.in_flight} requests are being answered or waiting, the most allowed. Try again shortly."
            raise EngineBusy(message, retry_after=wait)
        self.in_flight += 1
        began = self.last_used = time.monotonic()
        try:
            child = await self._ready()
            name, inbox = child.submit(request)
            finished = False
            try:
                while not finished:
                    what = await inbox.get()
                    if isinstance(what, EngineError):
                        finished = True
                        raise what
                    finished = what.finish_reason is not None
                    yield what
            finally:
                child.forget(name, cancel=not finished)
            self._seconds += 0.1 * (time.monotonic() - began - self._seconds)
        finally:
            self.in_flight -= 1
            self.last_used = time.monotonic()

    async def close(self) -> None:
        """End the process; requests in flight fail with 503."""
        self._closed = True
        await self.stop()

    async def stop(self) -> None:
        """End the process; the next request starts another."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
            self._starting = None
        child, self._child = self._child, None
        if child is not None:
            await child.end()

    async def drop(self, directory: str) -> None:
        """End the process if it is idle and has this model; see ``Engine``.

        Args:
            directory: of the base, or of the adapter merged into it.
        """
        if directory in (self.base, self.merge) and not self.in_flight:
            await self.stop()

    async def health(self) -> dict[str, Any]:
        """State of the process; never waits for it."""
        child = self.child
        return {
            "ok": not self._closed,
            "kind": "transformers",
            "base": self.base,
            "running": child is not None,
            "pid": child.process.pid if child else None,
            "memory_bytes": self.memory_bytes(),
            "in_flight": self.in_flight,
            "starts": self.starts,
            **(child.stats if child else {}),
        }

    def memory_bytes(self) -> int:
        """Resident bytes of the process; 0 without one."""
        child = self.child
        if child is None:
            return 0
        try:
            return int(psutil.Process(child.process.pid).memory_info().rss)
        except psutil.Error:
            return 0

    async def _ready(self) -> Child:
        """The living process; requests that come while it starts wait for the same start."""
        if self._closed:
            raise EngineUnavailable("The service is stopping.", retry_after=5)
        if self.child is not None:
            return self.child
        if self._starting is None:
            self.starts += 1
            self._starting = asyncio.create_task(Child.start(self.base, self.merge, self.options))
            self._starting.add_done_callback(self._started)
        starting = self._starting
        try:
            # Shielded: a client that leaves must not end the start that others wait for.
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            if starting.cancelled():
                raise EngineUnavailable("The engine was stopped while it started. Try again.") from None
            raise

    def _started(self, task: asyncio.Task[Child]) -> None:
        self._starting = None
        if not task.cancelled() and task.exception() is None:
            self._child = task.result()
