"""A deterministic engine in memory, for tests of what stands in front of one. It has no model; it obeys the rules.

Words are its tokens. The answer is a pure function of the request (or what ``reply`` returns), so equal requests get
equal text; another seed, adapter or steering gets other text. Stop strings, ``max_tokens``, log-probabilities, the
context limit, the queue limit and cancellation behave as in a real engine.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from service.engines.base import (
    Chunk,
    ContextLengthExceeded,
    EngineBusy,
    FinishReason,
    Receipt,
    Request,
    SteersNothing,
    TokenLogprob,
    TopLogprob,
)
from service.engines.text import TextStream

WORDS = "the order is late and we will send a new box to you with care soon thanks".split()


def default_reply(request: Request) -> str:
    """Sixteen words that depend on everything in the request but its id."""
    asked = asdict(request) | {"id": ""}
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).digest()
    return " ".join(WORDS[b % len(WORDS)] for b in digest[:16]) + "."


class FakeEngine:
    """Answers in words.

    Args:
        reply: the whole answer to a request, before stop strings and ``max_tokens``.
        delay: seconds before each token.
        context: words that prompt and answer may have together.
        max_requests: requests at once; one more is refused with 429.
    """

    def __init__(
        self,
        reply: Callable[[Request], str] = default_reply,
        *,
        delay: float = 0.0,
        context: int = 2048,
        max_requests: int = 64,
    ) -> None:
        self.reply = reply
        self.delay = delay
        self.context = context
        self.max_requests = max_requests
        self.active: set[str] = set()
        self.requests: list[Request] = []  # every request accepted, in order
        self.cancelled: list[str] = []  # ids whose stream was closed before its last chunk
        self.dropped: list[str] = []
        self.closed = False

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """Stream the answer, one chunk per token."""
        prompt_tokens = self._admit(request)
        self.active.add(request.id)
        finished = False
        try:
            async with aclosing(self._stream(request, prompt_tokens)) as chunks:
                async for chunk in chunks:
                    finished = chunk.finish_reason is not None
                    yield chunk
        finally:
            self.active.discard(request.id)
            if not finished:
                self.cancelled.append(request.id)

    async def close(self) -> None:
        """Nothing to end; remembers that it was asked."""
        self.closed = True

    async def drop(self, directory: str) -> None:
        """Nothing to end; remembers what was dropped."""
        self.dropped.append(directory)

    async def health(self) -> dict[str, Any]:
        """Always well."""
        return {"ok": True, "kind": "fake", "active": len(self.active)}

    def _admit(self, request: Request) -> int:
        text = request.prompt if isinstance(request.prompt, str) else " ".join(m.content for m in request.prompt)
        prompt_tokens, wanted = max(1, len(text.split())), request.sampling.max_tokens
        if prompt_tokens + (wanted or 1) > self.context:
            raise ContextLengthExceeded(self.context, prompt_tokens, wanted)
        if request.steering is not None and all(t.strength == 0 for t in request.steering.terms):
            raise SteersNothing("Every strength is 0: nothing would be steered.")
        if len(self.active) >= self.max_requests:
            raise EngineBusy(f"{len(self.active)} requests are being answered, the most allowed. Try again shortly.")
        self.requests.append(request)
        return prompt_tokens

    async def _stream(self, request: Request, prompt_tokens: int) -> AsyncGenerator[Chunk, None]:
        sampling = request.sampling
        pieces = re.findall(r"\s*\S+|\s+$", self.reply(request))
        limit = min(sampling.max_tokens or self.context, self.context - prompt_tokens)
        finish: FinishReason = "length" if len(pieces) > limit else "stop"
        stream: TextStream[TokenLogprob] = TextStream(sampling.stop)
        count = 0
        for piece in pieces[:limit]:
            await asyncio.sleep(self.delay)
            count += 1
            text, notes = stream.push(piece, _logprob(piece, sampling.logprobs, stream.end))
            if stream.stopped:
                finish = "stop"
            elif count < min(len(pieces), limit):
                if text or notes:
                    yield Chunk(text, tuple(notes), None, prompt_tokens, count)
                continue
            else:
                rest, more = stream.flush()
                text, notes = text + rest, notes + more
            yield Chunk(text, tuple(notes), finish, prompt_tokens, count, _receipt(request, prompt_tokens + count))
            return
        yield Chunk("", (), finish, prompt_tokens, 0, _receipt(request, prompt_tokens))


def _logprob(piece: str, top: int | None, offset: int) -> TokenLogprob | None:
    if top is None:
        return None
    others = [piece, *(f" {w}" for w in WORDS if f" {w}" != piece)][: min(top, 20)]
    ranked = tuple(TopLogprob(t, list(t.encode()), math.log(0.5 ** (i + 1))) for i, t in enumerate(others))
    return TokenLogprob(piece, list(piece.encode()), math.log(0.5), ranked, offset)


def _receipt(request: Request, tokens: int) -> Receipt | None:
    if request.steering is None:
        return None
    terms = request.steering.terms
    layers = sorted({layer for term in terms for layer in (term.layers or (0,))})
    return Receipt(tuple(layers), tokens, sum(abs(t.strength) for t in terms) / 100)
