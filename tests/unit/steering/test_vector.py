"""A vector's file: exact, identical for identical vectors, and refused when anything in it is off."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from steering.vector import FORMAT, SteeringVector, VectorError


def vector() -> SteeringVector:
    return SteeringVector(
        directions={3: torch.tensor([1.0, -2.0, 0.5]), 1: torch.tensor([0.0, 1e-38, 3e38])},
        site="mlp",
        fingerprint="sha256:aa",
        base="tiny-llama",
        method="mean_difference",
        data_hash="sha256:bb",
        norms={1: 2.5, 3: 0.0},
        metadata={"rows": 3, "note": "grün"},
    )


def about(**change: Any) -> dict[str, Any]:
    data = vector().to_bytes()
    size = int.from_bytes(data[:8], "little")
    found = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["gradhelm"])
    return {key: value for key, value in {**found, **change}.items() if value is not ...}


def file(tensors: dict[str, torch.Tensor] | None = None, text: str | None = None, **change: Any) -> bytes:
    tensors = {"layer.1": torch.ones(3), "layer.3": torch.ones(3)} if tensors is None else tensors
    return save(tensors, {"gradhelm": json.dumps(about(**change)) if text is None else text})


def test_round_trip_is_exact(tmp_path: Path) -> None:
    path = vector().save(tmp_path / "v.safetensors")
    back = SteeringVector.load(path)
    assert back.layers == (1, 3)
    assert back.width == 3
    assert all(torch.equal(back.directions[layer], vector().directions[layer]) for layer in back.layers)
    assert (back.norms, back.metadata) == (vector().norms, vector().metadata)
    assert (back.site, back.fingerprint, back.base, back.method, back.data_hash) == (
        "mlp", "sha256:aa", "tiny-llama", "mean_difference", "sha256:bb"
    )  # fmt: skip
    assert back.sha256 == vector().sha256
    assert [p.name for p in tmp_path.iterdir()] == ["v.safetensors"]


def test_the_same_vector_has_the_same_bytes_in_another_process() -> None:
    code = "from tests.unit.steering.test_vector import vector; print(vector().sha256)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[3]
    )
    assert done.stdout.strip() == vector().sha256, done.stderr


def test_contents_decide_the_identity() -> None:
    assert replace(vector(), metadata={}).sha256 != vector().sha256
    assert vector().sha256.startswith("sha256:")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = vector().save(tmp_path / "v.safetensors")
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace(vector(), base="other").save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["v.safetensors"]


BAD_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"directions": {}}, "at least one layer"),
    "NaN": ({"directions": {0: torch.tensor([1.0, float("nan")])}, "norms": {}}, "NaN"),
    "infinity": ({"directions": {0: torch.tensor([float("inf")])}, "norms": {}}, "infinity"),
    "half": ({"directions": {0: torch.ones(2, dtype=torch.float16)}, "norms": {}}, "float32"),
    "matrix": ({"directions": {0: torch.ones(2, 2)}, "norms": {}}, "one width"),
    "widths": ({"directions": {0: torch.ones(2), 1: torch.ones(3)}, "norms": {}}, "one width"),
    "empty": ({"directions": {0: torch.ones(0)}, "norms": {}}, "empty"),
    "negative layer": ({"directions": {-1: torch.ones(2)}, "norms": {}}, "block indices"),
    "layer is text": ({"directions": {"1": torch.ones(2)}, "norms": {}}, "block indices"),
    "site": ({"site": "logits"}, "block, attention, mlp"),
    "no text": ({"base": 3}, "base must be text"),
    "stray norm": ({"norms": {7: 1.0}}, "no direction"),
    "NaN norm": ({"norms": {1: float("nan")}}, "finite"),
    "negative norm": ({"norms": {1: -1.0}}, ">= 0"),
    "metadata NaN": ({"metadata": {"x": float("nan")}}, "plain JSON"),
    "metadata object": ({"metadata": {"x": object()}}, "plain JSON"),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_what_cannot_be_applied_is_never_made(name: str) -> None:
    change, words = BAD_FIELDS[name]
    with pytest.raises(VectorError, match=words):
        replace(vector(), **change)


BAD_FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "cut off"),
    "short": (lambda: b"\x01\x00", "cut off"),
    "cut": (lambda: vector().to_bytes()[:-1], "not a valid safetensors"),
    "trailing": (lambda: vector().to_bytes() + b"x", "not a valid safetensors"),
    "huge header": (lambda: b"\xff" * 8 + b"{}", "cut off"),
    "pickle": (lambda: b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00", "cut off"),
    "no metadata": (lambda: save({"layer.1": torch.ones(3)}), "no gradhelm metadata"),
    "no JSON": (lambda: file(text="{"), "no gradhelm metadata"),
    "deep JSON": (lambda: file(text="[" * 200_000), "no gradhelm metadata"),
    "NaN": (lambda: file({"layer.1": torch.full((3,), float("nan"))}, norms={}), "NaN"),
    "NaN norm": (lambda: file(text=json.dumps(about()).replace("2.5", "NaN")), "no gradhelm metadata"),
    "list": (lambda: file(text="[]"), "unknown format"),
    "version": (lambda: file(format="gradhelm-vector/2"), f"use {FORMAT}"),
    "missing": (lambda: file(method=...), "exactly these fields"),
    "extra": (lambda: file(code="import os"), "exactly these fields"),
    "norm keys": (lambda: file(norms={"01": 1.0}), "map layers"),
    "norm list": (lambda: file(norms=[1.0]), "map layers"),
    "norm text": (lambda: file(norms={"1": "2"}), "finite"),
    "text": (lambda: file(base=None), "base must be text"),
    "tensor name": (lambda: file({"direction.1": torch.ones(3)}, norms={}), "layer.<k>"),
    "layer name": (lambda: file({"layer.01": torch.ones(3)}, norms={}), "layer.<k>"),
    "float64": (lambda: file({"layer.1": torch.ones(3, dtype=torch.float64)}, norms={}), "float32"),
    "scalar": (lambda: file({"layer.1": torch.tensor(1.0)}, norms={}), "one width"),
    "widths": (lambda: file({"layer.1": torch.ones(3), "layer.2": torch.ones(4)}, norms={}), "one width"),
    "none": (lambda: file({}, norms={}), "at least one layer"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_are_refused(name: str, tmp_path: Path) -> None:
    make, words = BAD_FILES[name]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(make())
    with pytest.raises(VectorError, match=words):
        SteeringVector.load(path)


def test_a_file_over_the_limit_is_not_read(tmp_path: Path) -> None:
    path = vector().save(tmp_path / "v.safetensors")
    size = path.stat().st_size
    assert SteeringVector.load(path, limit=size).layers == (1, 3)
    with pytest.raises(VectorError, match=f"may have {size - 1} bytes"):
        SteeringVector.load(path, limit=size - 1)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_are_refused_or_read_never_worse(data: st.DataObject) -> None:
    good = bytearray(vector().to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(good)))
    for damaged in (bytes(good), bytes(good[:cut])):
        try:
            read = SteeringVector.from_bytes(damaged)
        except VectorError:
            continue
        assert all(bool(torch.isfinite(d).all()) for d in read.directions.values())
