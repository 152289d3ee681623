"""What a training method is: its settings, what it makes, and how it attaches to a model.

Importing this file does not import torch: the API reads methods to describe and validate requests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodConfig:
    """Base of every method's settings: frozen, a docstring under each field, checks in ``__post_init__``."""

    def warnings(self) -> list[str]:
        """Settings that have no effect as they are combined, one sentence each."""
        return []


class Attached(NamedTuple):
    """A model made ready to train."""

    model: torch.nn.Module
    """What to call forward on: the model itself, or the adapter's wrapper around it."""
    optimizer: torch.optim.Optimizer
    """Its ``step(closure)`` calls the closure and returns the loss. A step that moves parameters between two calls of
    the closure must move them back when the closure raises."""
    measured: Callable[[], dict[str, float]] = dict
    """What the last step measured beside the loss, for its metric event: finite numbers by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainContext:
    """All that a method may know about the run around it."""

    learning_rate: float
    """Peak learning rate, after ``learning_rate_multiplier``; the loop applies the schedule."""
    seed: int
    """Seed of the run, the same on every process."""
    activation_checkpointing: bool
    """Whether blocks are recomputed in the backward pass: an adapter then needs inputs that require gradients."""
    mean: Callable[[float], float]
    """Mean of a scalar over all processes; the identity on one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One way to fine-tune, as a value. ``trainers.registry.METHODS`` holds them all."""

    name: str
    """What requests and run files call it."""
    summary: str
    """One sentence for the API and the docs."""
    paper: str
    """arXiv identifier."""
    config: type[MethodConfig]
    """Its settings; their docstrings become the API's descriptions."""
    attach: Callable[[Any, Any, TrainContext], Attached]
    """``(model, config, context) -> Attached``; torch is imported inside."""
    makes: Literal["weights", "adapter", "scales"]
    """What the artifact holds."""
    learning_rate: float
    """Peak learning rate when the run file names none."""
    needs_gradients: bool = True
    """False for zeroth-order methods: their ``step`` calls the closure under ``torch.no_grad()``."""
    works_on_4bit: bool = False
    """Whether ``base: bnb-nf4`` is allowed."""
    inherits: tuple[str, ...] = ()
    """Of a method that makes an adapter: settings that an earlier adapter fixes when a run starts from it."""

    def quant(self, config: MethodConfig) -> Literal["none", "bnb-nf4"]:
        """How the base's weights are to be loaded for this configuration."""
        base: Literal["none", "bnb-nf4"] = getattr(config, "base", "none") if self.works_on_4bit else "none"
        return base
