"""The safetensors header reader agrees with the library where a file is sound, and is stricter nowhere that matters."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from core.models.headers import read_safetensors_header

FIXTURE = [HealthCheck.function_scoped_fixture]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool, torch.float64]


def write(path: Path, header: bytes, body: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)


@given(shapes=st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=4)), max_size=6))
@settings(max_examples=60, deadline=None, suppress_health_check=FIXTURE)
def test_what_the_library_writes_is_read(tmp_path: Path, shapes: list[tuple[torch.dtype, list[int]]]) -> None:
    tensors = {f"t{index}": torch.ones(shape).to(dtype) for index, (dtype, shape) in enumerate(shapes)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    read = read_safetensors_header(path)
    raw = path.read_bytes()
    assert {name: info.shape for name, info in read.items()} == {name: tuple(t.shape) for name, t in tensors.items()}
    for name, info in read.items():
        assert raw[info.start : info.end] == tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()


_NUMBER = st.one_of(st.integers(-8, 72), st.sampled_from([2**31, 2**63, 2**64, 10**30]), st.booleans(), st.floats())
_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BOOL", "I64", "F4", "X", 3, None]),
        "shape": st.lists(_NUMBER, max_size=3),
        "data_offsets": st.one_of(st.tuples(st.integers(0, 64), st.integers(0, 72)), st.lists(_NUMBER, max_size=3)),
    }
)


@given(header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), st.one_of(_ENTRY, _NUMBER), max_size=3))
@settings(max_examples=300, deadline=None, suppress_health_check=FIXTURE)
def test_what_is_accepted_is_inside_the_file_and_what_the_library_refuses_is_refused(
    tmp_path: Path, header: dict[str, Any]
) -> None:
    path = tmp_path / "x.safetensors"
    write(path, json.dumps(header).encode(), b"\0" * 64)
    try:
        read = read_safetensors_header(path)
    except ValueError as error:
        assert "x.safetensors" in str(error)
        return
    size = path.stat().st_size
    assert sum(info.end - info.start for info in read.values()) == 64
    assert all(0 < info.start <= info.end <= size for info in read.values())
    with safe_open(path, "pt") as opened:
        assert set(opened.keys()) == set(read)


@given(raw=st.binary(max_size=200))
@settings(max_examples=300, deadline=None, suppress_health_check=FIXTURE)
def test_any_bytes_are_a_value_error_or_empty(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    try:
        assert read_safetensors_header(path) == {}
    except ValueError as error:
        assert "x.safetensors" in str(error)


def test_the_library_agrees_on_the_empty_file(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", b"{}", b"")
    assert read_safetensors_header(tmp_path / "x.safetensors") == {}
    write(tmp_path / "y.safetensors", b"{}", b"\0")
    with pytest.raises(ValueError, match="1 bytes belong to no tensor"):
        read_safetensors_header(tmp_path / "y.safetensors")
    with pytest.raises(SafetensorError):
        safe_open(tmp_path / "y.safetensors", "pt").__enter__()
