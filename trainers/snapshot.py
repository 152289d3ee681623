"""All that a run must remember to go on as if it had never stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core.checkpoint import flatten_optimizer, unflatten_optimizer

MODEL = "model."
OPTIMIZER = "optimizer."


@dataclass
class Progress:
    """Where a run stands after a whole number of optimizer steps."""

    step: int = 0
    """Optimizer steps taken."""
    trained_tokens: int = 0
    """Labels trained on so far, over all processes."""
    best_step: int | None = None
    """Step with the lowest loss on the held-out rows."""
    best_loss: float | None = None
    """That loss."""
    stale: int = 0
    """Evaluations since then."""
    pending: dict[str, Any] | None = None
    """What the last step measured, while its evaluation and its lines in the logs are still to come."""
    stopped_early: bool = False
    """Whether early stopping ended the run."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON; ``Progress(**data)`` reads it back."""
        return asdict(self)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name, tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What changes while training: trained parameters and the optimizer's state; a frozen base is not stored.

    Args:
        model: As attached.
        optimizer: Its optimizer.

    Returns:
        Tensors by name, and the optimizer's other values as JSON.
    """
    state, values = flatten_optimizer(optimizer.state_dict())
    found = {MODEL + name: parameter.detach() for name, parameter in trained(model).items()}
    return found | {OPTIMIZER + name: tensor for name, tensor in state.items()}, values


def restore_model(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Puts trained parameters back, in place.

    Args:
        model: As attached.
        saved: Tensors of a checkpoint.

    Raises:
        ValueError: The checkpoint holds other parameters than this model trains.
    """
    wanted = trained(model)
    stored = {name.removeprefix(MODEL): tensor for name, tensor in saved.items() if name.startswith(MODEL)}
    if wanted.keys() != stored.keys() or any(wanted[name].shape != stored[name].shape for name in wanted):
        raise ValueError("the checkpoint holds other parameters than this run trains; use a fresh output_dir")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(stored[name])


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Puts the optimizer's state back.

    Args:
        optimizer: Freshly made for the same parameters.
        saved: Tensors of a checkpoint.
        values: The optimizer's other values.
    """
    own = {name.removeprefix(OPTIMIZER): tensor for name, tensor in saved.items() if name.startswith(OPTIMIZER)}
    optimizer.load_state_dict(unflatten_optimizer(own, dict(values)))
