"""Reads a steering vector's file without torch, which the API process never imports. The file may come from anyone.

Says about a file exactly what ``steering.vector.SteeringVector.from_bytes`` says, which a test holds it to; the tensors
themselves are only looked at for NaN and infinity.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.models.headers import TensorInfo, read_safetensors_header

FORMAT = "gradhelm-vector/1"
SITES = ("block", "attention", "mlp")
_TEXTS = {"site": 16, "fingerprint": 128, "base": 512, "method": 64, "data_hash": 128}
_FIELDS = frozenset({*_TEXTS, "format", "norms", "metadata"})
_PIECE = 1 << 20
_METADATA_BYTES = 64 * 1024  # it stands in every list of vectors
_METADATA_DEPTH = 16


@dataclass(frozen=True, slots=True)
class VectorFile:
    """What a vector's file says about itself."""

    site: str
    fingerprint: str
    base: str
    method: str
    data_hash: str
    layers: tuple[int, ...]
    width: int
    norms: dict[str, float]
    metadata: dict[str, Any]


def read_vector(path: Path, limit: int) -> VectorFile:
    """Check a file from its first byte to its last.

    Args:
        path: The file.
        limit: Bytes that it may have.

    Returns:
        What the file says of itself.

    Raises:
        ValueError: It is too large, no safetensors file, of another format, or holds NaN, infinity, another dtype,
            differing widths, or text or metadata that is too long or too deep to keep.
    """
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"a steering vector may have {limit} bytes, this has {size}")
    tensors = read_safetensors_header(path)
    about = _about(path)
    layers = _layers(path, tensors)
    width = next(iter(tensors.values())).shape[0]
    norms, metadata = about["norms"], about["metadata"]
    if not isinstance(norms, dict) or not isinstance(metadata, dict):
        raise ValueError("norms must map layers to numbers, and metadata must be an object")
    for layer, norm in norms.items():
        if not _is_index(layer) or int(layer) not in layers:
            raise ValueError(f"norms name layer {layer[:16]!r}, which has no direction")
        if isinstance(norm, bool) or not isinstance(norm, int | float) or not 0 <= norm <= sys.float_info.max:
            raise ValueError(f"layer {layer}: the norm must be a finite number >= 0")
    for name, most in _TEXTS.items():
        if not isinstance(about[name], str) or len(about[name]) > most or "\x00" in about[name]:
            raise ValueError(f"{name} must be text of at most {most} characters")
        about[name].encode()  # half a surrogate pair is no text; UnicodeEncodeError is a ValueError
    if about["site"] not in SITES:
        raise ValueError(f"unknown site {about['site']!r}; sites are {', '.join(SITES)}")
    _check_metadata(metadata)
    texts = {name: about[name] for name in _TEXTS}
    return VectorFile(layers=layers, width=width, norms=norms, metadata=metadata, **texts)


def _check_metadata(metadata: dict[str, Any]) -> None:
    """Refuse what a database or an answer could not hold; depth is judged first and without recursion."""
    level: list[Any] = [metadata]
    for _ in range(_METADATA_DEPTH):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
    if level:
        raise ValueError(f"metadata must not be nested deeper than {_METADATA_DEPTH}")
    try:
        text = json.dumps(metadata, allow_nan=False, ensure_ascii=False)
        size = len(text.encode())
    except ValueError:
        raise ValueError("metadata must be JSON without NaN, infinity and half surrogate pairs") from None
    if size > _METADATA_BYTES or "\\u0000" in text.replace("\\\\", ""):
        raise ValueError(f"metadata may have {_METADATA_BYTES} bytes and no NUL, this has {size} bytes")


def _about(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size), parse_constant=_no_constant)
    try:
        about = json.loads(header["__metadata__"]["gradhelm"], parse_constant=_no_constant)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("the file carries no gradhelm metadata; it is no steering vector of this service") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(f"unknown format; only {FORMAT} is read")
    if set(about) != _FIELDS:
        raise ValueError(f"the metadata must have exactly these fields: {', '.join(sorted(_FIELDS))}")
    return about


def _layers(path: Path, tensors: dict[str, TensorInfo]) -> tuple[int, ...]:
    if not tensors:
        raise ValueError("a steering vector needs the direction of at least one layer")
    found: list[int] = []
    shape = next(iter(tensors.values())).shape
    for name, info in tensors.items():
        prefix, _, digits = name.partition(".")
        if prefix != "layer" or not _is_index(digits):
            raise ValueError(f"unknown tensor {name[:80]!r}; a vector holds layer.<k>, k the 0-based block index")
        if info.dtype != "F32" or len(info.shape) != 1 or info.shape != shape or info.shape[0] == 0:
            raise ValueError(f"{name}: directions are F32 of one width (D,), not {info.dtype} of {list(info.shape)}")
        if not _finite(path, info):
            raise ValueError(f"{name}: the direction holds NaN or infinity")
        found.append(int(digits))
    return tuple(sorted(found))


def _finite(path: Path, info: TensorInfo) -> bool:
    """Whether a float32 tensor is finite: a sum in double precision of finite singles cannot overflow."""
    assert sys.byteorder == "little", "safetensors holds little-endian numbers"
    with path.open("rb") as file:
        file.seek(info.start)
        left = info.end - info.start
        while left:
            data = file.read(min(_PIECE, left))
            left -= len(data)
            if not data or not math.isfinite(sum(memoryview(data).cast("f"))):
                return False
    return True


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5 and str(int(text)) == text


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
