"""Rows whose numbers overflow, and rows whose client leaves while prompts are read."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from service.engines.base import Chunk, EngineError, Receipt, Sampling, Steering, SteeringTerm
from service.engines.scheduler import Event
from steering.shift import relative_shift
from steering.vector import SteeringVector
from tests.unit.service.engines.conftest import Kit, run


def test_a_finite_vector_gives_a_finite_receipt(llama: Kit, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    directions = {1: torch.randn(64, generator=generator) * 1e20}
    about = {"site": "block", "fingerprint": llama.loaded.fingerprint, "base": str(llama.loaded.ref), "method": "test"}
    SteeringVector(directions=directions, data_hash="sha256:0", **about).save(tmp_path / "v.safetensors")
    request = llama.request("1", "hello", steering=Steering((SteeringTerm(str(tmp_path / "v.safetensors"), 1.0),)))
    last = run(llama.scheduler(), [request])["1"].chunks[-1]
    assert last.receipt is not None
    assert math.isfinite(last.receipt.mean_relative_shift) and last.receipt.mean_relative_shift > 1e18


def test_the_shift_of_any_finite_output_is_finite() -> None:
    largest = torch.finfo(torch.float32).max / 2  # the difference is one too
    before = torch.stack([torch.zeros(64), torch.full((64,), -largest), torch.ones(64)])
    after = torch.stack([torch.full((64,), largest), torch.full((64,), largest), torch.full((64,), 3.0)])
    shift = relative_shift(before, after)
    assert shift.isfinite().all() and shift[1] == 2 and shift[2] == 2


@pytest.mark.parametrize("shift", [math.inf, math.nan])
@pytest.mark.parametrize("tokens", [1, 4])
def test_a_receipt_that_is_no_number_is_an_error_of_its_request_alone(
    llama: Kit, monkeypatch: pytest.MonkeyPatch, shift: float, tokens: int
) -> None:
    from steering.apply import RowState

    monkeypatch.setattr(RowState, "receipt", lambda _state: Receipt((1,), 1, shift))
    sampling = Sampling(temperature=0, max_tokens=tokens)
    steered = llama.request("s", "hello", sampling=sampling, steering=Steering((SteeringTerm(llama.vector, 1.0),)))
    answers = run(llama.scheduler(), [steered, llama.request("plain", "hello", sampling=sampling)])
    error = answers["s"].error
    assert error is not None and (error.status, error.code) == (400, "steering_too_strong")
    assert not any(chunk.finish_reason for chunk in answers["s"].chunks), "an error is a request's last word"
    assert answers["plain"].error is None and answers["plain"].chunks[-1].finish_reason == "length"


def test_a_row_that_was_being_read_while_another_broke_meets_nothing_of_it(llama: Kit) -> None:
    sampling = Sampling(temperature=0, max_tokens=40, logprobs=0)
    keep = llama.request("keep", "where is my parcel " * 20, sampling=sampling)
    later = llama.request("later", "one two three four " * 3, sampling=sampling)
    alone = run(llama.scheduler(prefill_tokens=4), [later])["later"]
    scheduler = llama.scheduler(prefill_tokens=4)
    for request in (keep, llama.request("breaks", "the order is late " * 12, sampling=sampling)):
        scheduler.submit(request)
        while not any(row.id == request.id for row in scheduler.running):
            scheduler.step()
    scheduler.submit(later)
    scheduler.step()
    assert scheduler._prefill is not None, "its prompt takes several steps"
    row = [one.id for one in scheduler.running].index("breaks")
    with torch.inference_mode():
        for buffer in (*scheduler._cache._keys, *scheduler._cache._values):
            assert buffer is not None
            buffer[row, :, : scheduler._cache.lengths[row]] = torch.nan
    events: list[Event] = []
    while any(one.id == "breaks" for one in scheduler.running):
        events += scheduler.step()
    assert scheduler._prefill is not None, "nothing was admitted, and so trimmed, meanwhile"
    while scheduler.busy:
        events += scheduler.step()
    assert [name for name, what in events if isinstance(what, EngineError)] == ["breaks"]
    said = [what.text for name, what in events if name == "later" and isinstance(what, Chunk)]
    assert "".join(said) == alone.text


@pytest.mark.parametrize("running", [False, True])
def test_a_client_that_leaves_while_prompts_are_read_together_gets_no_row(llama: Kit, running: bool) -> None:
    scheduler = llama.scheduler()
    sampling = Sampling(temperature=0, max_tokens=30)
    if running:
        scheduler.submit(llama.request("old", "hello", sampling=sampling))
        scheduler.step()
    for name in ("stays", "leaves"):
        scheduler.submit(llama.request(name, "the order", sampling=sampling, adapter=llama.adapters[0]))
    assert scheduler._admit() == [] and scheduler._prefill is not None
    scheduler.cancel("leaves")
    said = {name for name, _ in scheduler.step()}
    assert "leaves" not in said and "leaves" not in [row.id for row in scheduler.running]
    assert "stays" in [row.id for row in scheduler.running]
    assert sum(llama.model.adapters._users.values()) == 1, "and holds no adapter"
    scheduler.cancel("stays")
    scheduler.cancel("old")
    assert not scheduler.busy
