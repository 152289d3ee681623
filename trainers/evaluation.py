"""Loss and accuracy on held-out rows, weighted by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from core.data.example import Example
from trainers.split import micro_batches, trained_tokens


class Score(NamedTuple):
    """What an evaluation found."""

    loss: float
    """Mean cross-entropy per trained token, in nats."""
    accuracy: float
    """Share of trained tokens that the model ranks first."""


def evaluate(
    loss: nn.Module,
    rows: Sequence[Example],
    *,
    size: int,
    collate: Callable[[list[Example]], dict[str, torch.Tensor]],
    accelerator: Accelerator,
    check: Callable[[], None],
) -> Score:
    """Scores a model in evaluation mode; every process takes part.

    Args:
        loss: A ``TokenLoss``, as prepared by accelerate.
        rows: All held-out rows, the same on every process.
        size: Rows in one forward pass.
        collate: Rows to the loss's tensors, on its device.
        accelerator: Sums over processes.
        check: Called before each forward pass; may raise ``Interrupted``.
    """
    totals = torch.zeros(2, dtype=torch.float64)
    training = loss.training
    loss.eval()
    try:
        with torch.no_grad():
            for batch in micro_batches(
                rows, size=size, rank=accelerator.process_index, processes=accelerator.num_processes
            ):
                check()
                value, hits = loss(**collate(batch))
                totals += torch.tensor([float(value), float(hits)], dtype=torch.float64)
    finally:
        loss.train(training)
    summed = accelerator.reduce(totals.float() if accelerator.device.type == "mps" else totals.to(accelerator.device))
    tokens = trained_tokens(rows)
    return Score(float(summed[0]) / tokens, float(summed[1]) / tokens)
