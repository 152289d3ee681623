"""Loss and accuracy on held-out rows, weighted by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from core.data.example import Example
from core.data.stream import Stream
from trainers.batch import Collate


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
    collate: Collate,
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

    Returns:
        The score over all rows.
    """
    processes = accelerator.num_processes
    # One step that holds all rows, dealt to the processes as a training step would be.
    share = next(
        Stream(
            rows,
            batch_size=size,
            accumulation=-(-len(rows) // (size * processes)),
            rank=accelerator.process_index,
            world=processes,
        )
    )
    totals = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    training = loss.training
    loss.eval()
    try:
        with torch.no_grad():
            for batch in share:
                check()
                value, hits = loss(**collate(batch))
                totals += torch.stack([value, hits]).double()
    finally:
        loss.train(training)
    nats, hit = accelerator.reduce(totals).tolist()
    tokens = sum(row.trained for row in rows)
    return Score(nats / tokens, hit / tokens)
