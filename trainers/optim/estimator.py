"""Settings of the zeroth-order estimator, checked without torch, for whoever judges requests."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from trainers.optim.settings import in_range, whole

Kind = Literal["normal", "rademacher"]

OFFICIAL: dict[str, Any] = {
    "compat": "official",
    "eps": 1e-3,
    "clip": 100.0,
    "restore": "additive",
    "nan": "official",
}
"""The published code's choices; each is a setting of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimator:
    """How a derivative is estimated along random directions, and what is made of it.

    The point is moved to t + e u and t - e u, and d = (L(t + e u) - L(t - e u)) / (2 e). The unit m is the median of
    |t| over all elements that are not zero, before the first step.
    """

    eps: float | None = None
    """Distance e, along the noise, of the points whose losses are compared; None: ``eps_rel`` times m, the median size
    of all elements before the first step."""
    eps_rel: float = 1e-3
    """That distance over m: lower is straighter, until the rounding of losses shows."""
    per: Literal["all", "tensor", "element"] = "all"
    """How far noise moves an element: alike for all, in proportion to its tensor's median size, or to its own size."""
    noise: Kind = "normal"
    """Distribution of the noise; ``rademacher`` is 1 or -1, and a third of the work."""
    samples: int = 1
    """Directions a step, whose updates are averaged: calmer, at ``sides`` losses each."""
    sides: int = 2
    """Losses a direction: 2, on either side, or 1, with one more at the point itself for all directions of a step."""
    clip: float | None = None
    """Largest derivative d of the loss along a direction that is applied, either sign (with ``normalise``: d over the
    mean of |d|); None: ``clip_quantile``."""
    clip_quantile: float = 0.99
    """The threshold is this quantile of |d| over the last ``window`` derivatives, from the 20th on; 1: no threshold."""
    normalise: bool = False
    """Divide d by the mean of |d| over ``window``: the learning rate is then the share of m that a step moves."""
    window: int = 100
    """Derivatives that quantile and mean look back on."""
    restore: Literal["copy", "additive"] = "copy"
    """Go back by a saved copy, exactly, or by subtracting what was added: no memory, and a drift of rounding."""
    nan: Literal["skip", "official"] = "skip"
    """A loss that is not finite: skip the step and count it, or, as published, step with d = -clip."""
    patience: int = 20
    """Steps in a row without a finite loss after which the run is given up."""
    compat: Literal["official"] | None = None
    """``official``: draws, order of operations and rounding of the published code; see ``OFFICIAL``."""

    def __post_init__(self) -> None:
        if self.eps is not None and not 0 < self.eps < math.inf:
            raise ValueError(f"eps must be positive, not {self.eps}")
        if not 0 < self.eps_rel < math.inf:
            raise ValueError(f"eps_rel must be positive, not {self.eps_rel}")
        for name in ("samples", "window", "patience"):
            whole(name, getattr(self, name))
        if self.sides not in (1, 2):
            raise ValueError(f"sides must be 1 or 2, not {self.sides}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be positive, not {self.clip}")
        in_range("clip_quantile", self.clip_quantile, low=0.5, high=1)
        for name, words in _WORDS.items():
            if getattr(self, name) not in words:
                raise ValueError(f"{name} must be one of {', '.join(map(str, words))}, not {getattr(self, name)!r}")
        if self.restore == "additive" and self.per == "element":
            raise ValueError("per element needs restore copy: on the way back the elements are others")
        if self.compat == "official":
            for name, only in _PUBLISHED.items():
                if getattr(self, name) != only:
                    raise ValueError(f"compat official has {name} {only}, not {getattr(self, name)}")
        elif self.nan == "official":
            raise ValueError("nan official goes with compat official alone: give skip")

    def warnings(self) -> list[str]:
        """Settings that have no effect as they are combined, one sentence each."""
        default = {name: field.default for name, field in self.__dataclass_fields__.items()}
        idle = []
        if self.eps is not None and self.eps_rel != default["eps_rel"]:
            idle.append("eps_rel has no effect beside eps")
        by_quantile = self.clip is None and self.compat is None and self.clip_quantile < 1
        if not by_quantile and self.clip_quantile not in (default["clip_quantile"], 1):
            idle.append("clip_quantile has no effect beside clip, nor with compat official")
        if not by_quantile and not self.normalise and self.window != default["window"]:
            idle.append("window has no effect unless clip_quantile or normalise looks back on it")
        return idle

    @property
    def needs_unit(self) -> bool:
        """Whether the unit m is used."""
        return self.eps is None or self.per != "all" or self.normalise


@dataclass(frozen=True, kw_only=True, slots=True)
class Normalised(Estimator):
    """The estimator as jobs have it: d in units of its own running mean, so that one learning rate fits many models."""

    normalise: bool = True
    """Divide d by the mean of |d| over ``window``: the learning rate is then the share of m that a step moves."""
    clip: float | None = 3.0
    """Largest derivative d of the loss along a direction that is applied, either sign (with ``normalise``: d over the
    mean of |d|); None: ``clip_quantile``."""

    def estimator(self) -> dict[str, Any]:
        """The settings that are the estimator's."""
        return {name: getattr(self, name) for name in Estimator.__dataclass_fields__}


_WORDS: dict[str, tuple[str | None, ...]] = {
    "per": ("all", "tensor", "element"),
    "noise": ("normal", "rademacher"),
    "restore": ("copy", "additive"),
    "nan": ("skip", "official"),
    "compat": (None, "official"),
}
_PUBLISHED: dict[str, Any] = {"per": "all", "noise": "normal", "samples": 1, "sides": 2, "normalise": False}
