"""What is sent arrives: requests, chunks and errors survive the JSON between the processes."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engines import base, wire

TEXT = st.text(max_size=10)
FLOATS = st.floats(allow_nan=False)
LOGPROBS = st.builds(
    base.TokenLogprob,
    TEXT,
    st.lists(st.integers(0, 255), max_size=3),
    FLOATS,
    st.lists(st.builds(base.TopLogprob, TEXT, st.lists(st.integers(0, 255), max_size=3), FLOATS), max_size=2).map(
        tuple
    ),
    st.integers(0, 9),
)
LAYERS = st.lists(st.integers(0, 40), max_size=3).map(tuple)
CHUNKS = st.builds(
    base.Chunk,
    TEXT,
    st.lists(LOGPROBS, max_size=2).map(tuple),
    st.sampled_from([None, "stop", "length"]),
    st.integers(0, 9),
    st.integers(0, 9),
    st.none() | st.builds(base.Receipt, LAYERS, st.integers(0, 9), FLOATS),
)
STEERING = st.builds(
    base.Steering,
    st.lists(
        st.builds(base.SteeringTerm, TEXT, FLOATS, st.none() | LAYERS, st.sampled_from(["all", "prompt", "generated"])),
        max_size=2,
    ).map(tuple),
    st.booleans(),
)
REQUESTS = st.builds(
    base.Request,
    TEXT,
    TEXT,
    TEXT | st.lists(st.builds(base.Message, TEXT, TEXT), max_size=2).map(tuple),
    st.none() | TEXT,
    st.builds(base.Sampling, seed=st.none() | st.integers(), stop=st.lists(TEXT, max_size=2).map(tuple)),
    st.none() | STEERING,
)


def through(data: dict[str, object]) -> dict[str, object]:
    framed = wire.frame(data)
    assert wire.length(framed[: wire.HEAD.size]) == len(framed) - wire.HEAD.size
    back = json.loads(framed[wire.HEAD.size :])
    assert isinstance(back, dict)
    return back


@given(REQUESTS)
def test_requests(request: base.Request) -> None:
    assert wire.request_from_json(through(wire.request_to_json(request))) == request


@given(CHUNKS)
def test_chunks(chunk: base.Chunk) -> None:
    assert wire.chunk_from_json(through(wire.chunk_to_json(chunk))) == chunk


def test_errors_and_nan_strengths() -> None:
    error = base.ContextLengthExceeded(100, 90, 20)
    back = wire.error_from_json(through(wire.error_to_json(error)))
    assert (back.status, back.code, back.message, back.param) == (400, error.code, error.message, "messages")
    busy = wire.error_from_json(through(wire.error_to_json(base.EngineBusy("full", retry_after=7))))
    assert busy.retry_after == 7
    strength = base.Request("1", "b", "p", steering=base.Steering((base.SteeringTerm("v", math.nan),)))
    arrived = wire.request_from_json(through(wire.request_to_json(strength)))
    assert arrived.steering is not None and math.isnan(arrived.steering.terms[0].strength)


def test_a_frame_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="most allowed"):
        wire.length(b"\xff\xff\xff\xff")
    with pytest.raises(ValueError, match="most allowed"):
        wire.frame({"text": "x" * wire.LIMIT})


def test_the_service_side_never_imports_torch() -> None:
    code = (
        "import sys, service.engines.pool, service.engines.fake\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
