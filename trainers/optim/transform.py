"""Coordinates of many rows in one orthonormal basis: by a matrix product, or for the cosines by a real FFT.

A row ``x`` of ``n`` numbers has coordinates ``x @ vectors.T``; row k of ``vectors`` is basis vector k. For the cosines

    vectors[k, j] = sqrt(2 / n) cos(pi k (2 j + 1) / (2 n)),   row 0 times sqrt(1 / 2)

Makhoul's algorithm (IEEE Trans. ASSP 28, 1980) gives the same numbers in O(n log n): reorder a row as its even entries
ascending, then its odd entries descending; take the FFT V; then coordinate k is Re(w_k V_k) and coordinate n - k is
-Im(w_k V_k), with w_k = exp(-i pi k / (2 n)) times the scale. A real FFT of n / 2 + 1 numbers is therefore enough.

Rows are worked through in tiles that stay in the cache, in an order that depends on the shape alone: the same input
gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Norm = Literal[1, 2]

# From which n on the FFT is taken, by device type and dtype: measured on a two-core x86 CPU. On CUDA it is not
# measured; the authors of arXiv 2505.17967 saw no gain there up to n = 2048.
_FFT_FROM = {
    ("cpu", torch.float32): 128,
    ("cpu", torch.float64): 128,
    ("cuda", torch.float32): 4096,
    ("cuda", torch.float64): 4096,
}
# From which r on the way to and from r cosines is an FFT: its cost does not depend on r, that of a product does.
_SPAN_FROM = {("cpu", torch.float32): 160, ("cpu", torch.float64): 160}
_TILE = 1 << 19
"""Elements of a tile: 2 MiB of float32. Smaller ones wake the threads more often, larger ones leave the cache."""


class Rows(NamedTuple):
    """A matrix that is read tile by tile, so that what it is computed from need not be held whole."""

    height: int
    """Number of rows."""
    width: int
    """Entries of a row, n."""
    read: Callable[[int, int], Tensor]
    """``(start, stop)`` -> those rows, (stop - start, n), in the dtype to compute in."""
    whole: Tensor | None = None
    """The matrix itself where it exists in that dtype, (rows, n)."""


class Spectrum(NamedTuple):
    """Coordinates of all rows, in the order in which they were computed."""

    values: Tensor
    """(rows, width); coordinate k of a row is ``sign[k] * values[:, position[k]]``, or ``values[:, k]`` without."""
    scores: Tensor
    """(n,): sum over rows of absolute coordinates (norm 1) or of their squares (norm 2)."""
    position: Tensor | None = None
    sign: Tensor | None = None

    def take(self, index: Tensor) -> Tensor:
        """Coordinates of every row along some basis vectors.

        Args:
            index: (r,) whole numbers in [0, n).

        Returns:
            (rows, r), a new tensor.
        """
        if self.position is None or self.sign is None:
            return self.values.index_select(1, index)
        return self.values.index_select(1, self.position[index]).mul_(self.sign[index])


def use_fft(n: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether ``transform="auto"`` takes the FFT: a pure function, so that a resumed run computes what it did.

    Args:
        n: Length of a row.
        dtype: What is computed in: float32 or float64.
        device: Where; the meta device counts as a CPU.

    Returns:
        True for the FFT, False for the matrix product.
    """
    kind = "cpu" if device.type == "meta" else device.type
    return n >= _FFT_FROM.get((kind, dtype), 1 << 62)


def use_fft_for(rank: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the way to and from r cosines takes the FFT, where that to all of them does: a pure function too.

    Args:
        rank: Basis vectors kept.
        dtype: What is computed in.
        device: Where; the meta device counts as a CPU.

    Returns:
        True for the FFT, False for the matrix product.
    """
    kind = "cpu" if device.type == "meta" else device.type
    return rank >= _SPAN_FROM.get((kind, dtype), 1 << 62)


def plain_rows(matrix: Tensor, dtype: torch.dtype) -> Rows:
    """Reads a matrix that exists, cast a tile at a time where its dtype is another.

    Args:
        matrix: (rows, n), any strides.
        dtype: What to compute in.

    Returns:
        The matrix as tiles.
    """
    whole = matrix if matrix.dtype == dtype else None
    return Rows(matrix.shape[0], matrix.shape[1], lambda start, stop: matrix[start:stop].to(dtype), whole)


def tiles(count: int, width: int) -> list[tuple[int, int]]:
    """Row ranges of tiles.

    Args:
        count: Number of rows.
        width: Entries of a row.

    Returns:
        (start, stop) pairs; a multiple of 16 rows each but the last.
    """
    step = max(16, _TILE // width // 16 * 16)
    return [(start, min(start + step, count)) for start in range(0, count, step)]


def add_scores(scores: Tensor, values: Tensor, norm: Norm) -> None:
    """Adds what a tile's columns score, in place.

    Args:
        scores: (width,).
        values: (rows, width), a tile: a temporary of its size is taken.
        norm: 1 adds absolute values, 2 squares.
    """
    scores.add_((values.abs() if norm == 1 else values.square()).sum(0))


def by_product(rows: Rows, vectors: Tensor, norm: Norm) -> Spectrum:
    """Coordinates by a matrix product.

    Args:
        rows: (rows, n).
        vectors: (n, n), the basis vectors as rows.
        norm: What scores sum.

    Returns:
        All coordinates and their scores.
    """
    scores = vectors.new_zeros(rows.width)
    values = vectors.new_empty(rows.height, rows.width) if rows.whole is None else rows.whole @ vectors.mT
    for start, stop in tiles(rows.height, rows.width):
        if rows.whole is None:
            torch.mm(rows.read(start, stop), vectors.mT, out=values[start:stop])
        add_scores(scores, values[start:stop], norm)
    return Spectrum(values, scores)


class CosineFft:
    """Makhoul's algorithm for rows of one length: twiddle factors, and where it leaves each coordinate."""

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device) -> None:
        """Computes the factors in float64 and casts them once.

        Args:
            n: Length of a row.
            dtype: float32 or float64.
            device: Where.
        """
        self.n = n
        half = n // 2 + 1
        k = torch.arange(half, dtype=torch.float64)
        scale = torch.full((half,), math.sqrt(2 / n), dtype=torch.float64)
        scale[0] = math.sqrt(1 / n)
        angle = k * (-math.pi / (2 * n))
        complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
        self.twiddle = torch.polar(scale, angle).to(complex_dtype).to(device)
        # irfft divides by n, and |w_k|^2 is scale^2: conj(w_k) / scale^2 takes a coordinate pair back to V_k.
        self.untwiddle = torch.polar(1 / scale, -angle).to(complex_dtype).to(device)
        index = torch.arange(n)
        order = torch.cat([index[::2], index[1::2].flip(0)])
        self.order, self.back = order.to(device), order.argsort().to(device)
        upper = index >= half
        self.position = torch.where(upper, 2 * (n - index) + 1, 2 * index).to(device)
        self.sign = torch.where(upper, -1.0, 1.0).to(dtype).to(device)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that it holds."""
        return self.twiddle, self.untwiddle, self.position, self.sign, self.order, self.back

    def spectrum(self, rows: Rows, norm: Norm) -> Spectrum:
        """Coordinates of all rows and their scores.

        Args:
            rows: (rows, n).
            norm: What scores sum.

        Returns:
            Coordinates in the order of the FFT, (rows, n + 2) or (rows, n + 1), and scores in that of the basis.
        """
        half = self.twiddle.numel()
        values = self.twiddle.new_empty(rows.height, half)
        scores = self.sign.new_zeros(2 * half)
        flat = torch.view_as_real(values).view(rows.height, 2 * half)
        for start, stop in tiles(rows.height, self.n):
            reordered = _permuted(rows.read(start, stop), self.order)
            torch.mul(torch.fft.rfft(reordered), self.twiddle, out=values[start:stop])
            add_scores(scores, flat[start:stop], norm)
        return Spectrum(flat, scores[self.position], self.position, self.sign)

    def project(self, rows: Rows, index: Tensor) -> Tensor:
        """Coordinates along some basis vectors only: those that ``spectrum`` would give, without holding the others.

        Args:
            rows: (rows, n).
            index: (r,) whole numbers in [0, n).

        Returns:
            (rows, r), a new tensor.
        """
        position, sign = self.position[index], self.sign[index]
        found = sign.new_empty(rows.height, index.numel())
        for start, stop in tiles(rows.height, self.n):
            part = torch.fft.rfft(_permuted(rows.read(start, stop), self.order)).mul_(self.twiddle)
            flat = torch.view_as_real(part).view(stop - start, -1)
            torch.mul(flat.index_select(1, position), sign, out=found[start:stop])
        return found

    def add_to(self, target: Tensor, coordinates: Tensor, index: Tensor, *, alpha: float, beta: float) -> None:
        """Adds rows with given coordinates along some basis vectors and none along the others: the inverse transform.

        Args:
            target: (rows, n), any strides; becomes ``beta * target + alpha * rows``.
            coordinates: (rows, r).
            index: (r,) whole numbers in [0, n).
            alpha: Factor of what is added.
            beta: Factor of what is there.
        """
        half = self.twiddle.numel()
        position, signed = self.position[index], coordinates * (self.sign[index] * alpha)
        for start, stop in tiles(target.shape[0], self.n):
            packed = signed.new_zeros(stop - start, 2 * half)
            packed.index_copy_(1, position, signed[start:stop])
            if self.n % 2 == 0:
                # Coordinate n / 2 is its own partner: V there is real, so w V has equal real and -imaginary parts.
                packed[:, -1] = -packed[:, -2]
            spectrum = torch.view_as_complex(packed.view(-1, half, 2)).mul_(self.untwiddle)
            rows = torch.fft.irfft(spectrum, self.n)
            part = target[start:stop]
            if beta != 1:
                part.mul_(beta)
            if part.stride(1) == 1:
                part.add_(rows.index_select(1, self.back))
            else:
                part.mT.add_(rows.mT.contiguous().index_select(0, self.back))


def _permuted(rows: Tensor, order: Tensor) -> Tensor:
    """Columns of a tile in another order, as contiguous rows; whole columns are moved where those are contiguous."""
    if rows.stride(1) == 1:
        return rows.index_select(1, order)
    return rows.mT.index_select(0, order).mT.contiguous()
