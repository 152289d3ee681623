"""What one forward does to the rows of a batch: a shift for every hooked layer, and what each row's receipt gains.

A decode step's plan depends only on the phase of each row's token, so it is made once and kept for many steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from steering.shift import Shift, decode_shift, prefill_shift
from steering.spec import GENERATED, NEITHER, PROMPT, Fused, Key


@dataclass(frozen=True, slots=True)
class SteeredRow:
    """A steered row of the batch, as far as a plan needs to know it."""

    row: int
    """Its place in the batch."""
    fused: Mapping[Key, Fused]
    prompt_length: int
    preserve_norm: bool


@dataclass(slots=True)
class Gain:
    """What one forward adds to a row's receipt."""

    layers: set[int] = field(default_factory=set)
    tokens: int = 0
    """Positions that some layer changes."""
    pairs: int = 0
    """(position, layer) pairs that are changed."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One forward."""

    shape: tuple[int, int]
    """(B, T)."""
    shifts: Mapping[Key, Shift]
    gains: Sequence[Gain]
    """One per steered row."""
    untouched: Tensor | None
    """(layers, B) bool in a decode step: where a row is not touched; None otherwise."""


def decode_phases(steered: Sequence[SteeredRow], position_ids: Tensor, valid: Tensor) -> tuple[int, ...]:
    """Say in which phase each steered row's one token is.

    Args:
        steered: The steered rows.
        position_ids: (B, 1) int.
        valid: (B, 1) bool.

    Returns:
        PROMPT, GENERATED or NEITHER for each steered row.
    """
    places, real = position_ids[:, 0].tolist(), valid[:, 0].tolist()
    return tuple(
        NEITHER if not real[s.row] else PROMPT if places[s.row] < s.prompt_length else GENERATED for s in steered
    )


def decode_plan(steered: Sequence[SteeredRow], devices: Mapping[Key, torch.device], batch: int,
                phases: Sequence[int]) -> Plan:  # fmt: skip
    """Plan a forward of one token a row.

    Args:
        steered: The steered rows.
        devices: Every hooked place, with its device.
        batch: B.
        phases: See `decode_phases`.

    Returns:
        The plan; it holds as long as the phases do.
    """
    shifts: dict[Key, Shift] = {}
    gains = [Gain() for _ in steered]
    untouched: list[list[bool]] = []
    for key, device in devices.items():
        hit = [i for i, s in enumerate(steered) if key in s.fused and s.fused[key].active[phases[i]]]
        if not hit:
            continue
        rows = [steered[i].row for i in hit]
        fused, keep = [steered[i].fused[key] for i in hit], [steered[i].preserve_norm for i in hit]
        shifts[key] = decode_shift(rows, batch, fused, [phases[i] for i in hit], keep, device)
        untouched.append([row not in rows for row in range(batch)])
        for i in hit:
            gains[i].layers.add(key[1])
            gains[i].tokens = 1
            gains[i].pairs += 1
    where = next(iter(devices.values()))
    return Plan((batch, 1), shifts, gains, torch.tensor(untouched, dtype=torch.bool, device=where))


def prefill_plan(steered: Sequence[SteeredRow], devices: Mapping[Key, torch.device], position_ids: Tensor,
                 valid: Tensor) -> Plan:  # fmt: skip
    """Plan a forward of several tokens a row.

    Args:
        steered: The steered rows.
        devices: Every hooked place, with its device.
        position_ids: (B, T) int, absolute positions.
        valid: (B, T) bool.

    Returns:
        The plan of this forward.
    """
    at = position_ids.device
    rows = torch.tensor([s.row for s in steered], device=at)
    lengths = torch.tensor([[s.prompt_length] for s in steered], device=at)
    phase = (position_ids[rows] >= lengths).long().masked_fill(~valid[rows].bool(), NEITHER)  # (S, T)
    counts = torch.stack([(phase == p).sum(1) for p in (PROMPT, GENERATED)], 1).tolist()
    shifts: dict[Key, Shift] = {}
    gains = [Gain() for _ in steered]
    live: list[set[int]] = [set() for _ in steered]  # phases in which some layer changes the row
    for key, device in devices.items():
        hit = []
        for i, s in enumerate(steered):
            present = [p for p in (PROMPT, GENERATED) if key in s.fused and s.fused[key].active[p] and counts[i][p]]
            if present:
                hit.append(i)
                live[i].update(present)
                gains[i].layers.add(key[1])
                gains[i].pairs += sum(counts[i][p] for p in present)
        if hit:
            own = phase if len(hit) == len(steered) else phase[hit]
            fused, keep = [steered[i].fused[key] for i in hit], [steered[i].preserve_norm for i in hit]
            batch = position_ids.shape[0]
            shifts[key] = prefill_shift([steered[i].row for i in hit], batch, fused, own, keep, device)
    for gain, count, phases in zip(gains, counts, live, strict=True):
        gain.tokens = sum(count[p] for p in phases)
    return Plan((position_ids.shape[0], position_ids.shape[1]), shifts, gains, None)
