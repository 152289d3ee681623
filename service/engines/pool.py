"""One engine process for each base in use, under a limit on memory. It is an engine itself. No torch here.

LoRA adapters share their base's process and batch. What cannot share a batch (DoRA) is served by a process of its own,
with the adapter merged into its copy of the base.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

from service.engines.base import BadRequest, Chunk, EngineUnavailable, Request
from service.engines.options import EngineOptions, PoolOptions
from service.engines.transformers_engine import TransformersEngine

OVERHEAD = 350 << 20  # resident bytes of a process beyond its weights: python, torch, transformers

Key = tuple[str, str | None]  # base directory; directory of the adapter merged into it


class EnginePool:
    """Routes each request to the process of its base, started when first needed.

    Args:
        options: what each process may take.
        pool: what all of them may take together.
    """

    def __init__(self, options: EngineOptions | None = None, pool: PoolOptions | None = None) -> None:
        self.options = options or EngineOptions()
        self.pool = pool or PoolOptions()
        self._engines: dict[Key, TransformersEngine] = {}
        self._room = asyncio.Lock()
        self._sweeper: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._closed = False

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """Stream a completion; see ``Engine``.

        Args:
            request: any base and adapter directory on this machine.

        Yields:
            Chunks, the last with a finish reason.

        Raises:
            EngineError: see its classes; 503 also if there is no memory for another base.
        """
        if self._closed:
            raise EngineUnavailable("The service is stopping.", retry_after=5)
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(self._sweep())
        merge = request.adapter if request.adapter is not None and needs_merge(Path(request.adapter)) else None
        engine = self._engines.get((request.base, merge))
        if engine is None or engine.child is None:
            engine = await self._engine((request.base, merge))
        if merge is not None:
            request = replace(request, adapter=None)
        async with aclosing(engine.generate(request)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def close(self) -> None:
        """End every process."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
        await asyncio.gather(*(engine.close() for engine in self._engines.values()), *self._ending)
        self._engines.clear()

    async def health(self) -> dict[str, Any]:
        """State of every process; never waits for one."""
        engines = [await engine.health() for engine in self._engines.values()]
        return {
            "ok": not self._closed,
            "kind": "pool",
            "memory_bytes": sum(engine["memory_bytes"] for engine in engines),
            "in_flight": sum(engine["in_flight"] for engine in engines),
            "engines": engines,
        }

    async def drop(self, directory: str) -> None:
        """End the idle processes of a deleted model; a busy one ends when it is idle for long.

        Args:
            directory: of a base, or of an adapter that is merged into one.
        """
        for key in [k for k, engine in self._engines.items() if directory in k and not engine.in_flight]:
            if key in self._engines:  # another task may have ended it meanwhile
                await self._end(key)

    async def _end(self, key: Key) -> None:
        """End an engine's process, to the last, even if who asked for it leaves."""
        ending = asyncio.create_task(self._engines.pop(key).stop())
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)
        await asyncio.shield(ending)

    async def _engine(self, key: Key) -> TransformersEngine:
        """The engine of a key, with memory made for its process."""
        async with self._room:
            engine = self._engines.get(key)
            if engine is None:
                engine = TransformersEngine(key[0], self.options, merge=key[1])
            if engine.child is None and not engine.in_flight:
                await self._make_room(key)
            self._engines[key] = engine
            return engine

    async def _make_room(self, key: Key) -> None:
        needed = OVERHEAD + await asyncio.to_thread(weights_bytes, Path(key[0]))
        limit = self.pool.memory_bytes
        if needed > limit:
            message = f"The model needs about {needed >> 20} MiB, engines may take {limit >> 20} MiB: raise the limit."
            raise BadRequest("model_too_large", message, param="model")
        while needed + self._taken(key) > limit:
            idle = [k for k, engine in self._engines.items() if k != key and not engine.in_flight and engine.child]
            if not idle:
                raise EngineUnavailable("Other models are in use and leave no memory for this one. Try again shortly.")
            await self._end(min(idle, key=lambda k: self._engines[k].last_used))

    def _taken(self, key: Key) -> int:
        """Bytes of the other processes: what they hold, or will when they have started."""
        taken = 0
        for other, engine in self._engines.items():
            if other != key and (engine.child is not None or engine.in_flight):
                taken += max(engine.memory_bytes(), OVERHEAD + weights_bytes(Path(other[0])))
        return taken

    async def _sweep(self) -> None:
        """End engines that were idle for long."""
        while True:
            await asyncio.sleep(min(30.0, self.pool.idle_seconds / 4))
            now = time.monotonic()
            for key, engine in list(self._engines.items()):
                idle = not engine.in_flight and now - engine.last_used >= self.pool.idle_seconds
                if idle and self._engines.get(key) is engine:
                    await self._end(key)


def weights_bytes(base: Path) -> int:
    """Bytes of a model's weights on disk; 0 if it is gone, which its process then says."""
    return sum(file.stat().st_size for file in base.glob("*.safetensors"))


def needs_merge(adapter: Path) -> bool:
    """Whether PEFT cannot run this adapter beside others: DoRA rescales the base's own output."""
    try:
        config = json.loads((adapter / "adapter_config.json").read_bytes())
    except (OSError, ValueError):
        return False  # its process says what is wrong with it
    return isinstance(config, dict) and bool(config.get("use_dora"))
