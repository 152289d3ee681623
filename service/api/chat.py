"""`/v1/chat/completions` and `/v1/completions`: OpenAI's wire in front of an engine."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any
from uuid import uuid4

from anyio import to_thread
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from service.api import generation, streams
from service.api.deps import needs
from service.api.docs import errors_of
from service.api.drain import Draining
from service.api.errors import bad_request, body, busy, engine_body
from service.api.generation import Collected, Observed
from service.api.resolve import Target, steering, target
from service.api.schemas.generation import ChatCompletion, ChatRequest, Completion, CompletionRequest, GenerationRequest
from service.engines.base import Chunk, EngineError, Message, Sampling, Steering, TokenLogprob
from service.log import logger

log = logger(__name__)
router = APIRouter(tags=["generation"])

Item = tuple[int, Chunk] | None
Source = AsyncGenerator[Item, None]
_STREAM = {"text/event-stream": {"schema": {"type": "string"}}}
COMPLETION_TOKENS = 16
"""OpenAI's default length of `/v1/completions`."""


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses={200: {"content": _STREAM}, **errors_of(400, 404, 409, 422, 429, 503)},
)
@needs("generate")
async def chat_completions(request: Request, wanted: ChatRequest) -> Response:
    """Answer a chat, whole or as a stream of `chat.completion.chunk` events, steered if asked."""
    prompt = tuple(
        Message("system" if message.role == "developer" else message.role, message.text) for message in wanted.messages
    )
    how = generation.sampling(
        wanted,
        max_tokens=wanted.max_completion_tokens or wanted.max_tokens,
        logprobs=(wanted.top_logprobs or 0) if wanted.logprobs else None,
    )
    return await _answer(request, wanted, prompt, how, _Chat(wanted))


@router.post(
    "/v1/completions",
    response_model=Completion,
    responses={200: {"content": _STREAM}, **errors_of(400, 404, 409, 422, 429, 503)},
)
@needs("generate")
async def completions(request: Request, wanted: CompletionRequest) -> Response:
    """Go on from a text, without a chat template, whole or as a stream."""
    how = generation.sampling(
        wanted,
        max_tokens=COMPLETION_TOKENS if wanted.max_tokens is None else wanted.max_tokens,
        logprobs=wanted.logprobs,
    )
    prompt = wanted.prompt if isinstance(wanted.prompt, str) else wanted.prompt[0]
    return await _answer(request, wanted, prompt, how, _Text(wanted))


class _Format:
    """How a generation looks on the wire; one value a request."""

    prefix = ""
    whole = ""
    part = ""

    def __init__(self, wanted: GenerationRequest) -> None:
        self.model = wanted.model
        self.usage = wanted.stream_options is not None and wanted.stream_options.include_usage
        self.id = f"{self.prefix}{uuid4().hex}"
        self.created = int(time.time())

    def envelope(self, kind: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": list(choices)}

    def answer(self, collected: Sequence[Collected]) -> dict[str, Any]:
        choices = [self._settled(index, choice) for index, choice in enumerate(collected)]
        return {**self.envelope(self.whole, choices), "usage": generation.usage(collected).model_dump()}

    def _settled(self, index: int, choice: Collected) -> dict[str, Any]:
        made = {"index": index, **self.full(choice), "finish_reason": choice.finish_reason}
        receipt = generation.receipt(choice.receipt)
        return made if receipt is None else {**made, "steering": receipt.model_dump()}

    def full(self, choice: Collected) -> dict[str, Any]:
        """The choice's text and log-probabilities."""
        raise AssertionError("a format defines this")

    def opening(self, index: int) -> list[dict[str, Any]]:
        """What a stream says about a choice before its first text."""
        raise AssertionError("a format defines this")

    def delta(self, index: int, chunk: Chunk) -> dict[str, Any]:
        """New text of a choice."""
        raise AssertionError("a format defines this")

    def closing(self, index: int, chunk: Chunk) -> dict[str, Any]:
        """The choice's last word, with the receipt."""
        empty = Chunk("", (), chunk.finish_reason)
        receipt = generation.receipt(chunk.receipt)
        last = {**self.delta(index, empty), "finish_reason": chunk.finish_reason}
        return last if receipt is None else {**last, "steering": receipt.model_dump()}


class _Chat(_Format):
    prefix, whole, part = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, wanted: ChatRequest) -> None:
        super().__init__(wanted)
        self.logprobs = bool(wanted.logprobs)

    def full(self, choice: Collected) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(choice.logprobs)}

    def opening(self, index: int) -> list[dict[str, Any]]:
        first = {"role": "assistant", "content": "", "refusal": None}
        return [{"index": index, "delta": first, "logprobs": None, "finish_reason": None}]

    def delta(self, index: int, chunk: Chunk) -> dict[str, Any]:
        delta = {"content": chunk.text} if chunk.text or chunk.logprobs else {}
        logprobs = self._logprobs(chunk.logprobs) if chunk.logprobs else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        content = [
            {
                "token": token.token,
                "bytes": token.bytes,
                "logprob": token.logprob,
                "top_logprobs": [{"token": t.token, "bytes": t.bytes, "logprob": t.logprob} for t in token.top],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}


class _Text(_Format):
    prefix, whole, part = "cmpl-", "text_completion", "text_completion"

    def __init__(self, wanted: CompletionRequest) -> None:
        super().__init__(wanted)
        self.logprobs = wanted.logprobs is not None
        self.offsets: dict[int, int] = {}

    def full(self, choice: Collected) -> dict[str, Any]:
        return {"text": choice.text, "logprobs": self._logprobs(choice.logprobs, 0)[0]}

    def opening(self, index: int) -> list[dict[str, Any]]:
        return []

    def delta(self, index: int, chunk: Chunk) -> dict[str, Any]:
        logprobs, self.offsets[index] = self._logprobs(chunk.logprobs, self.offsets.get(index, 0))
        return {"index": index, "text": chunk.text, "logprobs": logprobs, "finish_reason": None}

    def _logprobs(self, tokens: Sequence[TokenLogprob], offset: int) -> tuple[dict[str, Any] | None, int]:
        if not self.logprobs:
            return None, offset
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token.token)
        made = {
            "tokens": [token.token for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{t.token: t.logprob for t in token.top} for token in tokens],
            "text_offset": offsets,
        }
        return made, offset


def _resolve(request: Request, wanted: GenerationRequest) -> tuple[Target, Steering | None]:
    state = request.app.state
    found = target(state.db, state.settings.home, wanted.model)
    return found, None if wanted.steering is None else steering(state.db, wanted.steering, found)


async def _answer(
    request: Request, wanted: GenerationRequest, prompt: tuple[Message, ...] | str, how: Sampling, form: _Format
) -> Response:
    state = request.app.state
    draining: Draining = state.draining
    if draining.begun.is_set():
        raise busy("The server is stopping; send the request again.", seconds=5, code="server_stopping")
    count, most = wanted.n or 1, state.settings.limits.choices
    if count > most:
        raise bad_request(f"n may be at most {most} here.", param="n")
    model, spec = await to_thread.run_sync(_resolve, request, wanted)
    asked = generation.requests(count, model, prompt, how, spec)
    source = generation.watched(
        generation.choices(state.engine, asked, draining), Observed(state.metrics, spec is not None)
    )
    if wanted.stream:

        def render(items: Source) -> AsyncGenerator[bytes, None]:
            return _events(items, form, count)

        return await streams.primed(source, render)
    collected = await generation.unless_left(request, generation.collect(source, count))
    return JSONResponse(form.answer(collected))


async def _events(items: Source, form: _Format, count: int) -> AsyncGenerator[bytes, None]:
    """The wire's stream; an error in the middle is its last event, since the status is out already."""
    opened: set[int] = set()
    totals = [Collected() for _ in range(count)]

    def chunk_event(choice: dict[str, Any]) -> bytes:
        data = form.envelope(form.part, [choice])
        return streams.event({**data, "usage": None} if form.usage else data)

    try:
        async with aclosing(items):
            async for item in items:
                if item is None:
                    yield streams.PING
                    continue
                index, chunk = item
                totals[index].prompt_tokens = chunk.prompt_tokens
                totals[index].completion_tokens = chunk.completion_tokens
                if index not in opened:
                    opened.add(index)
                    for first in form.opening(index):
                        yield chunk_event(first)
                if chunk.text or chunk.logprobs:
                    yield chunk_event(form.delta(index, chunk))
                if chunk.finish_reason is not None:
                    yield chunk_event(form.closing(index, chunk))
    except EngineError as error:
        yield streams.event(engine_body(error))
        return
    except Exception as error:
        log.error("stream_failed", exc_info=error)
        message = "The server failed in the middle of this answer; its log has the cause under the request's id."
        yield streams.event(body(500, message, code="internal_error", param=None))
        return
    if form.usage:
        yield streams.event({**form.envelope(form.part, []), "usage": generation.usage(totals).model_dump()})
    yield streams.DONE
