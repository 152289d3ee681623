"""Full fine-tuning: AdamW on every weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainers.method import Attached, Method, MethodConfig, TrainContext

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class FullConfig(MethodConfig):
    """Settings of ``full``."""

    beta1: float = 0.9
    """Decay of the mean of the gradient, in [0, 1)."""
    beta2: float = 0.999
    """Decay of the mean of the squared gradient, in [0, 1)."""
    epsilon: float = 1e-8
    """Added to the root of the mean square; larger is calmer."""
    weight_decay: float = 0.0
    """Share of each weight taken off per unit of learning rate (decoupled); biases and norms are spared."""

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)}")
        if not self.epsilon > 0:
            raise ValueError(f"epsilon must be positive, not {self.epsilon}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must not be negative, not {self.weight_decay}")


def attach(model: PreTrainedModel, config: FullConfig, context: TrainContext) -> Attached:
    """Makes every weight trainable, under torch's AdamW (its fused kernel where the device has one)."""
    import torch

    model.requires_grad_(True)
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=context.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=all(p.device.type in ("cpu", "cuda") for p in parameters),
    )
    return Attached(model, optimizer)


METHOD = Method(
    name="full",
    summary="Every weight, with AdamW: the most capacity, and four times the model's memory.",
    paper="1711.05101",
    config=FullConfig,
    attach=attach,
    makes="weights",
    learning_rate=2e-5,
)
