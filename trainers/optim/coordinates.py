"""Which coordinates of a matrix keep state, and one pass over the matrix that updates those and the others.

``Columns``, ``Rows`` and ``Scattered`` each say how to cut the matrix into tiles, and how to take the chosen part of a
tile out and put it back. ``sweep`` brings every weight and gradient into the cache once. While a tile is there, a tile
of changes is made: signs everywhere, then over them what the moments make of the chosen part; and it is added.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainers.optim import keyed
from trainers.optim.rules import Age, Free, Rule, add_
from trainers.optim.tensors import compute_dtype, round_to

TILE = 1 << 20
"""Elements of a tile on a CPU: of 2**16 to 2**21 the fastest, measured at 11008 x 4096."""


@dataclass(frozen=True)
class Piece:
    """One tile: a range of the first dimension, and the part of the compact state that belongs to it."""

    span: slice
    slots: slice
    index: Tensor
    """The chosen rows or elements of the tile, counted from its start; or the chosen columns or blocks of them."""


@dataclass(frozen=True)
class Columns:
    """Some columns of an (m, n) matrix; state is (m, k)."""

    shape: tuple[int, int]
    index: Tensor
    """(k,) int64, ascending, on the matrix's device."""
    block: int = 1
    """The columns come in whole, aligned blocks of this width."""
    runs: dict[tuple[int, int, int], list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    tiles: dict[int, list[Piece]] = field(default_factory=dict)

    def state_shape(self) -> tuple[int, ...]:
        """(m, k)."""
        return self.shape[0], self.index.numel()

    def flat(self, x: Tensor) -> Tensor:
        """The matrix as ``pieces`` cuts it."""
        return x

    def pieces(self, size: int) -> Iterable[Piece]:
        """Tiles of whole rows, of about ``size`` elements each."""
        if size not in self.tiles:
            index = self.index[:: self.block] // self.block
            spans = [slice(*span) for span in _ranges(self.shape[0], max(1, size // max(1, self.shape[1])))]
            self.tiles[size] = [Piece(span, span, index) for span in spans]
        return self.tiles[size]

    def take(self, x: Tensor, piece: Piece, out: Tensor) -> None:
        """Copies the chosen part of a tile."""
        if self.block > 1:
            torch.index_select(_blocked(x, self.block), 1, piece.index, out=_blocked(out, self.block))
        else:
            torch.index_select(x, 1, piece.index, out=out)

    def put(self, x: Tensor, piece: Piece, part: Tensor) -> None:  # noqa: ARG002
        """Writes it back. Measured on a CPU, copying runs of blocks takes a fifth of the time of scattering them, and
        scattering with one index for all rows a third of that of ``index_copy_``."""
        if self.block == 1 or x.device.type != "cpu":
            x.scatter_(1, self.index.expand(x.shape[0], -1), part)
            return
        # Both are views of buffers that all tiles share, so the views of their runs are made once.
        place = (x.data_ptr(), part.data_ptr(), x.shape[0])
        if place not in self.runs:
            if len(self.runs) > 1:  # A full tile and the last one.
                self.runs.clear()
            joined = _runs(self.index[:: self.block].tolist(), self.block)
            self.runs[place] = [(x[:, a:b], part[:, slot : slot + b - a]) for a, b, slot in joined]
        for target, source in self.runs[place]:
            target.copy_(source)


@dataclass(frozen=True)
class Rows:
    """Some rows of an (m, n) matrix; state is (k, n)."""

    shape: tuple[int, int]
    index: Tensor
    """(k,) int64, ascending, on the matrix's device."""
    tiles: dict[int, list[Piece]] = field(default_factory=dict)

    def state_shape(self) -> tuple[int, ...]:
        """(k, n)."""
        return self.index.numel(), self.shape[1]

    def flat(self, x: Tensor) -> Tensor:
        """The matrix as ``pieces`` cuts it."""
        return x

    def pieces(self, size: int) -> Iterable[Piece]:
        """Tiles of whole rows, of about ``size`` elements each."""
        if size not in self.tiles:
            listed = self.index.tolist()
            self.tiles[size] = []
            for start, stop in _ranges(self.shape[0], max(1, size // max(1, self.shape[1]))):
                slots = slice(bisect_left(listed, start), bisect_left(listed, stop))
                self.tiles[size].append(Piece(slice(start, stop), slots, self.index[slots] - start))
        return self.tiles[size]

    def take(self, x: Tensor, piece: Piece, out: Tensor) -> None:
        """Copies the chosen part of a tile."""
        torch.index_select(x, 0, piece.index, out=out)

    def put(self, x: Tensor, piece: Piece, part: Tensor) -> None:
        """Writes it back."""
        if part.numel():
            _wide(x).index_copy_(0, piece.index, _wide(part))


@dataclass(frozen=True)
class Scattered:
    """``count`` elements anywhere in a matrix; state is (count,).

    No list of them is kept: element i is chosen when its number under ``key`` is below ``bound``, so the choice costs
    eight bytes instead of eight for each element, and is worked out tile by tile.
    """

    shape: tuple[int, int]
    count: int
    key: int
    bound: int

    def state_shape(self) -> tuple[int, ...]:
        """(count,)."""
        return (self.count,)

    def flat(self, x: Tensor) -> Tensor:
        """The matrix as ``pieces`` cuts it."""
        return x.view(-1)

    def pieces(self, size: int) -> Iterable[Piece]:
        """Tiles of ``size`` elements; made anew each time, as a list of them would be a list of all elements."""
        begun = 0
        for start, stop in _ranges(self.shape[0] * self.shape[1], size):
            mixed = keyed.noise(start, stop, self.key)
            chosen = mixed < self.bound if self.bound < 1 << 63 else torch.ones_like(mixed)
            index = chosen.nonzero().view(-1)
            yield Piece(slice(start, stop), slice(begun, begun + index.numel()), index)
            begun += index.numel()
        assert begun == self.count

    def take(self, x: Tensor, piece: Piece, out: Tensor) -> None:
        """Copies the chosen part of a tile."""
        torch.index_select(x, 0, piece.index.to(x.device), out=out)

    def put(self, x: Tensor, piece: Piece, part: Tensor) -> None:
        """Writes it back."""
        x.index_copy_(0, piece.index.to(x.device), part)


Chosen = Columns | Rows | Scattered


class Scratch:
    """Buffers that are made once and used by every tile of every parameter; no part of the state."""

    def __init__(self) -> None:
        """Starts empty."""
        self.buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def get(self, name: str, size: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A flat tensor with arbitrary contents, shared by all who ask for the name.

        Args:
            name: Two buffers in use at once need two names.
            size: Elements.
            like: Gives the device.
            dtype: Wanted type.

        Returns:
            A view of the buffer.
        """
        place = (name, dtype, like.device)
        buffer = self.buffers.get(place)
        if buffer is None or buffer.numel() < size:
            buffer = self.buffers[place] = torch.empty(size, dtype=dtype, device=like.device)
        return buffer[:size]


@dataclass(frozen=True)
class Pass:
    """What one sweep over a matrix does."""

    rule: Rule
    rate: float
    """Learning rate of the chosen part."""
    free: Free
    free_rate: float
    """Learning rate of the rest."""
    decay: float
    """Taken off all weights first."""
    age: Age
    """Steps since the moments began."""
    generator: torch.Generator | None
    """Draws the bits of stochastic rounding; None rounds to nearest."""
    plain: bool = False
    """Keep to the plain order of operations."""


def sweep(p: Tensor, g: Tensor, chosen: Chosen | None, moments: Sequence[Tensor], turn: Pass, scratch: Scratch) -> None:
    """Updates a matrix in one pass, in place.

    Args:
        p: Weights (m, n), contiguous, any floating dtype.
        g: Gradient of the same shape, contiguous.
        chosen: The part with state, or None for no part.
        moments: Its state, in the rule's order; float32, or float64 for float64 weights.
        turn: Rules and rates.
        scratch: Buffers.
    """
    dtype = compute_dtype(p.dtype)
    size = TILE if p.device.type == "cpu" else max(1, p.numel())
    weights, gradient = (p.view(-1), g.view(-1)) if chosen is None else (chosen.flat(p), chosen.flat(g))
    # In one pass the tile of changes is in units of the rate without state, with its sign turned.
    one_pass = turn.free != "none" and turn.free_rate > 1e-6 * turn.rate and not turn.plain and p.device.type == "cpu"
    unit = -turn.free_rate if one_pass else 1.0
    room = min(p.numel(), max(size, p.shape[-1] if p.dim() else 1))
    changes, gathered, updates = (scratch.get(name, room, p, dtype) for name in ("changes", "gathered", "updates"))
    for piece in _whole(p.numel(), size) if chosen is None else chosen.pieces(size):
        target, d = weights[piece.span], gradient[piece.span]
        w = target if target.dtype == dtype else scratch.get("weights", room, p, dtype)[: d.numel()].view(d.shape)
        if w is not target:
            w.copy_(target)
        if d.dtype != dtype:
            d = scratch.get("gradient", room, p, dtype)[: d.numel()].view(d.shape).copy_(d)
        change = changes[: d.numel()].view(d.shape)
        if turn.free == "sign":
            torch.sign(d, out=change)
        elif turn.free == "sgd":
            change.copy_(d)
        else:
            change.zero_()
        if not one_pass:
            change.mul_(-turn.free_rate)
        if chosen is not None:
            parts = [moment[piece.slots] for moment in moments]
            shape, count = parts[0].shape, parts[0].numel()
            part, update = gathered[:count].view(shape), updates[:count].view(shape)
            chosen.take(d, piece, part)
            turn.rule.delta_into(update, part, parts, _aged(turn.age, chosen, piece), turn.rate / unit)
            chosen.put(change, piece, update)
        if one_pass:
            add_(w, change, turn.free_rate, turn.decay)
        else:
            if turn.decay:
                w.mul_(1 - turn.decay)
            w.add_(change)
        if w is not target:
            round_to(target, w, turn.generator)


def squares(g: Tensor, dim: int) -> Tensor:
    """Squared norms of a gradient's columns or rows, tile by tile.

    Args:
        g: (m, n), contiguous.
        dim: 0 sums over rows and gives (n,); 1 sums over columns and gives (m,).

    Returns:
        float32, or float64 for float64 gradients.
    """
    dtype = compute_dtype(g.dtype)
    size = TILE if g.device.type == "cpu" else max(1, g.numel())
    total = g.new_zeros(g.shape[1 - dim], dtype=dtype)
    for start, stop in _ranges(g.shape[0], max(1, size // max(1, g.shape[1]))):
        part = g[start:stop].to(dtype).square().sum(dim)
        if dim == 0:
            total += part
        else:
            total[start:stop] = part
    return total


def _aged(age: Age, chosen: Chosen, piece: Piece) -> Age:
    """Ages of a tile's slots, to be broadcast over its state."""
    return age[piece.slots].unsqueeze(1) if isinstance(age, Tensor) and isinstance(chosen, Rows) else age


def _ranges(total: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, total, size):
        yield start, min(total, start + size)


def _whole(total: int, size: int) -> Iterator[Piece]:
    """Tiles of a tensor no part of which is chosen."""
    nothing = torch.empty(0, dtype=torch.int64)
    for start, stop in _ranges(total, size):
        yield Piece(slice(start, stop), slice(0, 0), nothing)


def _runs(starts: list[int], width: int) -> list[tuple[int, int, int]]:
    """Blocks joined where they touch: (first column, column after the last, first slot)."""
    runs: list[tuple[int, int, int]] = []
    for slot, start in enumerate(starts):
        if runs and runs[-1][1] == start:
            runs[-1] = runs[-1][0], start + width, runs[-1][2]
        else:
            runs.append((start, start + width, slot * width))
    return runs


def _wide(x: Tensor) -> Tensor:
    """The same memory as numbers of 16 bytes where it can be read so: copied by index in a third of the time."""
    small = x.element_size()
    if x.device.type != "cpu" or x.shape[-1] * small % 16 or x.storage_offset() * small % 16:
        return x
    return x.view(torch.complex128)


def _blocked(x: Tensor, block: int) -> Tensor:
    return x.view(x.shape[0], -1, block)
