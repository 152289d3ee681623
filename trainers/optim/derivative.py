"""From the derivative that was measured to the one that is applied, and what a run remembers of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainers.optim.estimator import Estimator

FEWEST = 20
"""Derivatives seen before a quantile of them is a threshold."""


class Derivatives:
    """Counters and the last |d|, all in small tensors."""

    def __init__(self, settings: Estimator) -> None:
        """Starts with nothing seen.

        Args:
            settings: Of the estimator.
        """
        self.settings = settings
        names = ("step", "seen", "clipped", "skipped", "in_row")
        self.state: dict[str, Tensor] = {name: torch.zeros((), dtype=torch.int64, device="cpu") for name in names}
        self.state["window"] = torch.zeros(settings.window, dtype=torch.float64, device="cpu")
        self._finite = 0

    def count(self, name: str) -> int:
        """One of the counters."""
        return int(self.state[name])

    def begin(self) -> None:
        """Begins a step."""
        self._finite = 0

    def judge(self, raw: float, unit: float) -> tuple[float, bool]:
        """What to apply.

        Args:
            raw: Measured.
            unit: Median size m, for ``normalise``.

        Returns:
            The derivative to apply, 0 where it is not finite (with ``nan="official"`` what the published code makes of
            it), and whether a threshold cut it.
        """
        settings = self.settings
        if settings.compat == "official":
            if not math.isfinite(raw) and settings.nan == "skip":
                return 0.0, False
            limit = math.inf if settings.clip is None else settings.clip
            # Every comparison with NaN is false: so the published code, with Python's max and min, steps by -limit.
            low = raw if raw > -limit else -limit
            applied = low if low < limit else limit
            return (applied, applied != raw) if settings.clip is not None else (raw, False)
        if not math.isfinite(raw):
            return 0.0, False
        last = self.state["window"][: self.count("seen")]
        value, at = raw, settings.clip
        if at is None and settings.clip_quantile < 1 and self.count("seen") >= FEWEST:
            at = float(last.sort().values[math.ceil(settings.clip_quantile * len(last)) - 1])
        if settings.normalise:
            # Rounded once, so that machines that add in another order agree.
            mean = math.fsum([*last.tolist(), abs(raw)]) / (len(last) + 1)
            value, at = self._over(mean, raw, at)
        applied = value if at is None else max(-at, min(value, at))
        return applied * (unit if settings.normalise else 1.0), applied != value

    def _over(self, mean: float, raw: float, limit: float | None) -> tuple[float, float | None]:
        """Derivative and threshold over the mean; a fixed threshold is given so already."""
        if not mean:
            return 0.0, limit
        return raw / mean, limit if limit is None or self.settings.clip is not None else limit / mean

    def observe(self, raw: float, cut: bool) -> None:
        """Remembers a derivative.

        Args:
            raw: Measured.
            cut: Whether it was cut.
        """
        if not math.isfinite(raw):
            self.state["skipped"] += 1
            return
        self._finite += 1
        self.state["window"][self.count("seen") % self.settings.window] = abs(raw)
        self.state["seen"] += 1
        self.state["clipped"] += int(cut)

    def end(self) -> None:
        """Ends a step."""
        self.state["step"] += 1
        if self._finite:
            self.state["in_row"].zero_()
        else:
            self.state["in_row"] += 1
