"""From examples to padded tensors, and several short rows in one without their seeing each other.

Legend: B rows, T tokens of the longest row.

Packed rows are kept apart by their positions, which begin at 0 again for each: transformers' models turn that into a
block-diagonal mask, sliding windows included, when no attention mask and no cache is given. Hence a packed `Batch` has
no attention mask, and its forward must be called with `use_cache=False`.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from core.data.example import IGNORED, Example


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch; everything int64, padded on the right."""

    input_ids: torch.Tensor
    """(B, T) token ids."""
    attention_mask: torch.Tensor | None
    """(B, T), 1 at real tokens; None in a packed batch, where `position_ids` keep rows apart."""
    position_ids: torch.Tensor
    """(B, T) from 0 in each row; in packed batches from 0 in each packed row and in the padding."""
    labels: torch.Tensor
    """(B, T) token ids where trained on, else -100. Not shifted: the model at t is held to the label at t + 1."""
    tokens: int
    """Real tokens, padding not counted."""
    trained: int
    """Tokens trained on."""

    @property
    def padding(self) -> float:
        """Share of the tokens that are padding, 0 to 1."""
        return 1 - self.tokens / self.input_ids.numel()

    def to(self, device: torch.device | str) -> Batch:
        """Copy the tensors to a device.

        Args:
            device: where to.

        Returns:
            The same batch there.
        """
        mask = None if self.attention_mask is None else self.attention_mask.to(device, non_blocking=True)
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            mask,
            self.position_ids.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.tokens,
            self.trained,
        )


def collate(examples: Sequence[Example], *, pad_id: int, multiple: int = 1) -> Batch:
    """Pad examples to the longest of them.

    Args:
        examples: at least one; packed and single rows may be mixed.
        pad_id: token id for the padding; never trained on and never attended to.
        multiple: T is rounded up to a multiple of this many tokens.

    Returns:
        The batch, on the CPU.

    Raises:
        ValueError: no examples.
    """
    if not examples:
        raise ValueError("a batch needs at least one example")
    width = max(len(example.input_ids) for example in examples)
    width += -width % multiple
    packed = any(len(example.segments) > 1 for example in examples)
    ids = torch.full((len(examples), width), pad_id, dtype=torch.int64)
    labels = torch.full((len(examples), width), IGNORED, dtype=torch.int64)
    positions = torch.arange(width).repeat(len(examples), 1)
    mask = torch.zeros((len(examples), width), dtype=torch.int64)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        ids[row, :length] = torch.tensor(example.input_ids, dtype=torch.int64)
        labels[row, :length] = torch.tensor(example.labels, dtype=torch.int64)
        mask[row, :length] = 1
        if packed:
            start = 0
            for size in (*(example.segments or (length,)), width - length):
                positions[row, start : start + size] = torch.arange(size)
                start += size
    tokens = sum(len(example.input_ids) for example in examples)
    return Batch(ids, None if packed else mask, positions, labels, tokens, sum(example.trained for example in examples))


def pack(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Put several rows into one as long as they fit, each into the fullest one that still takes it.

    The result depends on the examples and their order alone. Best fit, longest first: within 22 % of the least
    possible number of rows, in practice within a few.

    Args:
        examples: single rows.
        max_length: most tokens in a packed row; a row that is longer by itself stays alone.

    Returns:
        Examples with `segments`; every input row is in exactly one of them, unchanged.
    """
    bins: list[list[Example]] = []
    room: list[tuple[int, int]] = []  # (tokens left, -index of the bin), ascending: on a tie the newest bin
    for example in sorted(examples, key=lambda example: -len(example.input_ids)):
        length = len(example.input_ids)
        at = bisect.bisect_left(room, (length, -len(bins)))
        if at < len(room):
            left, key = room.pop(at)
        else:
            left, key = max_length, -len(bins)
            bins.append([])
        bins[-key].append(example)
        if left > length:
            bisect.insort(room, (left - length, key))
    return [_join(rows) for rows in bins]


def _join(rows: list[Example]) -> Example:
    if len(rows) == 1:
        return rows[0]
    return Example(
        line=rows[0].line,
        input_ids=[token for row in rows for token in row.input_ids],
        labels=[label for row in rows for label in row.labels],
        total=sum(max(row.total, len(row.input_ids)) for row in rows),
        segments=tuple(len(row.input_ids) for row in rows),
    )
