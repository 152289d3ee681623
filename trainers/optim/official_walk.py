"""The published code's way of moving tensors, in its order and with its rounding, to be compared with.

From arXiv 2505.13430 and its code, restated. torch's own generator is seeded anew before each pass, and each tensor
draws in its own dtype, in turn: weights first, then scales. The generator here is private; it draws the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trainers.optim.estimator import Estimator
from trainers.optim.walk import FLOOR, Moved


class OfficialWalk:
    """t <- t + z e, t <- t - 2 z e, t <- t + z e, t <- t - lr (d z + wd t); scales are at least 1e-7 after it."""

    def __init__(self, moved: list[Moved], settings: Estimator, epsilon: float) -> None:
        """Args describe the whole run.

        Args:
            moved: Tensors of any floating dtype.
            settings: Of the estimator.
            epsilon: Distance e.
        """
        self.moved = [one for one in moved if not one.scales] + [one for one in moved if one.scales]
        self.epsilon = epsilon
        self.exact = settings.restore == "copy"
        self._saved: list[Tensor] = []
        self._seed = 0
        self._at = 0

    def save(self) -> None:
        """Copies the tensors, if they are to be restored exactly."""
        self._at = 0
        if self.exact:
            self._saved = [one.tensor.clone() for one in self.moved]

    def move(self, seed: int, step: int, direction: int, sign: int) -> None:
        """Adds 1 or -2 times e z.

        Args:
            seed: Of the draws.
            step: Not used.
            direction: Not used.
            sign: 1, then -1.
        """
        del step, direction
        self._seed = seed
        self._add(sign - self._at)
        self._at = sign

    def restore(self) -> None:
        """Adds what is missing, or copies back."""
        if self.exact:
            for one, copy in zip(self.moved, self._saved, strict=True):
                one.tensor.copy_(copy)
            self._saved = []
        elif self._at:
            self._add(-self._at)
        self._at = 0

    def update(self, seed: int, step: int, lr: float, derivatives: Sequence[float]) -> None:
        """Takes the step.

        Args:
            seed: Of the draws.
            step: Not used.
            lr: Learning rate.
            derivatives: One.
        """
        del step
        (d,) = derivatives
        for one, z in self._draws(seed):
            z.mul_(d)
            if one.weight_decay:
                z.add_(one.tensor * one.weight_decay)
            one.tensor.sub_(z.mul_(lr))
            if one.scales:
                one.tensor.clamp_(min=FLOOR)

    def _add(self, times: int) -> None:
        for one, z in self._draws(self._seed):
            one.tensor.add_(z.mul_(times).mul_(self.epsilon))

    def _draws(self, seed: int) -> Iterator[tuple[Moved, Tensor]]:
        generators: dict[torch.device, torch.Generator] = {}
        for one in self.moved:
            t = one.tensor
            if t.device not in generators:
                generators[t.device] = torch.Generator(device=t.device).manual_seed(seed)
            yield (
                one,
                torch.normal(0.0, 1.0, size=t.shape, dtype=t.dtype, device=t.device, generator=generators[t.device]),
            )
