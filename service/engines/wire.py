"""What travels between the service and an engine's process: frames of JSON, each after its length. No pickle, no torch.

To the child: ``{"op": "generate", "request": {...}}``, ``{"op": "cancel", "id": "..."}``.
To the parent: one ``{"op": "ready", ...}`` or ``{"op": "failed", "message": "..."}``, then
``{"op": "events", "events": [...], "stats": {...}}`` where an event is ``{"id", "chunk"}`` or ``{"id", "error"}``.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict
from typing import Any

from service.engines.base import (
    Chunk,
    EngineError,
    Message,
    Receipt,
    Request,
    Sampling,
    Steering,
    SteeringTerm,
    TokenLogprob,
    TopLogprob,
)

HEAD = struct.Struct(">I")
LIMIT = 64 << 20  # bytes of one frame


def frame(message: dict[str, Any]) -> bytes:
    """A message as bytes.

    Args:
        message: anything that JSON can say.

    Returns:
        Four bytes of length, big-endian, then JSON in ASCII.

    Raises:
        ValueError: if it is longer than ``LIMIT``.
    """
    body = json.dumps(message, separators=(",", ":")).encode("ascii")
    if len(body) > LIMIT:
        raise ValueError(f"the message has {len(body)} bytes, the most allowed is {LIMIT}")
    return HEAD.pack(len(body)) + body


def length(head: bytes) -> int:
    """The body's length.

    Args:
        head: a frame's first four bytes.

    Returns:
        Bytes that follow.

    Raises:
        ValueError: if it is more than ``LIMIT``.
    """
    size: int = HEAD.unpack(head)[0]
    if size > LIMIT:
        raise ValueError(f"a frame of {size} bytes was announced, the most allowed is {LIMIT}")
    return size


def request_to_json(request: Request) -> dict[str, Any]:
    """A request as plain data."""
    return asdict(request)


def request_from_json(data: dict[str, Any]) -> Request:
    """The inverse of ``request_to_json``, after JSON made lists of the tuples."""
    prompt, steering, sampling = data["prompt"], data["steering"], data["sampling"]
    return Request(
        id=data["id"],
        base=data["base"],
        adapter=data["adapter"],
        prompt=prompt if isinstance(prompt, str) else tuple(Message(**m) for m in prompt),
        sampling=Sampling(**sampling | {"stop": tuple(sampling["stop"])}),
        steering=None if steering is None else _steering(steering),
    )


def chunk_to_json(chunk: Chunk) -> dict[str, Any]:
    """A chunk as plain data, without what is empty: one travels for every token."""
    data: dict[str, Any] = {"n": [chunk.prompt_tokens, chunk.completion_tokens]}
    if chunk.text:
        data["text"] = chunk.text
    if chunk.logprobs:
        data["logprobs"] = [asdict(lp) for lp in chunk.logprobs]
    if chunk.finish_reason is not None:
        data["finish"] = chunk.finish_reason
    if chunk.receipt is not None:
        data["receipt"] = asdict(chunk.receipt)
    return data


def chunk_from_json(data: dict[str, Any]) -> Chunk:
    """The inverse of ``chunk_to_json``."""
    receipt = data.get("receipt")
    return Chunk(
        text=data.get("text", ""),
        logprobs=tuple(
            TokenLogprob(**lp | {"top": tuple(TopLogprob(**top) for top in lp["top"])})
            for lp in data.get("logprobs", ())
        ),
        finish_reason=data.get("finish"),
        prompt_tokens=data["n"][0],
        completion_tokens=data["n"][1],
        receipt=None if receipt is None else Receipt(**receipt | {"layers": tuple(receipt["layers"])}),
    )


def error_to_json(error: EngineError) -> dict[str, Any]:
    """An error as plain data."""
    names = ("status", "code", "message", "param", "retry_after")
    return {name: getattr(error, name) for name in names}


def error_from_json(data: dict[str, Any]) -> EngineError:
    """The inverse of ``error_to_json``; subclasses become ``EngineError`` with the same fields."""
    return EngineError(
        data["status"], data["code"], data["message"], param=data["param"], retry_after=data["retry_after"]
    )


def _steering(data: dict[str, Any]) -> Steering:
    terms = []
    for term in data["terms"]:
        layers = term["layers"]
        terms.append(SteeringTerm(**term | {"layers": None if layers is None else tuple(layers)}))
    return Steering(tuple(terms), data["preserve_norm"])
