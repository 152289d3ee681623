"""The header of a GGUF file, read as hostile input: every count, length, offset and product is checked before use.

The file is mapped, not read, and arrays are walked without being built, so a header that claims a billion of something
costs nothing. What it keeps (tensor names, scalar settings) is charged against the file's size.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "gpt2"})
"""Values of ``general.architecture`` that can be converted."""

MAX_STRING = 1 << 24
MAX_KEY = 1 << 16
MAX_TENSORS = 1 << 20
MAX_DIMENSIONS = 4
FLOOR = 1 << 20
"""A small file may use this many bytes of memory anyway."""

_LIMIT = 1 << 63
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
# Tensor type -> (elements of a block, bytes of a block).
_TYPES = {
    **{0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40)},
    **{10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292)},
    **{16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82)},
    **{23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2)},
    **{34: (256, 54), 35: (256, 66), 39: (32, 17)},
}


@dataclass(frozen=True, slots=True)
class ArrayInfo:
    """An array among the settings, which is checked but not built.

    Attributes:
        type: GGUF's number for the element type.
        count: how many elements.
    """

    type: int
    count: int


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor.

    Attributes:
        shape: dimensions as the file has them, fastest first.
        type: GGML's number for the element type.
        start: first byte, counted from the start of the file.
        end: one past the last byte.
    """

    shape: tuple[int, ...]
    type: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """A header whose every offset lies inside the file.

    Attributes:
        version: 2 or 3.
        settings: the key-value pairs; arrays as :class:`ArrayInfo`.
        tensors: the tensors by name.
    """

    version: int
    settings: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]


def read_header(path: Path) -> GGUFHeader:
    """Reads and checks the header.

    Args:
        path: the file.

    Returns:
        The header. Tensors lie inside the file, aligned, without overlap, and exactly as long as their shape and type
        need. Reading it uses at most twice the file's size in memory (or 1 MiB, if that is more).

    Raises:
        ValueError: if anything is off; the message names the file and what is wrong.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).header()
    except (ValueError, OSError) as error:
        raise ValueError(f"{path.name} is not a usable GGUF file: {error}") from None


def check(path: Path) -> GGUFHeader:
    """Reads the header and checks that the file is a model that can be converted.

    Args:
        path: the file.

    Returns:
        Its header.

    Raises:
        ValueError: if the header is malformed, the architecture is not supported, the file is one part of several, it
            has no tokenizer, or its sizes contradict its tensors.
    """
    header = read_header(path)
    settings, tensors = header.settings, header.tensors
    kind = settings.get("general.architecture")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ValueError(f"{path.name}: architecture {kind!r:.80} is not supported; supported: {known}")
    if settings.get("split.count", 1) not in (0, 1):
        raise ValueError(f"{path.name} is one part of a split model; merge the parts first")
    tokens = settings.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, ArrayInfo) or tokens.type != _STRING or tokens.count == 0:
        raise ValueError(f"{path.name} has no tokenizer")
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{path.name} has no token embedding")
    longest = max(max(tensor.shape) for tensor in tensors.values())
    bounds = {"block_count": len(tensors), "embedding_length": longest, "feed_forward_length": longest}
    for name, bound in {**bounds, "attention.head_count": longest, "attention.head_count_kv": longest}.items():
        value = settings.get(f"{kind}.{name}", 1)
        if type(value) is not int or not 1 <= value <= bound:
            raise ValueError(f"{path.name}: {kind}.{name} is {value!r:.80}, which its tensors cannot have")
    return header


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.size = len(data)
        self.at = 0
        self.budget = max(FLOOR, 2 * self.size) // 2  # objects cost more than they are charged: half is the margin

    def header(self) -> GGUFHeader:
        if self.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self.number("<I")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not 2 or 3 (or it is big-endian)")
        tensor_count, setting_count = self.number("<Q"), self.number("<Q")
        # The smallest setting takes 14 bytes and the smallest tensor entry 33: a larger count is a lie.
        if tensor_count > min(MAX_TENSORS, self.size // 33) or setting_count > self.size // 14:
            raise ValueError(f"it claims {setting_count} settings and {tensor_count} tensors in {self.size} bytes")
        settings: dict[str, Any] = {}
        for _ in range(setting_count):
            key = self.text(MAX_KEY)
            if not key or key in settings:
                raise ValueError(f"setting {key[:80]!r} is empty or appears twice")
            settings[key] = self.value(self.number("<I"))
            self.charge(512 + len(key))
        alignment = settings.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise ValueError("general.alignment is not a power of two")
        entries = [self.entry() for _ in range(tensor_count)]
        base = -(-self.at // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        expected = base
        for name, shape, kind, offset, length in sorted(entries, key=lambda entry: entry[3]):
            start = base + offset
            if offset % alignment or start < expected or start + length > self.size:
                raise ValueError(f"tensor {name[:80]!r} is misaligned, overlaps another or lies outside the file")
            if name in tensors:
                raise ValueError(f"tensor {name[:80]!r} appears twice")
            tensors[name] = GGUFTensor(shape, kind, start, start + length)
            expected = start + length
        return GGUFHeader(version, settings, tensors)

    def entry(self) -> tuple[str, tuple[int, ...], int, int, int]:
        name = self.text(MAX_KEY)
        count = self.number("<I")
        if not 1 <= count <= MAX_DIMENSIONS:
            raise ValueError(f"tensor {name[:80]!r} has {count} dimensions")
        shape = tuple(self.number("<Q") for _ in range(count))
        kind, offset = self.number("<I"), self.number("<Q")
        if kind not in _TYPES:
            raise ValueError(f"tensor {name[:80]!r} has the unknown type {kind}")
        block, width = _TYPES[kind]
        elements = math.prod(shape)
        if not 0 < elements < _LIMIT or shape[0] % block or offset >= _LIMIT:
            raise ValueError(f"tensor {name[:80]!r} has an impossible shape or offset")
        self.charge(768 + len(name))
        return name, shape, kind, offset, elements // block * width

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text(MAX_STRING)
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise ValueError(f"a setting has the unknown type {kind}")
        value = self.number(_SCALARS[kind])
        if kind == _BOOL:
            if value not in (0, 1):
                raise ValueError("a truth value is neither 0 nor 1")
            return bool(value)
        return value

    def array(self) -> ArrayInfo:
        kind, count = self.number("<I"), self.number("<Q")
        if kind == _STRING:
            if count > (self.size - self.at) // 8:
                raise ValueError(f"an array claims {count} strings")
            for _ in range(count):
                self.skip(self.number("<Q"))
        elif kind in _SCALARS:
            self.skip(count * struct.calcsize(_SCALARS[kind]))
        else:
            raise ValueError(f"an array has elements of the unsupported type {kind}")
        return ArrayInfo(kind, count)

    def text(self, limit: int) -> str:
        length = self.number("<Q")
        if length > limit:
            raise ValueError(f"a text of {length} bytes is too long")
        self.charge(5 * length)  # the bytes, and up to four for each in the text that they become
        return self.take(length).decode("utf-8")

    def number(self, form: str) -> Any:
        start = self.at
        self.skip(struct.calcsize(form))
        return struct.unpack_from(form, self.data, start)[0]

    def take(self, length: int) -> bytes:
        start = self.at
        self.skip(length)
        return self.data[start : self.at]

    def skip(self, length: int) -> None:
        if length > self.size - self.at:
            raise ValueError(f"it ends early: {length} bytes are wanted at {self.at}, the file has {self.size}")
        self.at += length

    def charge(self, amount: int) -> None:
        self.budget -= amount
        if self.budget < 0:
            raise ValueError("its header is out of proportion to its size")
