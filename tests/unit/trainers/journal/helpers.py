"""Journals to test with: every number of a record is a function of its step."""

from __future__ import annotations

import random
import struct
from typing import Any

from trainers.journal import Header, Record, Slot, TensorEntry

TENSORS = bytes(range(32))
"""A hash of tuned tensors."""


def header(**changes: Any) -> Header:
    """Of a run over two tensors; ``changes`` are other fields."""
    given: dict[str, Any] = {
        "base": "sha256:" + "a" * 64,
        "quantiser": {"scheme": "int4", "group": 64},
        "tensors": (TensorEntry("a.scales", "float32", (3, 2)), TensorEntry("b.scales", "float32", (4,))),
        "initial": "0" * 64,
        "epsilon": (0.1 + 0.2,),
        "generator": "philox4x32-10/1",
        "kernels": "reference",
        "seed": (1 << 64) - 1,
        "estimator": {"clip_quantile": 0.99},
    }
    return Header(**given | changes)


def record(step: int, *, slots: int = 1, seeded: bool = False) -> Record:
    """Any bits, NaN and infinity among what was measured, zeros of both signs among what was applied."""
    draw = random.Random(step)
    made = []
    for _ in range(slots):
        d_raw = draw.choice([draw.gauss(0, 50), draw.gauss(0, 1e-300), float("nan"), float("inf"), -0.0])
        skipped = draw.random() < 0.2
        d_applied = 0.0 if skipped else draw.choice([draw.gauss(0, 10), -0.0, 5e-324, float("-inf")])
        made.append(Slot(d_raw, d_applied, not skipped and draw.random() < 0.3, skipped))
    return Record(step, 1e-3 * draw.random(), tuple(made), draw.getrandbits(64) if seeded else None)


def records(count: int, **layout: Any) -> list[Record]:
    """The first ones."""
    return [record(step, **layout) for step in range(1, count + 1)]


def bits(found: Any) -> list[tuple[Any, ...]]:
    """Records as values that are equal only when all bits are: NaN equals itself, and -0.0 is not 0.0."""
    return [
        (
            one.step,
            _bits(one.lr),
            one.seed,
            *((_bits(raw), _bits(applied), *flags) for raw, applied, *flags in one.slots),
        )
        for one in found
    ]


def _bits(value: float) -> bytes:
    return struct.pack("<d", value)
