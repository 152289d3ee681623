"""Prompts are encoded beside the batch, once for all that share them, and not at all for who has left."""

from __future__ import annotations

import asyncio
import os
import queue
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.data.chat import TooLong, prompt_ids, text_prompt_ids
from service.engines import encoder as module
from service.engines import wire
from service.engines.base import BadRequest, Message, Sampling
from service.engines.encoder import Encoder
from service.engines.options import EngineOptions
from service.engines.prompts import encode
from service.engines.scheduler import Scheduler
from service.engines.transformers_engine import TransformersEngine
from service.engines.worker import take
from tests.unit.service.engines.conftest import Kit


@pytest.fixture
def made(llama: Kit, monkeypatch: pytest.MonkeyPatch) -> tuple[Encoder, queue.SimpleQueue[dict[str, Any]], list[Any]]:
    """An encoder without its thread, its inbox, and the prompts that it has encoded."""
    inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    encoder, seen = Encoder(inbox), []
    encoder._tokenizer, encoder._context = llama.loaded.tokenizer, 1024

    def encoding(request: Any, *args: Any) -> list[int]:
        seen.append(request.prompt)
        return encode(request, *args)

    monkeypatch.setattr(module, "encode", encoding)
    return encoder, inbox, seen


def ask(kit: Kit, name: str, prompt: Any) -> dict[str, Any]:
    request = replace(kit.request(name, ""), prompt=prompt)
    return {"op": "generate", "request": wire.request_to_json(request)}


def test_choices_of_one_request_are_encoded_once(llama: Kit, made: Any) -> None:
    encoder, _, seen = made
    prompt = (Message("user", "hello"),)
    answers = [encoder.encode(ask(llama, str(i), prompt)) for i in range(5)]
    assert len(seen) == 1
    assert all(a["prompt"] == prompt_ids(prompt, llama.loaded.tokenizer) for a in answers)
    answers[0]["prompt"].append(3)
    assert answers[1]["prompt"] == encoder.encode(ask(llama, "6", prompt))["prompt"], "each has a list of its own"
    other = encoder.encode(ask(llama, "7", (Message("user", "bye"),)))["prompt"]
    assert other != answers[1]["prompt"] and len(seen) == 2


@pytest.mark.parametrize("when", ["before it is encoded", "after"])
def test_who_leaves_is_never_submitted(llama: Kit, made: Any, when: str) -> None:
    encoder, _, seen = made
    scheduler: Scheduler = llama.scheduler()
    events: list[Any] = []
    message = ask(llama, "1", "hello")
    encoder.put(message)
    encoded = encoder.encode(message) if when == "after" else None
    take(scheduler, encoder, {"op": "cancel", "id": "1"}, events)
    encoded = encoded or encoder.encode(message)
    take(scheduler, encoder, encoded, events)
    assert not scheduler.busy and not events and len(seen) == (when == "after")
    encoder.put(message)
    take(scheduler, encoder, encoder.encode(message), events)
    assert [s.id for s in scheduler.waiting] == ["1"], "the same name may come again"
    take(scheduler, encoder, {"op": "cancel", "id": "1"}, events)
    assert not scheduler.busy, "what is in the batch is cancelled there"


def test_an_error_is_the_requests_answer(llama: Kit, made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, _, _ = made
    events: list[Any] = []
    scheduler = llama.scheduler()
    take(scheduler, encoder, encoder.encode(ask(llama, "1", "")), events)
    monkeypatch.setattr(module, "encode", lambda *_: 1 / 0)
    take(scheduler, encoder, encoder.encode(ask(llama, "2", "hello")), events)
    assert [(name, error.status) for name, error in events] == [("1", 400), ("2", 503)] and not scheduler.busy


class Counting:
    """A tokenizer that adds up what it is given."""

    def __init__(self, real: Any) -> None:
        self._real, self.characters = real, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __call__(self, text: str, **kwargs: Any) -> Any:
        self.characters += len(text)
        return self._real(text, **kwargs)


def test_a_prompt_that_cannot_fit_is_not_tokenized_to_its_end(llama: Kit) -> None:
    tokenizer = Counting(llama.loaded.tokenizer)
    text = "word " * 200_000
    for prompt in (text, (Message("user", text),)):
        tokenizer.characters = 0
        with pytest.raises(
            BadRequest, match=r"maximum context length is 1024 tokens, but you asked for more than"
        ) as e:
            encode(replace(llama.request("1", ""), prompt=prompt), tokenizer, 1024)
        assert e.value.code == "context_length_exceeded" and tokenizer.characters < 10_000


def test_a_prompt_of_long_tokens_is_tokenized_to_its_end(llama: Kit) -> None:
    tokenizer = llama.loaded.tokenizer
    piece = max((tokenizer.decode([i]) for i in range(len(tokenizer))), key=len)
    text = piece * (20_000 // len(piece))
    whole = text_prompt_ids(text, tokenizer)
    assert text_prompt_ids(text, tokenizer, most=len(whole)) == whole
    with pytest.raises(TooLong):
        text_prompt_ids(text, tokenizer, most=len(whole) // 8)


async def test_streams_go_on_while_another_prompt_is_encoded(
    llama: Kit, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A tokenizer that takes two seconds for one prompt, in the engine's own process.
    slow = (
        "import time\nfrom service.engines import encoder\nreal = encoder.encode\n"
        "def encode(request, *rest):\n"
        "    if request.prompt == 'slow':\n        time.sleep(2)\n"
        "    return real(request, *rest)\n"
        "encoder.encode = encode\n"
    )
    (tmp_path / "sitecustomize.py").write_text(slow)
    root = Path(module.__file__).parents[2]  # on the path already when the process looks for its sitecustomize
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{root}")
    engine = TransformersEngine(llama.base, EngineOptions(threads=1))
    try:
        sampling = Sampling(temperature=0, max_tokens=500, logprobs=0)
        stream = engine.generate(replace(llama.request("1", "hello"), sampling=sampling))
        await anext(stream)
        began = time.monotonic()
        other = asyncio.create_task(anext(engine.generate(llama.request("2", "slow"))))
        async for _ in stream:
            if time.monotonic() - began > 1.5:
                break
        assert not other.done() and time.monotonic() - began < 1.9, "the stream did not wait for the other's prompt"
        await other
        assert time.monotonic() - began > 1.9, "which did take its time"
    finally:
        await engine.close()
