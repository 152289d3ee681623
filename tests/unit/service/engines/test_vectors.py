"""Vector files are read once, beside the batch."""

from __future__ import annotations

import os
import queue
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.engines import wire
from service.engines.base import BadRequest, EngineError, Steering, SteeringTerm
from service.engines.encoder import Encoder
from service.engines.vectors import Vectors
from service.engines.worker import take
from tests.unit.service.engines.conftest import Kit, make_vector


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose bytes were read."""
    seen: list[Path] = []
    read_bytes = Path.read_bytes

    def reading(path: Path) -> bytes:
        seen.append(path)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", reading)
    return seen


def test_a_file_is_read_again_only_when_it_has_changed(llama: Kit, tmp_path: Path, reads: list[Path]) -> None:
    path, twin = (make_vector(llama.loaded, tmp_path / f"{name}.safetensors") for name in ("v", "twin"))
    vectors = Vectors(limit=2)
    first = vectors.read(path)
    assert all(vectors.read(path) is first for _ in range(5)) and len(reads) == 1
    assert vectors.read(twin) is first and len(reads) == 2, "equal bytes are one object"
    other = make_vector(llama.loaded, tmp_path / "other.safetensors", method="another")
    os.replace(other, path)
    changed = vectors.read(path)
    assert changed is not first and changed.method == "another" and vectors.read(twin) is first and len(reads) == 3
    os.unlink(path)
    with pytest.raises(BadRequest, match="is gone"):
        vectors.read(path)


def test_no_more_is_held_than_may_be(llama: Kit, tmp_path: Path, reads: list[Path]) -> None:
    vectors = Vectors(limit=2)
    paths = [make_vector(llama.loaded, tmp_path / f"{i}.safetensors", method=f"m{i}") for i in range(4)]
    for _ in range(2):
        assert [vectors.read(path).method for path in paths] == ["m0", "m1", "m2", "m3"]
    assert len(reads) == 8 and len(vectors._held) == len(vectors._read) == 2


def test_the_batch_reads_no_file_of_what_the_encoder_has_read(
    llama: Kit, monkeypatch: pytest.MonkeyPatch, reads: list[Path]
) -> None:
    scheduler, encoder = llama.scheduler(), Encoder(queue.SimpleQueue())
    encoder._tokenizer, encoder._context, encoder._spec = llama.loaded.tokenizer, 1024, scheduler.vectors.spec

    def encoded(term: SteeringTerm) -> dict[str, Any]:
        request = replace(llama.request("1", "hello"), steering=Steering((term,)))
        message = {"op": "generate", "request": wire.request_to_json(request)}
        encoder.put(message)
        return encoder.encode(message)

    good, gone = encoded(SteeringTerm(llama.vector, 1.0)), encoded(SteeringTerm("/none.safetensors", 1.0))
    bad = encoded(SteeringTerm(llama.vector, float("nan")))
    assert reads == [Path(llama.vector)]
    monkeypatch.setattr(scheduler.vectors, "read", None)
    events: list[Any] = []
    for message in (good, gone, bad):
        encoder._pending.add("1")
        take(scheduler, encoder, message, events)
    codes = [what.code for _, what in events if isinstance(what, EngineError)]
    assert codes == ["vector_not_found", "steering_bad_strength"]
    assert [one.id for one in scheduler.waiting] == ["1"] and scheduler.waiting[0].steering is not None
    scheduler.cancel("1")
