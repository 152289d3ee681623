"""Rows to the tensors that the loss takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from core.data.batch import collate
from core.data.example import Example

Collate = Callable[[Sequence[Example]], dict[str, Tensor]]


def collator(*, pad_id: int, device: torch.device) -> Collate:
    """Makes the function that turns rows into what the loss takes.

    Args:
        pad_id: Token to fill up with; the attention mask hides it.
        device: Where the model is.

    Returns:
        A function from rows to ``TokenLoss``'s arguments, (B, T) each, on that device.
    """

    def build(rows: Sequence[Example]) -> dict[str, Tensor]:
        batch = collate(rows, pad_id=pad_id).to(device)
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "labels": batch.labels}
        # Without a mask, positions that begin again keep packed rows apart.
        return inputs if batch.attention_mask is None else inputs | {"attention_mask": batch.attention_mask}

    return build
