"""Moving tensors along random directions that are drawn again each time they are needed, tile by tile.

Legend: t a tensor's tile, z noise, u direction, e distance, d derivative, R directions of a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trainers.optim.estimator import Estimator
from trainers.optim.noise import noise

FLOOR = 1e-7
"""Smallest size that a step leaves a scale with, as published."""
TILE = 1 << 17


@dataclass(frozen=True, slots=True)
class Moved:
    """A tensor that is moved."""

    tensor: Tensor
    """Contiguous; written to in place."""
    weight_decay: float
    """Share taken off per unit of learning rate."""
    scales: bool
    """Scales of quantised weights: those of zero are held there, and no other becomes zero or changes its sign."""


class Walk(Protocol):
    """How a step moves tensors."""

    def save(self) -> None:
        """Remembers where the tensors are."""

    def move(self, seed: int, step: int, direction: int, sign: int) -> None:
        """Goes to t + sign e u, for sign 1 and then, perhaps, -1."""

    def restore(self) -> None:
        """Goes back to where ``save`` was called."""

    def update(self, seed: int, step: int, lr: float, derivatives: Sequence[float]) -> None:
        """Takes the step."""


class TiledWalk:
    """Restores exactly from a copy; every product is rounded and then added, never fused."""

    def __init__(
        self, moved: list[Moved], settings: Estimator, epsilon: float, unit: float, units: list[float]
    ) -> None:
        """Args describe the whole run.

        Args:
            moved: Tensors, float32 or float64; their order numbers their noise.
            settings: Of the estimator.
            epsilon: Distance e.
            unit: Median size m of all tensors.
            units: Each tensor's own, for ``per="tensor"``.
        """
        self.moved, self.settings = moved, settings
        self.epsilon, self.unit, self.units = epsilon, unit, units
        self._saved: list[Tensor] = []
        self._at, self._last = 0.0, (0, 0, 0)

    def save(self) -> None:
        """Copies the tensors, or remembers that they have not moved."""
        self._at = 0.0
        if self.settings.restore == "additive":
            return
        if not self._saved:
            self._saved = [torch.empty_like(one.tensor) for one in self.moved]
        for one, copy in zip(self.moved, self._saved, strict=True):
            copy.copy_(one.tensor)

    def move(self, seed: int, step: int, direction: int, sign: int) -> None:
        """Goes to t + sign e u.

        Args:
            seed: Of the noise.
            step: Its number.
            direction: Which of the step's.
            sign: 1 or -1.
        """
        if self.settings.restore == "additive":
            if sign == 1:
                self.restore()
            self._last = (seed, step, direction)
            self._add((sign - self._at) * self.epsilon)
            self._at = float(sign)
            return
        for number, one in enumerate(self.moved):
            source = self._saved[number].view(-1)
            for tile, start in _tiles(one.tensor):
                base = source[start : start + tile.numel()]
                u = self._direction(number, base, start, (seed, step, direction))
                torch.add(base, u.mul_(sign * self.epsilon), out=tile)

    def restore(self) -> None:
        """Copies the tensors back, or goes the way back."""
        if self.settings.restore == "additive":
            if self._at:
                self._add(-self._at * self.epsilon)
                self._at = 0.0
            return
        for one, copy in zip(self.moved, self._saved, strict=True):
            one.tensor.copy_(copy)

    def update(self, seed: int, step: int, lr: float, derivatives: Sequence[float]) -> None:
        """t <- t - (sum over directions of (lr d / R) u) - lr wd t.

        Args:
            seed: Of the noise.
            step: Its number.
            lr: Learning rate.
            derivatives: What to apply, one a direction; all zero and without decay leaves every tensor as it is.
        """
        for number, one in enumerate(self.moved):
            for tile, start in _tiles(one.tensor):
                total = torch.zeros_like(tile)
                for direction, d in enumerate(derivatives):
                    u = self._direction(number, tile, start, (seed, step, direction))
                    total.add_(u.mul_(lr * d / len(derivatives)))
                if one.weight_decay:
                    total.add_(tile * (lr * one.weight_decay))
                if one.scales:
                    sign, least = tile.sign(), tile.abs().clamp_(max=FLOOR)
                    tile.sub_(total).mul_(sign)
                    torch.maximum(tile, least, out=tile)
                    tile.mul_(sign)
                else:
                    tile.sub_(total)

    def _add(self, amount: float) -> None:
        for number, one in enumerate(self.moved):
            for tile, start in _tiles(one.tensor):
                tile.add_(self._direction(number, tile, start, self._last).mul_(amount))

    def _direction(self, number: int, base: Tensor, start: int, place: tuple[int, int, int]) -> Tensor:
        """Direction u of a tile at ``base``."""
        seed, step, direction = place
        settings, one = self.settings, self.moved[number]
        z = noise(
            seed,
            step,
            number,
            start,
            base.numel(),
            direction=direction,
            kind=settings.noise,
            device=base.device,
        ).to(base.dtype)
        if settings.per == "tensor":
            z.mul_(self.units[number] / self.unit)
        elif settings.per == "element":
            z.mul_(base.abs().mul_(1 / self.unit))
        return z.masked_fill_(base == 0, 0) if one.scales else z


def _tiles(tensor: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Parts of a contiguous tensor, sharing its memory, each with the number of its first element."""
    flat = tensor.view(-1)
    for start in range(0, flat.numel(), TILE):
        yield flat[start : start + TILE], start
