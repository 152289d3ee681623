"""Zeroth-order steps in NumPy, one element's formula at a time, from the mathematics and the published algorithm.

``dtype`` is what the tensors are held and rounded in: every product is rounded, then added. Losses, derivatives and all
that is made of them are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

Arrays = list[np.ndarray[Any, Any]]
Loss = Callable[[Arrays], float]


@cache
def _table() -> np.ndarray[Any, Any]:
    return np.array([NormalDist().inv_cdf((k + 0.5) / 65536) for k in range(65536)], dtype=np.float32)


def bits(seed: int, step: int, tensor: int, direction: int, blocks: int) -> np.ndarray[Any, Any]:
    """128 bits of each of the first blocks, (blocks, 4) uint32."""
    c = [np.arange(blocks, dtype=np.uint64)] + [
        np.full(blocks, word, dtype=np.uint64) for word in (direction, tensor, step)
    ]
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    keys = (seed & 0xFFFFFFFF, seed >> 32)
    for turn in range(10):
        k = [np.uint64((keys[i] + turn * weyl) & 0xFFFFFFFF) for i, weyl in enumerate((0x9E3779B9, 0xBB67AE85))]
        one, two = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(two >> shift) ^ c[1] ^ k[0], two & low, (one >> shift) ^ c[3] ^ k[1], one & low]
    return np.stack(c, axis=1).astype(np.uint32)


def draw(seed: int, step: int, tensor: int, direction: int, count: int, kind: str) -> np.ndarray[Any, Any]:
    """(count,) float32."""
    if kind == "normal":
        words = bits(seed, step, tensor, direction, -(-count // 8))
        halves = np.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)], axis=2)
        return _table()[halves.reshape(-1)[:count]]
    words = bits(seed, step, tensor, direction, -(-count // 128))
    ones = (words[:, :, None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    return (1 - 2 * ones.reshape(-1)[:count].astype(np.int64)).astype(np.float32)


@dataclass
class Oracle:
    """The default mode."""

    tensors: Arrays
    scales: list[bool]
    decay: list[float]
    seed: int
    eps_rel: float = 1e-3
    per: str = "all"
    noise: str = "normal"
    samples: int = 1
    sides: int = 2
    clip: float | None = None
    clip_quantile: float = 1.0
    normalise: bool = False
    window: int = 100
    step_number: int = 0
    seen: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dtype = self.tensors[0].dtype.type
        self.unit = self._median(self.tensors)
        self.units = [self._median([t]) if np.any(t) else 0.0 for t in self.tensors]
        self.epsilon = self.eps_rel * self.unit

    @staticmethod
    def _median(tensors: Arrays) -> float:
        sizes = np.sort(np.concatenate([np.abs(t.astype(np.float32)).reshape(-1) for t in tensors]))
        sizes = sizes[sizes > 0]
        return float(sizes[(len(sizes) - 1) // 2])

    def _direction(self, number: int, direction: int) -> np.ndarray[Any, Any]:
        t = self.tensors[number]
        z = draw(self.seed, self.step_number, number, direction, t.size, self.noise).astype(self.dtype).reshape(t.shape)
        if self.per == "tensor":
            z = z * self.dtype(self.units[number] / self.unit)
        if self.per == "element":
            z = z * (np.abs(t) * self.dtype(1 / self.unit))
        return np.where(t == 0, self.dtype(0), z) if self.scales[number] else z

    def _at(self, direction: int, sign: int) -> Arrays:
        amount = self.dtype(sign * self.epsilon)
        return [t + self._direction(number, direction) * amount for number, t in enumerate(self.tensors)]

    def _applied(self, raw: float) -> float:
        if not math.isfinite(raw):
            return 0.0
        last = self.seen[-self.window :]
        scale = 1.0
        if self.normalise:
            scale = math.fsum([*last, abs(raw)]) / (len(last) + 1)
        value, limit = raw / scale, self.clip
        if self.clip is None and self.clip_quantile < 1 and len(self.seen) >= 20:
            limit = sorted(last)[math.ceil(self.clip_quantile * len(last)) - 1] / scale
        clipped = value if limit is None or abs(value) <= limit else math.copysign(limit, value)
        return clipped * (self.unit if self.normalise else 1.0)

    def step(self, loss: Loss, lr: float) -> None:
        """One step."""
        self.step_number += 1
        middle = loss(self.tensors) if self.sides == 1 else 0.0
        raws = []
        for direction in range(self.samples):
            plus = loss(self._at(direction, 1))
            minus = middle if self.sides == 1 else loss(self._at(direction, -1))
            raws.append((plus - minus) / (self.sides * self.epsilon))
        applied = []
        for raw in raws:
            applied.append(self._applied(raw))
            if math.isfinite(raw):
                self.seen.append(abs(raw))
        if not any(math.isfinite(raw) for raw in raws):
            return
        after = []
        for number, t in enumerate(self.tensors):
            total = np.zeros_like(t)
            for direction, d in enumerate(applied):
                total = total + self._direction(number, direction) * self.dtype(lr * d / self.samples)
            if self.decay[number]:
                total = total + t * self.dtype(lr * self.decay[number])
            moved = t - total
            if self.scales[number]:
                least = np.minimum(np.abs(t), self.dtype(np.float32(1e-7) if self.dtype is np.float32 else 1e-7))
                moved = np.where(t > 0, np.maximum(moved, least), np.where(t < 0, np.minimum(moved, -least), t))
            after.append(moved)
        self.tensors = after


@dataclass
class Official:
    """The published algorithm in its own order: one seed a step, torch's draws replayed, weights before scales."""

    weights: Arrays
    decay: list[float]
    scales: Arrays
    seeds: Callable[[], int]
    eps: float = 1e-3
    clip: float | None = 100.0

    def _draws(self, seed: int) -> list[Arrays]:
        torch.manual_seed(seed)
        return [
            [torch.normal(0, 1, size=t.shape, dtype=torch.from_numpy(t).dtype).numpy() for t in tensors]
            for tensors in (self.weights, self.scales)
        ]

    @staticmethod
    def _times(z: np.ndarray[Any, Any], factor: float) -> np.ndarray[Any, Any]:
        """One product, computed in float32 at least, rounded to the tensor's own dtype."""
        wide = np.float64 if z.dtype == np.float64 else np.float32
        return (z.astype(wide) * wide(factor)).astype(z.dtype)

    def perturb(self, times: int, seed: int) -> None:
        """t <- t + times z eps."""
        zs = self._draws(seed)
        moved = [
            [t + self._times(self._times(z, times), self.eps) for t, z in zip(tensors, draws, strict=True)]
            for tensors, draws in zip((self.weights, self.scales), zs, strict=True)
        ]
        self.weights, self.scales = moved

    def step(self, loss: Callable[[Arrays, Arrays], float], lr: float) -> None:
        """Steps 2 to 7 of the algorithm."""
        seed = self.seeds()
        self.perturb(1, seed)
        plus = loss(self.weights, self.scales)
        self.perturb(-2, seed)
        minus = loss(self.weights, self.scales)
        d = (plus - minus) / (2 * self.eps)
        self.perturb(1, seed)
        if self.clip is not None:
            d = min(max(-self.clip, d), self.clip)
        zs = self._draws(seed)
        for number, (t, z) in enumerate(zip(self.weights, zs[0], strict=True)):
            change = self._times(z, d)
            if self.decay[number]:
                change = change + self._times(t, self.decay[number])
            self.weights[number] = t - self._times(change, lr)
        for number, (t, z) in enumerate(zip(self.scales, zs[1], strict=True)):
            self.scales[number] = np.maximum(t - self._times(self._times(z, d), lr), np.array(1e-7, dtype=t.dtype))
