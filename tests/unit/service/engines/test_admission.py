"""Whatever goes wrong while a request is admitted ends that request alone, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError

from core.models.load import load
from service.engines import adapters as module
from service.engines.adapters import AdapterStuck
from service.engines.base import EngineError
from service.engines.model import TransformersModel
from service.engines.scheduler import Scheduler
from tests.unit.service.engines.conftest import Answer, Kit, run

KINDS = [RuntimeError, MemoryError, OSError, KeyError, TypeError, AssertionError, SafetensorError]


@pytest.fixture
def fresh(llama: Kit) -> Iterator[Kit]:
    """A model that never had an adapter."""
    loaded = load(llama.base)
    kit = replace(llama, loaded=loaded, model=TransformersModel(loaded))
    yield kit
    kit.model.close()


def same(one: Answer, other: Answer) -> bool:
    assert one.error is None and other.error is None
    return one.text == other.text and one.logprobs == other.logprobs


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_cannot_be_loaded_ends_its_request_and_no_other(
    llama: Kit, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    alone = run(llama.scheduler(), [llama.request("fine", "hello")])["fine"]

    def fail(self: Any, directory: Path) -> str:
        raise kind(f"secret of {directory}")

    monkeypatch.setattr(module.Adapters, "_load", fail)
    monkeypatch.setattr(llama.model.adapters, "_names", {})
    bad = llama.request("bad", "hello", adapter=llama.adapters[0])
    answers = run(
        llama.scheduler(), [llama.request("fine", "hello"), bad, llama.request("later", "hello")], at=[0, 1, 2]
    )
    error = answers["bad"].error
    assert error is not None and error.status == 503 and kind.__name__ in error.message
    assert "secret" not in error.message and answers["bad"].chunks == []
    assert answers["fine"].text == alone.text and answers["later"].error is None
    assert answers["fine"].logprobs == pytest.approx(alone.logprobs, abs=1e-4), "in other company, so not bitwise"
    assert not any(llama.model.adapters._users.values())


def failing_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's work is done in full, and then an exception comes: the layers are wrapped."""
    real = module.attach

    def half(*args: Any, **kwargs: Any) -> Any:
        real(*args, **kwargs)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(module, "attach", half)


def test_half_a_first_adapter_is_taken_out_of_the_layers(fresh: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run(fresh.scheduler(), [fresh.request("1", "hello")])["1"]
    asked = fresh.request("2", "hello", adapter=fresh.adapters[0])
    with monkeypatch.context() as broken:
        failing_after(broken)
        error = run(fresh.scheduler(), [asked])["2"].error
    assert error is not None and error.status == 503
    assert not any(isinstance(layer, BaseTunerLayer) for layer in fresh.loaded.model.modules())
    assert same(run(fresh.scheduler(), [fresh.request("1", "hello")])["1"], plain)
    tuned = run(fresh.scheduler(), [asked])["2"]
    assert tuned.error is None and tuned.logprobs != plain.logprobs, "the same adapter can be loaded afterwards"
    assert same(run(fresh.scheduler(), [fresh.request("1", "hello")])["1"], plain)


def test_half_a_second_adapter_leaves_the_first_as_it_was(fresh: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fresh.request("1", "hello", adapter=fresh.adapters[0])
    second = fresh.request("2", "hello", adapter=fresh.adapters[1])
    before = run(fresh.scheduler(), [first])["1"]
    with monkeypatch.context() as broken:
        failing_after(broken)
        error = run(fresh.scheduler(), [second])["2"].error
    assert error is not None and error.status == 503
    peft = fresh.model.adapters._peft
    assert len(peft.peft_config) == len(fresh.model.adapters) == 1
    assert same(run(fresh.scheduler(), [first])["1"], before)
    after = run(fresh.scheduler(), [second])["2"]
    assert after.error is None and after.logprobs != before.logprobs


def test_what_cannot_be_taken_out_ends_the_process(fresh: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(self: Any, name: str) -> None:
        raise RuntimeError("no way back")

    failing_after(monkeypatch)
    monkeypatch.setattr(module.Adapters, "_take_out", stuck)
    scheduler = fresh.scheduler()
    scheduler.submit(fresh.request("1", "hello", adapter=fresh.adapters[0]))
    with pytest.raises(AdapterStuck):
        scheduler.step()


def test_places_that_nobody_uses_but_none_is_free_are_no_endless_wait(
    llama: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama.model.adapters, "_limit", 0)
    monkeypatch.setattr(llama.model.adapters, "_names", {})
    answers = run(llama.scheduler(), [llama.request("1", "hello", adapter=llama.adapters[0])])
    error = answers["1"].error
    assert error is not None and error.status == 503


def test_without_room_for_a_cache_the_requests_end_and_give_back_their_adapters(
    llama: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler: Scheduler = llama.scheduler()
    scheduler.submit(llama.request("1", "hello", adapter=llama.adapters[0]))
    scheduler.submit(llama.request("2", "hello"))

    def full(rows: int = 1) -> Any:
        raise MemoryError

    with monkeypatch.context() as broken:
        broken.setattr(llama.model, "new_cache", full)
        events = scheduler.step()
    assert [(name, isinstance(what, EngineError) and what.status) for name, what in events] == [("1", 503), ("2", 503)]
    assert not scheduler.busy and not any(llama.model.adapters._users.values())
    assert run(scheduler, [llama.request("later", "hello")])["later"].error is None
