"""Through the real child process: the same answers, and nothing left behind by clients that leave or by its death."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from service.engines.base import Chunk, Engine, EngineError, Message, Request, Sampling, Steering, SteeringTerm
from service.engines.options import EngineOptions
from service.engines.transformers_engine import TransformersEngine
from tests.unit.service.engines.conftest import Kit, run

pytestmark = pytest.mark.asyncio(loop_scope="module")

OPTIONS = EngineOptions(threads=1, rows=6, waiting=4, start_seconds=90)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(llama: Kit, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[TransformersEngine]:
    made = TransformersEngine(llama.base, replace(OPTIONS, log_directory=tmp_path_factory.mktemp("log")))
    yield made
    await made.close()


async def collect(engine: Engine, request: Request) -> list[Chunk]:
    return [chunk async for chunk in engine.generate(request)]


async def idle(engine: TransformersEngine) -> dict[str, int]:
    """Counts of the child once it has nothing to do."""
    for _ in range(500):
        stats = await engine.health()
        if not stats["rows"] and not stats["waiting"] and not stats["prefilling"]:
            return stats
        await asyncio.sleep(0.01)
    raise AssertionError(f"the child is not idle: {stats}")


def chat(kit: Kit, name: str, text: str = "Where is my parcel?", **kwargs: object) -> Request:
    return replace(kit.request(name, ""), prompt=(Message("developer", "Be kind."), Message("user", text)), **kwargs)


async def test_a_mixed_batch_through_the_process_equals_the_batch_in_memory(
    engine: TransformersEngine, llama: Kit
) -> None:
    steering = Steering((SteeringTerm(llama.vector, 2.0),))
    kinds: list[dict[str, object]] = [{}, {"adapter": llama.adapters[0]}, {"steering": steering}]
    kinds.append({"sampling": Sampling(temperature=1.0, seed=4, max_tokens=9, top_p=0.9, logprobs=0)})
    requests = [chat(llama, str(i), **kind) for i, kind in enumerate(kinds)]
    answers = await asyncio.gather(*(collect(engine, r) for r in requests))
    here = run(llama.scheduler(), requests)
    for request, chunks in zip(requests, answers, strict=True):
        alone = here[request.id].chunks
        assert "".join(c.text for c in chunks) == here[request.id].text
        assert [(c.finish_reason, c.prompt_tokens, c.completion_tokens) for c in chunks] == [
            (c.finish_reason, c.prompt_tokens, c.completion_tokens) for c in alone
        ]
        got = [lp.logprob for c in chunks for lp in c.logprobs]
        assert got == pytest.approx(here[request.id].logprobs, abs=1e-4)
    receipt = answers[2][-1].receipt
    assert receipt is not None and receipt.layers == (0, 1) and receipt.mean_relative_shift > 0
    assert all(c[-1].receipt is None for i, c in enumerate(answers) if i != 2)


async def test_errors_arrive_before_the_first_chunk(engine: TransformersEngine, llama: Kit) -> None:
    vector = SteeringTerm(llama.vector, 1.0)
    cases: list[tuple[Request, int, str]] = [
        (chat(llama, "long", "word " * 3000), 400, "context_length_exceeded"),
        (chat(llama, "zero", steering=Steering((replace(vector, strength=0.0),))), 422, "steering_touches_nothing"),
        (
            chat(llama, "nan", steering=Steering((replace(vector, strength=float("nan")),))),
            400,
            "steering_bad_strength",
        ),
        (chat(llama, "deep", steering=Steering((replace(vector, layers=(7,)),))), 400, "steering_layer_out_of_range"),
        (chat(llama, "gone", steering=Steering((replace(vector, path="/nowhere"),))), 400, "vector_not_found"),
        (chat(llama, "lost", adapter="/nowhere"), 400, "model_not_found"),
        (replace(chat(llama, "tool"), prompt=(Message("tool", "x"),)), 400, "chat_template_error"),
    ]
    for request, status, code in cases:
        with pytest.raises(EngineError) as caught:
            await collect(engine, request)
        assert (caught.value.status, caught.value.code) == (status, code), request.id
    assert (await collect(engine, chat(llama, "fine")))[-1].finish_reason is not None


async def test_clients_that_leave_free_their_rows(engine: TransformersEngine, llama: Kit) -> None:
    sampling = Sampling(temperature=1.0, max_tokens=900)

    async def leave(i: int) -> None:
        async with aclosing(engine.generate(chat(llama, f"leave-{i}", sampling=replace(sampling, seed=i)))) as chunks:
            for _ in range(3):
                await anext(chunks)

    for start in range(0, 100, 10):
        await asyncio.gather(*(leave(i) for i in range(start, start + 10)))
    stats = await idle(engine)
    assert stats["cache_bytes"] == 0 and engine.in_flight == 0
    assert engine.child is not None and engine.child.inboxes == {}


async def test_a_full_queue_answers_at_once_with_429(engine: TransformersEngine, llama: Kit) -> None:
    sampling = Sampling(temperature=0, max_tokens=800)
    streams = [engine.generate(chat(llama, f"q{i}", sampling=sampling)) for i in range(10)]
    tasks = [asyncio.create_task(anext(s)) for s in streams]
    await asyncio.sleep(0)
    with pytest.raises(EngineError) as full:
        anext(engine.generate(chat(llama, "one too many"))).send(None)  # refused without waiting for anything
    assert full.value.status == 429 and full.value.retry_after is not None and full.value.retry_after >= 1
    await asyncio.gather(*tasks[:6])
    for task, stream in zip(tasks, streams, strict=True):
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await stream.aclose()
    await idle(engine)


async def test_a_killed_child_fails_what_is_in_flight_and_the_next_request_starts_another(
    engine: TransformersEngine, llama: Kit
) -> None:
    await collect(engine, chat(llama, "first"))
    assert engine.child is not None
    child, starts = engine.child, engine.starts
    pid = child.process.pid
    stream = engine.generate(chat(llama, "cut", sampling=Sampling(temperature=0, max_tokens=900)))
    await anext(stream)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineError) as cut:
        async for _ in stream:
            pass
    assert cut.value.status == 503 and cut.value.retry_after is not None
    with pytest.raises(EngineError) as late:
        child.submit(chat(llama, "late"))
    assert late.value.status == 503
    assert (await collect(engine, chat(llama, "again")))[-1].finish_reason is not None
    assert engine.starts == starts + 1 and not psutil.pid_exists(pid)


async def test_what_is_no_model_is_refused_and_a_slow_start_times_out(tmp_path: Path, llama: Kit) -> None:
    refused = TransformersEngine(str(tmp_path), replace(OPTIONS, log_directory=tmp_path / "log"))
    with pytest.raises(EngineError) as no_model:
        await collect(refused, Request("1", str(tmp_path), "hello"))
    assert (no_model.value.status, no_model.value.code) == (400, "model_not_usable")
    slow = TransformersEngine(llama.base, replace(OPTIONS, start_seconds=0.3))
    with pytest.raises(EngineError) as late:
        await collect(slow, Request("2", llama.base, "hello"))
    assert late.value.status == 503 and late.value.retry_after is not None and "0.3 s" in late.value.message
    for engine in (refused, slow):
        assert engine.child is None
        await engine.close()


PARENT = """
import asyncio, sys
from service.engines.base import Request
from service.engines.options import EngineOptions
from service.engines.transformers_engine import TransformersEngine

async def main():
    engine = TransformersEngine(sys.argv[1], EngineOptions(threads=1))
    stream = engine.generate(Request("1", sys.argv[1], "hello"))
    await anext(stream)
    assert "torch" not in sys.modules
    print(engine.child.process.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_the_child_ends_with_its_parent_and_the_parent_never_imports_torch(llama: Kit) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, llama.base], stdout=subprocess.PIPE, text=True)
    with parent:
        assert parent.stdout is not None
        pid = int(await asyncio.to_thread(parent.stdout.readline))
        parent.kill()
    child_gone = time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < child_gone, "the child outlived its parent"
        await asyncio.sleep(0.02)
