"""What one step did, as a value and as bytes."""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass
from typing import NamedTuple

TAG = 8
"""Bytes of the chain value that a record ends with."""
MARK = 0xFFFFFFFF
"""Stands where a record has its step, and says that a seal follows instead."""

_HEAD = {False: struct.Struct("<Id"), True: struct.Struct("<IdQ")}
_SLOT = struct.Struct("<Bdd")
_CLIPPED, _SKIPPED = 1, 2


class Slot(NamedTuple):
    """One derivative of a step: that of its only direction, or of one of several."""

    d_raw: float
    """The derivative as it was measured: a difference of losses over a length. NaN or infinite where a loss was."""
    d_applied: float
    """What the update took in its place, after scaling and clipping; 0.0 when it was skipped."""
    clipped: bool = False
    """Whether clipping changed it."""
    skipped: bool = False
    """Whether nothing was applied, since what was measured is no number."""


class Record(NamedTuple):
    """One step."""

    step: int
    """Its number; the first is 1."""
    lr: float
    """The learning rate of the step."""
    slots: tuple[Slot, ...]
    """As many as the header says; their places are the numbers of the directions, from 0."""
    seed: int | None = None
    """Seed of the step, in [0, 2**64); None where the header holds the seed of all steps."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How the records of one journal lie in its file; little-endian, without padding."""

    slots: int
    """Derivatives in a record."""
    seeded: bool
    """Whether each record has a seed of its own."""

    @property
    def body(self) -> int:
        """Bytes of a record before its tag."""
        return _HEAD[self.seeded].size + self.slots * _SLOT.size

    @property
    def size(self) -> int:
        """Bytes of a record: 37 with one slot and the seed in the header."""
        return self.body + TAG

    def pack(self, record: Record) -> bytes:
        """A record's body.

        Args:
            record: What the step did.

        Returns:
            ``body`` bytes.

        Raises:
            ValueError: A number is out of its range, or the slots are not as many as the header says.
        """
        step, lr, slots, seed = record
        if not 1 <= step < MARK:
            raise ValueError(f"a journal holds the steps 1 to {MARK - 1}, not {step}")
        if not math.isfinite(lr):
            raise ValueError(f"step {step}: the learning rate {lr} is no number")
        if len(slots) != self.slots:
            raise ValueError(f"step {step}: {len(slots)} derivatives, and the header says {self.slots}")
        if (seed is not None) != self.seeded:
            raise ValueError(f"step {step}: either the header holds the seed, or every record does")
        if seed is not None and not 0 <= seed < 1 << 64:
            raise ValueError(f"step {step}: the seed {seed} is not in [0, 2**64)")
        parts = [_HEAD[self.seeded].pack(step, lr, *(() if seed is None else (seed,)))]
        for d_raw, d_applied, clipped, skipped in slots:
            if skipped and (d_applied != 0 or clipped):
                raise ValueError(f"step {step}: a derivative that is skipped is not clipped, and 0.0 is applied")
            parts.append(_SLOT.pack(_CLIPPED * clipped + _SKIPPED * skipped, d_raw, d_applied))
        return b"".join(parts)

    def unpack(self, body: bytes) -> Record:
        """Reads a body back.

        Args:
            body: ``body`` bytes.

        Returns:
            The record; packed again it gives the same bytes.

        Raises:
            ValueError: No writer of this format made it.
        """
        head = _HEAD[self.seeded]
        step, lr, *seed = head.unpack_from(body)
        slots = []
        for flags, d_raw, d_applied in _SLOT.iter_unpack(body[head.size :]):
            if flags > (_CLIPPED | _SKIPPED):
                raise ValueError(f"step {step}: flags {flags} are of no version that is known")
            slots.append(Slot(d_raw, d_applied, bool(flags & _CLIPPED), bool(flags & _SKIPPED)))
        return Record(step, lr, tuple(slots), *seed)


def link(chain: bytes, data: bytes) -> bytes:
    """The chain's next value: SHA-256 of the value before and of the bytes that follow it, 32 bytes."""
    return hashlib.sha256(chain + data).digest()
