"""Which rows of a step go through the model together, and on which process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from core.data.example import IGNORED, Example


def trained_tokens(rows: Sequence[Example]) -> int:
    """How many labels the loss sees in these rows."""
    return sum(row.trained for row in rows)


def micro_batches(rows: Sequence[Example], *, size: int, rank: int, processes: int) -> list[list[Example]]:
    """This process's share of a step, in batches of at most ``size`` rows of like length.

    Every process gets the same number of batches, since each backward pass is collective: where rows run out, a batch
    holds the shortest row with no label trained, which adds exactly zero to the loss and to the gradient.

    Args:
        rows: The step's rows, the same on every process.
        size: Most rows in one batch.
        rank: This process.
        processes: How many there are.
    """
    order = sorted(range(len(rows)), key=lambda index: (-len(rows[index].input_ids), index))
    batches = [[rows[index] for index in order[start : start + size]] for start in range(0, len(order), size)]
    idle = rows[order[-1]]
    idle = replace(idle, labels=[IGNORED] * len(idle.labels))
    while len(batches) % processes:
        batches.append([idle])
    return batches[rank::processes]
