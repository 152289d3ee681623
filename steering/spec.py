"""What one row of a batch asks for: terms, and their fusion into one delta per layer and phase.

A position is in the phase `prompt` when it is below the row's prompt length, else `generated`; "all" is both. The token
fed at a position carries the activation that is steered, so the first generated token, which is read off the prompt's
last position, is shaped by `prompt` and `all`, not by `generated`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from core.models.sites import SITES
from steering.vector import SteeringVector

Positions = Literal["all", "prompt", "generated"]
Key = tuple[str, int]  # (site, 0-based block index)

PROMPT, GENERATED, NEITHER = 0, 1, 2  # phases of a position; padding is in neither
_PHASES: Mapping[str, tuple[int, ...]] = {"all": (PROMPT, GENERATED), "prompt": (PROMPT,), "generated": (GENERATED,)}


class SteeringError(ValueError):
    """A steering request that cannot be met.

    Codes: steering_touches_nothing, steering_wrong_model, steering_layer_out_of_range, steering_layer_not_in_vector,
    steering_bad_strength, steering_unknown_site, steering_bad_positions.
    """

    def __init__(self, code: str, message: str, term: int | None = None) -> None:
        """Keep what a caller needs to answer its client.

        Args:
            code: Stable, machine-readable.
            message: What is wrong and what to do.
            term: Index of the term at fault, where it is one term's.
        """
        super().__init__(message if term is None else f"vectors[{term}]: {message}")
        self.code = code
        self.term = term


@dataclass(frozen=True, slots=True)
class Term:
    """One vector with a plain multiplier."""

    vector: SteeringVector
    strength: float
    """Multiplies the stored direction; may be negative. Layers add up: the more of them, the less each needs."""
    layers: tuple[int, ...] | None = None
    """0-based block indices; None: every layer of the vector."""
    positions: Positions = "all"
    """Which tokens are steered."""


@dataclass(frozen=True, slots=True)
class RowSpec:
    """Everything that steers one row: the terms add in list order."""

    terms: tuple[Term, ...]
    preserve_norm: bool = False
    """After all terms are added, scale each touched token back to the norm that it had."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What steering did to one row, measured in its forwards."""

    layers: tuple[int, ...]
    """Blocks that were hit, ascending."""
    tokens: int
    """Positions that were changed in at least one layer."""
    mean_relative_shift: float
    """Mean of |dh| / |h| over the changed positions and layers."""


@dataclass(frozen=True, slots=True)
class Fused:
    """All terms of a row at one (site, layer)."""

    table: Tensor
    """(3, D) float32: the sum of the deltas for a position in PROMPT, GENERATED, NEITHER (zeros)."""
    active: tuple[bool, bool, bool]
    """Phases whose delta is not zero."""


@dataclass(frozen=True, slots=True)
class Target:
    """The model that a spec is to be applied to."""

    fingerprint: str
    layers: int
    """Number of blocks."""
    width: int
    """D."""
    largest: float
    """Largest finite number of the model's dtype."""


def fuse(spec: RowSpec, target: Target, *, max_tokens: int | None = None) -> dict[Key, Fused]:
    """Check a spec against a model and add its terms up.

    Args:
        spec: The row's terms.
        target: The model.
        max_tokens: Most tokens that the row may generate, where known.

    Returns:
        (site, layer) -> the fused deltas; only places where some delta is not zero.

    Raises:
        SteeringError: See its codes.
    """
    if not spec.terms:
        raise SteeringError("steering_touches_nothing", "the steering spec names no vector; leave it out or add one")
    tables: dict[Key, Tensor] = {}
    for number, term in enumerate(spec.terms):
        layers = _check(number, term, target)
        for layer in layers:
            table = tables.setdefault((term.vector.site, layer), torch.zeros(3, target.width))
            delta = term.vector.directions[layer] * term.strength
            if not float(delta.abs().max()) <= target.largest:
                message = f"strength {term.strength} overflows the model's numbers at layer {layer}; use a smaller one"
                raise SteeringError("steering_bad_strength", message, number)
            table[list(_PHASES[term.positions])] += delta
    fused = {}
    for key, table in tables.items():
        active = tuple(bool(row.any()) for row in table)
        if any(active):
            fused[key] = Fused(table, (active[0], active[1], False))
    if not fused:
        message = "the steering spec adds up to zero: give a strength other than 0, and terms that do not cancel"
        raise SteeringError("steering_touches_nothing", message)
    if max_tokens is not None and max_tokens <= 1 and not any(f.active[PROMPT] for f in fused.values()):
        message = (
            f'positions "generated" with max_tokens {max_tokens} touches nothing: the first generated token comes from '
            'the prompt\'s last position; use positions "all" or more tokens'
        )
        raise SteeringError("steering_touches_nothing", message)
    return fused


def _check(number: int, term: Term, target: Target) -> tuple[int, ...]:
    """Check one term; give the layers that it steers."""
    vector, strength = term.vector, term.strength
    if vector.site not in SITES:
        raise SteeringError("steering_unknown_site", f"site {vector.site!r}: use {', '.join(SITES)}", number)
    if term.positions not in get_args(Positions):
        message = f"positions {term.positions!r}: use {', '.join(get_args(Positions))}"
        raise SteeringError("steering_bad_positions", message, number)
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not math.isfinite(strength):
        raise SteeringError("steering_bad_strength", f"strength must be a finite number, not {strength!r}", number)
    if vector.fingerprint != target.fingerprint:
        message = (
            f"the vector was fitted on {vector.base} ({vector.fingerprint}), the model has {target.fingerprint}; "
            "fit it again on this model"
        )
        raise SteeringError("steering_wrong_model", message, number)
    layers = vector.layers if term.layers is None else tuple(dict.fromkeys(term.layers))
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < target.layers:
            message = f"layer {layer!r} is out of range: the model has layers 0 to {target.layers - 1}"
            raise SteeringError("steering_layer_out_of_range", message, number)
        if layer not in vector.directions:
            message = f"the vector has no direction for layer {layer}; it has {_spans(vector.layers)}"
            raise SteeringError("steering_layer_not_in_vector", message, number)
    if vector.width != target.width:
        message = f"the vector's width is {vector.width}, the model's is {target.width}"
        raise SteeringError("steering_wrong_model", message, number)
    return layers


def _spans(layers: tuple[int, ...]) -> str:
    """Write (0, 1, 2, 5) as "0-2, 5"."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
