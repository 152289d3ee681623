"""The keys and values of the rows in the batch, in buffers that we own.

Column c of a row holds its token at absolute position c, so a mask is a comparison of columns with positions; rows may
have any lengths, join at the end and leave from anywhere. Buffers grow by blocks and are handed to attention as views.

Shapes: R rows of capacity, B rows in use, H key/value heads, C columns of capacity, T new tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK = 128  # columns; buffers hold a multiple of it


@dataclass(slots=True)
class _Plan:
    """Where the new tokens of one forward go."""

    width: int  # columns that attention sees
    counts: list[int]  # new tokens per row
    rows: Tensor | None = None  # (N,) int64; None: one row, or every row writes one token
    source: Tensor | None = None  # (N,) int64, column among the new tokens
    target: Tensor | None = None  # (N,) int64, column of the cache


class RowCache:
    """Answers ``update`` as transformers' models ask it of a cache; the scheduler owns the rest.

    Args:
        layers: number of layers that will call ``update``.
        rows: rows of capacity to start with.
        device: of the keys and values; the CPU by default.
    """

    def __init__(self, layers: int, *, rows: int = 1, device: torch.device | None = None) -> None:
        self.lengths: list[int] = []  # tokens per row in use
        self._keys: list[Tensor | None] = [None] * layers  # each (R, H, C, D)
        self._values: list[Tensor | None] = [None] * layers
        self._rows = rows
        self._columns = 0
        self._plan: _Plan | None = None
        self._device = torch.device("cpu") if device is None else device

    @property
    def nbytes(self) -> int:
        """Bytes held by the buffers, used or not."""
        return sum(t.nbytes for t in (*self._keys, *self._values) if t is not None)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The longest row; models ask when they are given no positions."""
        del layer_idx
        return max(self.lengths, default=0)

    def add_rows(self, count: int) -> None:
        """Append empty rows."""
        self.lengths.extend([0] * count)
        self._reserve(len(self.lengths), self._columns)

    def begin(self, counts: Sequence[int], steps: int, room: int = 0) -> int:
        """Prepare one forward.

        Args:
            counts: new tokens of each row, at the right end of the input.
            steps: T, the input's width.
            room: columns to have at least, so that later tokens need no new buffer.

        Returns:
            How many columns attention will see.
        """
        assert len(counts) == len(self.lengths) and steps == max(counts)
        width = max(n + c for n, c in zip(self.lengths, counts, strict=True))
        self._reserve(len(self.lengths), max(width, room))
        plan = self._plan = _Plan(width, list(counts))
        if len(counts) == 1:
            return width
        if steps == 1 and all(counts):
            plan.rows, plan.target = torch.arange(len(counts), device=self._device), self._index(self.lengths)
            return width
        where = [(i, steps - c + j, self.lengths[i] + j) for i, c in enumerate(counts) for j in range(c)]
        plan.rows, plan.source, plan.target = self._index(where).unbind(1)
        return width

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store the new tokens of a layer.

        Args:
            keys: (B, H, T, D).
            values: (B, H, T, D).
            layer_idx: which layer.
            *args: ignored; some models pass more.
            **kwargs: ignored; some models pass more.

        Returns:
            Views (B, H, width, D) of all keys and values of the rows.
        """
        del args, kwargs
        plan = self._plan
        assert plan is not None, "update without begin"
        return self._write(self._keys, keys, layer_idx, plan), self._write(self._values, values, layer_idx, plan)

    def commit(self) -> None:
        """The forward is over: its tokens are part of the rows."""
        assert self._plan is not None
        self.lengths = [n + c for n, c in zip(self.lengths, self._plan.counts, strict=True)]
        self._plan = None

    @torch.inference_mode()
    def take(self, other: RowCache, row: int) -> None:
        """Append a copy of a row of another cache."""
        length = other.lengths[row]
        self._reserve(len(self.lengths) + 1, length)
        for mine, theirs in ((self._keys, other._keys), (self._values, other._values)):
            for layer, source in enumerate(theirs):
                assert source is not None
                buffer = mine[layer]
                if buffer is None:
                    buffer = mine[layer] = self._new(source)
                buffer[len(self.lengths), :, :length] = source[row, :, :length]
        self.lengths.append(length)

    @torch.inference_mode()
    def drop(self, row: int, *, wipe: bool = False) -> None:
        """Remove a row; the last row takes its place. Without rows, the buffers are let go.

        Args:
            row: which.
            wipe: also overwrite what it held: a later row in its place must not meet its NaNs, masked or not.
        """
        last = len(self.lengths) - 1
        length = self.lengths[last] if row != last else 0
        for buffer in (*self._keys, *self._values):
            assert buffer is not None
            buffer[row, :, :length] = buffer[last, :, :length]
            if wipe:
                buffer[row, :, length:] = 0
        if row != last:
            self.lengths[row] = length
        self.lengths.pop()
        if not self.lengths:
            self._keys, self._values = [None] * len(self._keys), [None] * len(self._values)
            self._rows, self._columns = 1, 0

    @torch.inference_mode()
    def trim(self) -> None:
        """Let go of the rows and blocks of columns that rows which left had needed."""
        rows, columns = len(self.lengths), -(-max(self.lengths, default=0) // BLOCK) * BLOCK
        if rows and (rows < self._rows or columns < self._columns):
            self._resize(rows, columns)

    def _write(self, buffers: list[Tensor | None], new: Tensor, layer: int, plan: _Plan) -> Tensor:
        buffer = buffers[layer]
        if buffer is None:
            buffer = buffers[layer] = self._new(new)
        used = len(plan.counts)
        if plan.rows is None:
            start = self.lengths[0]
            buffer[0, :, start : start + plan.counts[0]] = new[0]
        elif plan.source is None:
            buffer[plan.rows, :, plan.target] = new[:, :, 0]
        else:
            buffer[plan.rows, :, plan.target] = new[plan.rows, :, plan.source]
        return buffer[:used, :, : plan.width]

    def _index(self, values: list[Any]) -> Tensor:
        return torch.tensor(values, device=self._device)

    def _new(self, like: Tensor) -> Tensor:
        # Zeros, not uninitialised memory: a masked column has weight 0, and 0 * NaN would be NaN.
        return like.new_zeros(self._rows, like.shape[1], self._columns, like.shape[3])

    def _reserve(self, rows: int, columns: int) -> None:
        if rows <= self._rows and columns <= self._columns:
            return
        # Exactly what is needed: the limit on bytes counts rows in use. A row is copied once for every block it gains,
        # and read once for every token of the block.
        self._resize(rows, -(-columns // BLOCK) * BLOCK if columns > self._columns else self._columns)

    def _resize(self, rows: int, columns: int) -> None:
        """Move what the rows in use hold into buffers of this size, layer by layer."""
        self._rows, self._columns = rows, columns
        width = max(self.lengths, default=0)
        for buffers in (self._keys, self._values):
            for layer, old in enumerate(buffers):
                if old is not None:
                    grown = buffers[layer] = self._new(old)
                    used = min(rows, old.shape[0])
                    grown[:used, :, :width] = old[:used, :, :width]
