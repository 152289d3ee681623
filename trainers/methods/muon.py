"""Muon: orthogonalised momentum for the matrices of the blocks, AdamW for the rest; torch's own, as a baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trainers.method import Attached, Method, MethodConfig, TrainContext
from trainers.optim.settings import in_range

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class MuonConfig(MethodConfig):
    """Settings of ``muon``."""

    momentum: float = 0.95
    """Decay of the mean of the gradient, in [0, 1)."""
    nesterov: bool = True
    """Look one step ahead along the mean."""
    adjust: Literal["original", "match_rms_adamw"] = "original"
    """Factor for an (R, C) matrix: sqrt(max(1, R / C)), or 0.2 sqrt(max(R, C)), which moves weights as AdamW does."""
    weight_decay: float = 0.0
    """Share of each weight taken off per unit of learning rate (decoupled); biases and norms are spared."""
    targets: tuple[str, ...] = ()
    """Parts of names of the layers whose matrices Muon trains; none means the linear layers of attention and MLP."""
    adam_ratio: float = 0.015
    """Learning rate of embeddings, head, norms and biases, which AdamW trains, over that of the matrices."""
    adam_beta1: float = 0.9
    """AdamW's decay of the mean of the gradient, in [0, 1)."""
    adam_beta2: float = 0.95
    """AdamW's decay of the mean of the squared gradient, in [0, 1)."""

    def __post_init__(self) -> None:
        for name in ("momentum", "adam_beta1", "adam_beta2"):
            in_range(name, getattr(self, name), low=0, high=1, open_high=True)
        if not self.adam_ratio > 0:
            raise ValueError(f"adam_ratio must be positive, not {self.adam_ratio}")
        in_range("weight_decay", self.weight_decay, low=0)


def attach(model: PreTrainedModel, config: MuonConfig, context: TrainContext) -> Attached:
    """Makes every weight trainable: matrices of blocks under Muon, the rest under AdamW with a rate of its own.

    Args:
        model: The base.
        config: Rates and decays.
        context: The run around it.

    Returns:
        The model and the optimizer.

    Raises:
        ValueError: No layer is named by ``targets``.
    """
    from trainers.optim.muon import MuonAdamW
    from trainers.optim.parameters import PROJECTED, split_parameters

    model.requires_grad_(True)
    groups = []
    for group in split_parameters(model, project=config.targets or PROJECTED):
        decay = group.get("weight_decay", config.weight_decay)
        if group["role"] == "projected":
            # torch's Muon takes matrices alone; stacked experts and convolutions stay with AdamW.
            groups.append(
                {
                    "params": [p for p in group["params"] if p.dim() == 2],
                    "role": "projected",
                    "weight_decay": decay,
                    "momentum": config.momentum,
                    "nesterov": config.nesterov,
                    "adjust_lr_fn": config.adjust,
                }
            )
        rest = [p for p in group["params"] if p.dim() != 2 or group["role"] == "full"]
        if rest:
            groups.append(
                {
                    "params": rest,
                    "role": "full",
                    "weight_decay": decay,
                    "lr": context.learning_rate * config.adam_ratio,
                    "betas": (config.adam_beta1, config.adam_beta2),
                    "fused": all(p.device.type in ("cpu", "cuda") for p in rest),
                }
            )
    return Attached(model, MuonAdamW(groups, lr=context.learning_rate))


METHOD = Method(
    name="muon",
    summary="Every weight, with orthogonalised momentum for the matrices of the blocks: half of AdamW's state.",
    paper="2502.16982",
    config=MuonConfig,
    attach=attach,
    makes="weights",
    learning_rate=2e-3,
)
