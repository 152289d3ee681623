"""What a journal says once, before its records: whose weights it tunes, and how its numbers are to be read."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

FORMAT = "gradhelm-journal/1"
MAGIC = b"\x89GHJ\r\n\x1a\n"
"""As PNG's: a transfer that changes line ends, or cuts the eighth bit, changes it."""
MAX_BYTES = 1 << 24
"""Longest header text, in bytes."""
MAX_SLOTS = 4096
"""Most derivatives in one record."""
DIGEST = 32
"""Bytes of a SHA-256."""

_LENGTH = struct.Struct("<I")
_DTYPES = frozenset({"float32", "float16", "bfloat16", "float64"})


class TensorEntry(NamedTuple):
    """One tensor that is tuned; its place in the header's list is its number in the generator."""

    name: str
    """Its name in the model."""
    dtype: str
    """``float32``, ``float16``, ``bfloat16`` or ``float64``."""
    shape: tuple[int, ...]
    """As the model holds it."""


class Parent(NamedTuple):
    """Where a forked journal left another one."""

    step: int
    """The last step that they share."""
    chain: str
    """The other journal's chain value after that step, 64 hexadecimal digits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What holds for all records of a journal."""

    base: str
    """Fingerprint of the base weights."""
    quantiser: Mapping[str, Any]
    """How the base was quantised; JSON. Empty where nothing is."""
    tensors: tuple[TensorEntry, ...]
    """What is tuned, in the order in which the generator numbers it."""
    initial: str
    """SHA-256 of those tensors before the first step, 64 hexadecimal digits."""
    epsilon: tuple[float, ...]
    """Length of the perturbation: one number, or one for each tensor."""
    generator: str
    """Name and version of the generator of noise."""
    kernels: str
    """Name of the table that chose the multiplications of the forward pass."""
    seed: int | None
    """Seed of all steps, in [0, 2**64); None when every record has its own."""
    slots: int = 1
    """Derivatives in one record: one, or one for each direction of a step."""
    estimator: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the estimator that decide what a record does to the tensors; JSON."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What decides nothing: the model's name, the data's digest, versions; JSON."""
    parent: Parent | None = None
    """The journal that this one was forked from."""

    def __post_init__(self) -> None:
        """Checks the values and brings them into the form in which they are read back.

        Raises:
            ValueError: A value cannot be written, or makes no sense.
        """
        for name in ("base", "generator", "kernels"):
            _need(isinstance(getattr(self, name), str) and getattr(self, name) != "", f"{name} must be a text")
        for name in ("quantiser", "estimator", "about"):
            _need(isinstance(getattr(self, name), Mapping), f"{name} must be a mapping")
            object.__setattr__(self, name, _plain(dict(getattr(self, name)), name))
        tensors = tuple(_entry(*entry) for entry in self.tensors)
        _need(len({entry.name for entry in tensors}) == len(tensors) > 0, "tensors must be named, each once")
        object.__setattr__(self, "tensors", tensors)
        _need(_hexadecimal(self.initial), "initial must be 64 hexadecimal digits")
        _need(all(_number(value) for value in self.epsilon), "epsilon must hold numbers above zero")
        epsilon = tuple(float(value) for value in self.epsilon)
        _need(len(epsilon) in {1, len(tensors)}, "epsilon must be one number, or one for each tensor")
        object.__setattr__(self, "epsilon", epsilon)
        _need(self.seed is None or _whole(self.seed, 0, 1 << 64), "seed must be a whole number in [0, 2**64)")
        _need(_whole(self.slots, 1, MAX_SLOTS + 1), f"slots must be a whole number in [1, {MAX_SLOTS}]")
        if self.parent is not None:
            parent = Parent(*self.parent)
            _need(_whole(parent.step, 0, 1 << 32) and _hexadecimal(parent.chain), "parent must be a step and a chain")
            object.__setattr__(self, "parent", parent)

    def encode(self) -> bytes:
        """Writes the header.

        Returns:
            Its bytes, from the magic to its digest.

        Raises:
            ValueError: It is longer than ``MAX_BYTES``.
        """
        content = {"format": FORMAT} | {one.name: getattr(self, one.name) for one in fields(self)}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
        _need(len(text) <= MAX_BYTES, f"the text has {len(text)} bytes, more than {MAX_BYTES}")
        start = MAGIC + _LENGTH.pack(len(text)) + text
        return start + hashlib.sha256(start).digest()


def decode(data: bytes) -> tuple[Header, int]:
    """Reads the header of a journal.

    Args:
        data: The journal's bytes, from its first on.

    Returns:
        The header, and how many bytes it takes; the last 32 of them are its digest, the chain's first value.

    Raises:
        ValueError: This is no journal, or its header is damaged or of another version.
    """
    begin = len(MAGIC) + _LENGTH.size
    if data[: len(MAGIC)] != MAGIC:
        what = "it is cut short" if MAGIC.startswith(data[: len(MAGIC)]) else "it does not begin as one"
        raise ValueError(f"no journal: {what}. Take another copy")
    _need(len(data) >= begin, "it is cut short. Take another copy")
    (length,) = _LENGTH.unpack_from(data, len(MAGIC))
    end = begin + length
    if length > MAX_BYTES or len(data) < end + DIGEST:
        raise ValueError("the journal's header is damaged or cut short. Take another copy")
    if hashlib.sha256(data[:end]).digest() != data[end : end + DIGEST]:
        raise ValueError("the journal's header is damaged: its digest differs. Take another copy")
    try:
        content = json.loads(data[begin:end].decode("utf-8"))
        found = content.pop("format")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"the journal's header is no JSON object that says its format: {error}") from error
    _need(found == FORMAT, f"its format is {found!r}, and this version reads {FORMAT!r}")
    names = {one.name for one in fields(Header)}
    _need(content.keys() == names, f"its keys differ from {', '.join(sorted(names))}")
    try:
        return Header(**content), end + DIGEST
    except TypeError as error:
        raise ValueError(f"the journal's header is not of its format: {error}") from error


def differing(one: Header, other: Header) -> tuple[str, ...]:
    """Names of the fields that differ and matter: all but ``about`` and ``parent``."""
    names = (one.name for one in fields(Header) if one.name not in {"about", "parent"})
    return tuple(name for name in names if getattr(one, name) != getattr(other, name))


def _need(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(f"the journal's header: {message}")


def _plain(value: Any, name: str) -> Any:
    """As JSON gives it back."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the journal's header: {name} is not JSON: {error}") from error


def _entry(name: Any, dtype: Any, shape: Any) -> TensorEntry:
    _need(isinstance(name, str) and name != "", "a tensor's name must be a text")
    _need(dtype in _DTYPES, f"{name} has the dtype {dtype}; known are {', '.join(sorted(_DTYPES))}")
    _need(all(_whole(size, 0, 1 << 63) for size in shape), f"{name} has a shape that is none")
    return TensorEntry(name, dtype, tuple(shape))


def _whole(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value < high


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def _hexadecimal(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 2 * DIGEST and not set(value) - set("0123456789abcdef")
