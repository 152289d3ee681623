"""The header of a safetensors file, read as hostile input: every length and offset is checked before it is used."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_HEADER = 100 * 1024 * 1024
_LIMIT = 2**63

# Bits of one element; F4 packs two to a byte.
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    "F4": 4,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        dtype: its safetensors name, such as ``F32``.
        shape: its dimensions.
        start: first byte, counted from the start of the file.
        end: one past the last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_safetensors_header(path: Path) -> dict[str, TensorInfo]:
    """Reads and checks a safetensors header without touching the tensors.

    Args:
        path: the file.

    Returns:
        The tensors by name. Their ranges lie inside the file, do not overlap and leave no gap, and each range is
        exactly as long as its shape and dtype say.

    Raises:
        ValueError: if anything about the header is off; the message names the file and what is wrong.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError(f"{path.name}: not a safetensors file ({size} bytes)")
        length = int.from_bytes(prefix, "little")
        if length > min(MAX_HEADER, size - 8):
            raise ValueError(f"{path.name}: not a safetensors file, or cut short: its beginning is not that of one")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: the header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path.name}: the header is not a JSON object")
    header.pop("__metadata__", None)
    base = 8 + length
    tensors = {name: _tensor(path.name, name, entry, base, size) for name, entry in header.items()}
    expected = base
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != expected:
            raise ValueError(f"{path.name}: tensor {name!r} overlaps another or leaves a gap")
        expected = info.end
    if expected != size:
        raise ValueError(f"{path.name}: {size - expected} bytes belong to no tensor")
    return tensors


def _tensor(file: str, name: str, entry: Any, base: int, size: int) -> TensorInfo:
    where = f"{file}: tensor {name[:80]!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{where} has an unknown dtype")
    if not _naturals(shape) or len(shape) > 32:
        raise ValueError(f"{where} has a shape that is not a list of whole numbers")
    if not _naturals(offsets) or len(offsets) != 2:
        raise ValueError(f"{where} has data_offsets that are not two whole numbers")
    start, end = base + offsets[0], base + offsets[1]
    if not base <= start <= end <= size:
        raise ValueError(f"{where} lies outside the file")
    bits = math.prod(shape) * _BITS[dtype]
    if bits >= _LIMIT or bits % 8 or bits // 8 != end - start:
        raise ValueError(f"{where} has {end - start} bytes, which is not what its shape and dtype need")
    return TensorInfo(dtype, tuple(shape), start, end)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < _LIMIT for item in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result
