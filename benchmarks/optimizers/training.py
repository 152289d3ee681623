"""The training that every arm gets: the same warm-up and cosine, the same batches, no clipping."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from benchmarks.optimizers.held import Held, state_bytes
from trainers.schedule import factor

B = TypeVar("B")
"""A batch, as the loss wants it."""
Optimizers = Sequence[torch.optim.Optimizer]
RATES = ("lr", "adam_lr")
"""Entries of a parameter group that are learning rates."""


@dataclass(frozen=True)
class Trained:
    """What training cost."""

    diverged: bool
    """Whether the loss stopped being a number, which ended the run."""
    state_bytes: int
    """Most that the optimizers' state was, looked at after the first, the middle and the last step."""
    held_bytes: int
    """The same of all that they held, bases that layers share and working memory included."""
    step_seconds: list[float]
    """Forward, backward and step, of each step: seconds of the processor, so that other processes hardly matter. With
    more threads than one it is the sum over them."""
    optimizer_seconds: list[float]
    """The optimizers' part of it."""
    last_loss: float
    """Mean training loss over the last tenth of the steps, in nats per token."""


def train(
    model: nn.Module,
    build: Callable[[nn.Module], Optimizers],
    loss: Callable[[B], Tensor],
    batches: Iterable[B],
    *,
    steps: int,
    warmup: int,
) -> Trained:
    """Train ``model`` in place, one batch a step."""
    source = iter(batches)
    drawn = [next(source)]  # before counting begins: what the source keeps is not the optimizers'
    held = Held()
    optimizers = build(model)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [{name: group[name] for name in RATES if name in group} for group in groups]
    took, stepped, losses = list[float](), list[float](), list[float]()
    state = size = 0
    model.train()
    for step in range(steps):
        share = factor(step, total=steps, warmup=warmup, schedule="cosine")
        for group, peak in zip(groups, peaks, strict=True):
            group.update({name: value * share for name, value in peak.items()})
        began = time.process_time()
        found = loss(drawn.pop() if drawn else next(source))
        found.backward()  # type: ignore[no-untyped-call]
        between = time.process_time()
        for optimizer in optimizers:
            optimizer.step()
        ended = time.process_time()
        took.append(ended - began)
        stepped.append(ended - between)
        losses.append(found.item())
        del found
        if step in (0, steps // 2, steps - 1):
            state, size = max(state, state_bytes(optimizers)), max(size, held.bytes(model.parameters()))
        for parameter in model.parameters():
            parameter.grad = None
        if not math.isfinite(losses[-1]):
            break
    last = losses[-max(1, steps // 10) :]
    return Trained(not math.isfinite(losses[-1]), state, size, took, stepped, sum(last) / len(last))
