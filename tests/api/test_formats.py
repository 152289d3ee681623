"""Log-probabilities of text completions, where characters are spread over tokens."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator

import httpx
import pytest
from fastapi import FastAPI

from service.api.formats import ChatFormat
from service.api.generation import Collected
from service.api.schemas.generation import ChatMessage, ChatRequest
from service.engines.base import Chunk, EngineError, Receipt, Request, TokenLogprob, TopLogprob
from service.engines.fake import FakeEngine
from service.engines.text import TextStream

TOKENS = [b"a", b"\xe2\x96", b"\x81", b"\xc3", b"\xa9!", b"", b"\\ \xf0\x9f", b"\x98\x80", b"z"]
PIECES = ["a", "", "\u2581", "", "é!", "", "\\ ", "\U0001f600", "z"]
NAMES = ["a", r"bytes:\xe2\x96", r"bytes:\x81", r"bytes:\xc3", r"bytes:\xa9!", "", r"bytes:\x5c \xf0\x9f",
         r"bytes:\x98\x80", "z"]  # fmt: skip
OFFSETS = [0, 1, 1, 2, 2, 4, 4, 6, 7]


def text_of(data: bytes) -> str:
    return data.decode("utf-8", "replace")


class Bytes(FakeEngine):
    """Answers in tokens that are parts of characters, as a byte-level vocabulary does."""

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        stream: TextStream[TokenLogprob] = TextStream(request.sampling.stop)
        tops = tuple(TopLogprob(text_of(b), list(b), -1.0 - i) for i, b in enumerate((b"\xe2\x96", b"\xe2\x97", b"a")))
        for count, (data, piece) in enumerate(zip(TOKENS, PIECES, strict=True), 1):
            note = TokenLogprob(text_of(data), list(data), -0.5, tops, stream.end)
            text, notes = stream.push(piece, note)
            if stream.stopped or count == len(TOKENS):
                rest, more = ("", []) if stream.stopped else stream.flush()
                yield Chunk(text + rest, tuple(notes + more), "stop", 1, count)
                return
            if text or notes:
                yield Chunk(text, tuple(notes), None, 1, count)


@pytest.fixture
def engine() -> FakeEngine:
    return Bytes()


async def ask(client: httpx.AsyncClient, base: str, **more: object) -> list[dict[str, object]]:
    """The choice whole, then the choices of the stream joined."""
    body = {"model": base, "prompt": "x", "logprobs": 3, **more}
    whole = (await client.post("/v1/completions", json=body)).json()["choices"][0]
    text = ""
    fields: dict[str, list[object]] = {name: [] for name in whole["logprobs"]}
    for line in (await client.post("/v1/completions", json={**body, "stream": True})).text.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                text += choice["text"]
                for name, values in fields.items():
                    values += (choice["logprobs"] or {}).get(name, [])

    return [{"text": whole["text"], "logprobs": whole["logprobs"]}, {"text": text, "logprobs": fields}]


async def test_offsets_count_the_characters_of_the_text(app: FastAPI, client: httpx.AsyncClient, base: str) -> None:
    for choice in await ask(client, base):
        assert choice["text"] == "a\u2581é!\\ \U0001f600z"
        logprobs = choice["logprobs"]
        assert isinstance(logprobs, dict)
        assert logprobs["text_offset"] == OFFSETS
        assert logprobs["tokens"] == NAMES


async def test_alternatives_that_are_parts_of_characters_are_told_apart(
    app: FastAPI, client: httpx.AsyncClient, base: str
) -> None:
    for choice in await ask(client, base):
        logprobs = choice["logprobs"]
        assert isinstance(logprobs, dict)
        assert logprobs["top_logprobs"][0] == {r"bytes:\xe2\x96": -1.0, r"bytes:\xe2\x97": -2.0, "a": -3.0}


async def test_a_stop_string_leaves_offsets_inside_the_text(app: FastAPI, client: httpx.AsyncClient, base: str) -> None:
    for choice in await ask(client, base, stop=["!"]):
        logprobs = choice["logprobs"]
        assert choice["text"] == "a\u2581é" and isinstance(logprobs, dict)
        assert logprobs["text_offset"] == OFFSETS[:5]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("shift", [float("inf"), float("nan")])
def test_a_receipt_that_json_cannot_hold_is_an_error_in_words(stream: bool, shift: float) -> None:
    wanted = ChatRequest(model="m", messages=[ChatMessage(role="user", content="x")], stream=stream or None)
    form, receipt = ChatFormat(wanted), Receipt((1,), 3, shift)
    with pytest.raises(EngineError, match="lower the strength") as caught:
        if stream:
            form.closing(0, Chunk("", (), "stop", 1, 1, receipt))
        else:
            form.answer([Collected("x", [], "stop", 1, 1, receipt)])
    assert (caught.value.status, caught.value.code) == (400, "steering_too_strong")
