"""MeZO: every weight, by two losses a step and no gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainers.method import Attached, Method, MethodConfig, TrainContext
from trainers.optim.estimator import Normalised
from trainers.optim.settings import in_range

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class MezoConfig(Normalised, MethodConfig):
    """Settings of ``mezo``."""

    weight_decay: float = 0.0
    """Share of each weight taken off per unit of learning rate (decoupled); biases and norms are spared."""

    def __post_init__(self) -> None:
        Normalised.__post_init__(self)
        in_range("weight_decay", self.weight_decay, low=0)


def attach(model: PreTrainedModel, config: MezoConfig, context: TrainContext) -> Attached:
    """Makes every weight trainable, under ``Qzo``.

    Args:
        model: The base, in float32.
        config: Of the estimator.
        context: The run around it.

    Returns:
        The model, the optimizer, and what it measures.
    """
    from trainers.optim import Qzo

    model.requires_grad_(True)
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    optimizer = Qzo(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=context.learning_rate,
        seed=context.seed,
        **config.estimator(),
    )
    return Attached(model, optimizer, optimizer.measured)


METHOD = Method(
    name="mezo",
    summary="Every weight, by the difference of two losses along a random direction: no gradients and no moments.",
    paper="2305.17333",
    config=MezoConfig,
    attach=attach,
    makes="weights",
    learning_rate=1e-3,
    needs_gradients=False,
)
