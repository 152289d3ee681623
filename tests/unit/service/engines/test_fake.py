"""The engine without a model obeys the rules that the API's tests lean on."""

from __future__ import annotations

import pytest

from service.engines.base import Chunk, Engine, EngineError, Message, Request, Sampling, Steering, SteeringTerm
from service.engines.fake import FakeEngine

PROMPT = (Message("user", "where is my box"),)


async def collect(engine: Engine, request: Request) -> list[Chunk]:
    return [chunk async for chunk in engine.generate(request)]


async def test_answers_are_a_function_of_the_request_alone() -> None:
    engine = FakeEngine()
    one = await collect(engine, Request("1", "m", PROMPT))
    two = await collect(engine, Request("2", "m", PROMPT))
    other = await collect(engine, Request("3", "m", PROMPT, adapter="a"))
    assert one == two != other
    assert [c.finish_reason for c in one] == [None] * (len(one) - 1) + ["stop"]
    assert one[-1].completion_tokens == 16 and one[-1].prompt_tokens == 4


async def test_stop_max_tokens_and_logprobs() -> None:
    engine = FakeEngine(lambda _: "one two three four")
    cut = await collect(engine, Request("1", "m", PROMPT, sampling=Sampling(stop=("two th",), logprobs=2)))
    assert "".join(c.text for c in cut) == "one " and cut[-1].finish_reason == "stop"
    assert [lp.token for c in cut for lp in c.logprobs] == ["one", " two"]
    assert all(len(lp.top) == 2 for c in cut for lp in c.logprobs)
    short = await collect(engine, Request("2", "m", PROMPT, sampling=Sampling(max_tokens=2)))
    assert "".join(c.text for c in short) == "one two" and short[-1].finish_reason == "length"


async def test_limits_and_receipts() -> None:
    engine = FakeEngine(context=10, max_requests=1)
    with pytest.raises(EngineError) as long:
        await collect(engine, Request("1", "m", "w " * 9, sampling=Sampling(max_tokens=5)))
    assert (long.value.status, long.value.code) == (400, "context_length_exceeded")
    assert "10" in long.value.message and "14" in long.value.message
    with pytest.raises(EngineError) as nothing:
        await collect(engine, Request("1", "m", PROMPT, steering=Steering((SteeringTerm("v", 0.0),))))
    assert nothing.value.status == 422
    steered = await collect(engine, Request("1", "m", PROMPT, steering=Steering((SteeringTerm("v", 2.0, (1,)),))))
    assert steered[-1].receipt is not None and steered[-1].receipt.layers == (1,)
    assert all(c.receipt is None for c in steered[:-1])


async def test_closing_frees_the_row_and_a_full_queue_says_when_to_come_back() -> None:
    engine = FakeEngine(max_requests=1)
    stream = engine.generate(Request("1", "m", PROMPT))
    await anext(stream)
    with pytest.raises(EngineError) as full:
        await collect(engine, Request("2", "m", PROMPT))
    assert full.value.status == 429 and full.value.retry_after == 1
    await stream.aclose()
    assert engine.active == set() and engine.cancelled == ["1"]
    assert (await collect(engine, Request("3", "m", PROMPT)))[-1].finish_reason == "stop"
