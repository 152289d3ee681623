"""Gradient release: each parameter is stepped as soon as its gradient is there, and the gradient is freed at once.

A backward pass then holds one gradient at a time instead of all of them (AdaLomo's and torchtune's "optimizer in
backward"). What it rules out is guarded here: a second backward pass before the step would step twice on halves of a
batch, and the sum of two signs is not the sign of their sum; a norm over all gradients does not exist when the first of
them is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trainers.optim.base import LowMemoryOptimizer
from trainers.optim.tensors import sharded


def release_gradients(
    optimizer: LowMemoryOptimizer, *, accumulation: int = 1, clip_norm: float | None = None
) -> Callable[[], None]:
    """Makes an optimizer step inside the backward pass.

    The loop stays as it is: ``optimizer.step()`` after ``backward()`` finds no gradient left, and marks the end of the
    step. Learning rates must be set before ``backward()``. The weights are bitwise those of stepping afterwards, unless
    a parameter is used again by the part of the backward pass that is still to come (a layer recomputed by activation
    checkpointing has finished by then; a parameter that is read outside autograd has not).

    Args:
        optimizer: Of this package.
        accumulation: Micro-batches a step, as the loop has it.
        clip_norm: Largest norm of all gradients together, as the loop has it; None or 0 is no clipping.

    Returns:
        Call it to go back to stepping after the backward pass.

    Raises:
        ValueError: Gradients are accumulated or clipped, or are not final when a parameter's hook runs: with several
            processes they are averaged later.
    """
    if accumulation != 1:
        raise ValueError(
            f"gradient release steps at every backward pass, so gradients cannot be accumulated over {accumulation} "
            "micro-batches: set accumulation to 1, or do without release"
        )
    if clip_norm:
        raise ValueError(
            "gradient release uses each gradient before the norm of all of them is known: set clip_norm to 0 (sign and "
            "Adam updates have a size of their own), or do without release"
        )
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise ValueError("gradient release sees gradients before they are averaged over processes: run one process")
    stepped: set[Tensor] = set()
    handles: list[Any] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert not sharded(parameter), "one process shards nothing"
            if parameter.requires_grad:
                hook = _hook(optimizer, stepped)
                handles.append(parameter.register_post_accumulate_grad_hook(hook))
    handles.append(optimizer.register_step_post_hook(lambda *_: stepped.clear()))

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def _hook(optimizer: LowMemoryOptimizer, stepped: set[Tensor]) -> Callable[[Tensor], None]:
    @torch.no_grad()
    def step(parameter: Tensor) -> None:
        if parameter in stepped:
            raise ValueError(
                "a second backward pass before optimizer.step(): gradient release steps at every backward pass, so "
                "gradients cannot be accumulated"
            )
        stepped.add(parameter)
        optimizer.take(parameter)
        parameter.grad = None

    return step
