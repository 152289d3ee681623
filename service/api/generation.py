"""What chat completions and completions share: n choices merged into one stream, and nothing left running.

A generator that is closed, by its reader, by an error or by a client that went away, closes the engine's generators;
that is what frees their rows.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import uuid4

import anyio
from fastapi import Request as HTTPRequest
from starlette.requests import ClientDisconnect

from service.api.drain import Draining
from service.api.resolve import Target
from service.api.schemas.generation import GenerationRequest, SteeringReceipt, Usage
from service.engines.base import (
    TOO_STRONG,
    BadRequest,
    Chunk,
    Engine,
    EngineUnavailable,
    FinishReason,
    Message,
    Receipt,
    Request,
    Sampling,
    Steering,
    TokenLogprob,
)
from service.metrics import Metrics

PING_SECONDS = 15.0
T = TypeVar("T")


def sampling(body: GenerationRequest, *, max_tokens: int | None, logprobs: int | None) -> Sampling:
    """The engine's sampling parameters, with OpenAI's defaults for what is not given."""
    return Sampling(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=body.seed,
        stop=tuple(body.stop or ()),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logprobs=logprobs,
    )


def requests(
    count: int, model: Target, prompt: tuple[Message, ...] | str, how: Sampling, steering: Steering | None
) -> list[Request]:
    """One engine request a choice; choice i draws with seed + i."""
    group = uuid4().hex
    return [
        Request(
            id=f"{group}-{index}",
            base=str(model.base),
            adapter=None if model.adapter is None else str(model.adapter),
            prompt=prompt,
            sampling=how if how.seed is None else _reseeded(how, how.seed + index),
            steering=steering,
        )
        for index in range(count)
    ]


def _reseeded(how: Sampling, seed: int) -> Sampling:
    return Sampling(
        how.max_tokens,
        how.temperature,
        how.top_p,
        seed,
        how.stop,
        how.presence_penalty,
        how.frequency_penalty,
        how.logprobs,
    )


async def choices(
    engine: Engine, wanted: Sequence[Request], draining: Draining
) -> AsyncGenerator[tuple[int, Chunk] | None, None]:
    """Chunks of all choices as they come, with the choice's index; none after a while without one (send a ping).

    Args:
        engine: What generates.
        wanted: One request a choice.
        draining: The stop of the server; when its grace is over, this ends with 503.

    Yields:
        tuple[int, Chunk] | None: the choice and its chunk.

    Raises:
        EngineError: The first error of any choice; the others are closed.
    """
    queue: asyncio.Queue[tuple[int, Chunk] | Exception | None] = asyncio.Queue(maxsize=256)

    async def pump(index: int, request: Request) -> None:
        try:
            async with aclosing(engine.generate(request)) as chunks:
                async for chunk in chunks:
                    await queue.put((index, chunk))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    async def expire() -> None:
        await draining.expired.wait()
        await queue.put(EngineUnavailable("The server is stopping; send the request again.", retry_after=5))

    tasks = [asyncio.create_task(pump(index, request)) for index, request in enumerate(wanted)]
    tasks.append(asyncio.create_task(expire()))
    try:
        open_choices = len(wanted)
        while open_choices:
            try:
                # Not wait_for: in Python 3.11 it swallows a cancellation that comes together with an item.
                async with asyncio.timeout(PING_SECONDS):
                    item = await queue.get()
            except TimeoutError:
                yield None
                continue
            if isinstance(item, Exception):
                raise item
            if item is None:
                open_choices -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(slots=True)
class Collected:
    """One choice, whole."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    receipt: Receipt | None = None

    def add(self, chunk: Chunk) -> None:
        """Take one more chunk."""
        self.text += chunk.text
        self.logprobs += chunk.logprobs
        self.prompt_tokens, self.completion_tokens = chunk.prompt_tokens, chunk.completion_tokens
        self.finish_reason = chunk.finish_reason or self.finish_reason
        self.receipt = chunk.receipt or self.receipt


def usage(collected: Sequence[Collected]) -> Usage:
    """Tokens of a request; the prompt counts once."""
    prompt = max((choice.prompt_tokens for choice in collected), default=0)
    completion = sum(choice.completion_tokens for choice in collected)
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def receipt(made: Receipt | None) -> SteeringReceipt | None:
    """The wire form of a receipt.

    Args:
        made: The engine's.

    Returns:
        What the answer holds; none without steering.

    Raises:
        EngineError: 400, the steering cannot be told in numbers that JSON has.
    """
    if made is None:
        return None
    if not math.isfinite(made.mean_relative_shift):
        raise BadRequest("steering_too_strong", TOO_STRONG, param="steering")
    return SteeringReceipt(layers=list(made.layers), tokens=made.tokens, mean_relative_shift=made.mean_relative_shift)


class Observed:
    """Counts a generation's outcome exactly once, whatever way it ends."""

    def __init__(self, metrics: Metrics, steered: bool) -> None:
        self.metrics, self.steered = metrics, steered
        self.began = time.monotonic()
        self.first = True
        metrics.generating.inc()

    def saw(self, chunk: Chunk) -> None:
        """Note one chunk."""
        if self.first and chunk.completion_tokens:
            self.first = False
            self.metrics.first_token_seconds.observe(time.monotonic() - self.began)
        if chunk.finish_reason is not None:
            self.metrics.prompt_tokens.inc(chunk.prompt_tokens)
            self.metrics.generated_tokens.inc(chunk.completion_tokens)
            if self.steered:
                self.metrics.steered.inc()

    def ended(self, outcome: str) -> None:
        """Note the end: ``finished``, ``failed`` or ``left``."""
        self.metrics.generating.dec()
        self.metrics.generations.labels(outcome).inc()


async def watched(
    source: AsyncGenerator[tuple[int, Chunk] | None, None], seen: Observed
) -> AsyncGenerator[tuple[int, Chunk] | None, None]:
    """The same chunks, counted; closing this closes the source."""
    outcome = "left"
    try:
        async with aclosing(source):
            async for item in source:
                if item is not None:
                    seen.saw(item[1])
                yield item
        outcome = "finished"
    except Exception:
        outcome = "failed"
        raise
    finally:
        seen.ended(outcome)


async def collect(source: AsyncGenerator[tuple[int, Chunk] | None, None], count: int) -> list[Collected]:
    """Read all choices to their end."""
    collected = [Collected() for _ in range(count)]
    async with aclosing(source):
        async for item in source:
            if item is not None:
                collected[item[0]].add(item[1])
    return collected


async def unless_left(request: HTTPRequest, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled as soon as the client goes away.

    Args:
        request: The request, its body read.
        work: What to wait for.

    Returns:
        What `work` returns.

    Raises:
        ClientDisconnect: The client went away.
    """

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.create_task(work), asyncio.create_task(left())
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        task.cancel()
        watcher.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.gather(task, watcher, return_exceptions=True)
