"""`/v1/chat/completions` and `/v1/completions`: OpenAI's wire in front of an engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from service.api import generation, streams
from service.api.deps import needs
from service.api.docs import SSE, errors_of
from service.api.drain import Draining
from service.api.errors import bad_request, body, busy, engine_body
from service.api.formats import ChatFormat, Format, TextFormat
from service.api.generation import Collected, Observed
from service.api.resolve import Target, steering, target
from service.api.schemas.generation import ChatCompletion, ChatRequest, Completion, CompletionRequest, GenerationRequest
from service.api.shape import BoundedRoute
from service.engines.base import Chunk, EngineError, Message, Sampling, Steering
from service.log import logger

log = logger(__name__)
router = APIRouter(tags=["generation"], route_class=BoundedRoute)

Item = tuple[int, Chunk] | None
Source = AsyncGenerator[Item, None]
COMPLETION_TOKENS = 16
"""OpenAI's default length of `/v1/completions`."""


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses={200: {"content": SSE}, **errors_of(400, 404, 409, 422, 429, 503)},
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
    return await _answer(request, wanted, prompt, how, ChatFormat(wanted))


@router.post(
    "/v1/completions",
    response_model=Completion,
    responses={200: {"content": SSE}, **errors_of(400, 404, 409, 422, 429, 503)},
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
    return await _answer(request, wanted, prompt, how, TextFormat(wanted))


def _resolve(request: Request, wanted: GenerationRequest) -> tuple[Target, Steering | None]:
    state = request.app.state
    found = target(state.db, state.settings.home, wanted.model)
    return found, None if wanted.steering is None else steering(state.db, wanted.steering, found)


async def _answer(
    request: Request, wanted: GenerationRequest, prompt: tuple[Message, ...] | str, how: Sampling, form: Format
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

        return await streams.primed(request, source, render)
    collected = await generation.unless_left(request, generation.collect(source, count))
    return JSONResponse(form.answer(collected))


async def _events(items: Source, form: Format, count: int) -> AsyncGenerator[bytes, None]:
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
