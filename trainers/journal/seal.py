"""The end of a journal whose run is finished."""

from __future__ import annotations

import struct
from typing import NamedTuple

from trainers.journal.header import DIGEST
from trainers.journal.record import MARK, link

_SEAL = struct.Struct(f"<IQ{DIGEST}s{DIGEST}s")
SIZE = _SEAL.size + DIGEST
"""Bytes of a seal, 108."""


class Seal(NamedTuple):
    """Says that a run is finished, and with what."""

    steps: int
    """Records before it."""
    chain: bytes
    """The chain's value after the last of them, 32 bytes."""
    tensors: bytes
    """SHA-256 of the tuned tensors, 32 bytes; ``trainers.journal.tensors.digest`` makes it."""

    def pack(self) -> bytes:
        """Its 108 bytes."""
        body = _SEAL.pack(MARK, *self)
        return body + link(self.chain, body)


def unpack(data: bytes) -> Seal:
    """Reads a seal.

    Args:
        data: Its bytes, beginning with the mark; more may follow.

    Returns:
        The seal, which agrees with itself; whether it fits the records is for the caller to say.

    Raises:
        ValueError: It is cut short or damaged.
    """
    if len(data) < SIZE:
        raise ValueError("the seal is cut short")
    _, *values = _SEAL.unpack_from(data)
    seal = Seal(*values)
    if seal.pack() != data[:SIZE]:
        raise ValueError("the seal is damaged")
    return seal
