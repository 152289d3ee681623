"""Orthonormal bases of R^n, built in float64: cosines, random orthogonal, Hadamard, and the coordinates themselves.

A gradient of (rows, n) is looked at in one of them, and an optimizer keeps state for the r basis vectors that matter.
Nothing of a basis is stored in a checkpoint: it follows from (kind, n, seed).
"""

from __future__ import annotations

import math
from typing import Literal, get_args
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from trainers.optim.keyed import generator, key
from trainers.optim.transform import (
    CosineFft,
    Norm,
    Rows,
    Spectrum,
    add_scores,
    by_product,
    tiles,
    use_fft,
    use_fft_for,
)

Kind = Literal["dct", "random", "hadamard", "identity"]
Transform = Literal["auto", "matmul", "fft"]
KINDS: tuple[str, ...] = get_args(Kind)

_cache: WeakValueDictionary[tuple[object, ...], Basis] = WeakValueDictionary()


class Basis:
    """An orthonormal basis held as a matrix."""

    def __init__(self, matrix: Tensor) -> None:
        """Takes the basis vectors.

        Args:
            matrix: (n, n), one basis vector a row, in the dtype to compute in.
        """
        self.matrix = matrix

    @property
    def nbytes(self) -> int:
        """Bytes that the basis holds, once for all layers of its size."""
        return self.matrix.numel() * self.matrix.element_size()

    def spectrum(self, rows: Rows, norm: Norm) -> Spectrum:
        """Coordinates of all rows along all basis vectors, with the score of each vector.

        Args:
            rows: (rows, n).
            norm: 1 scores by the sum of absolute coordinates, 2 by that of squares.

        Returns:
            Coordinates and scores.
        """
        return by_product(rows, self.matrix, norm)

    def vectors(self, index: Tensor) -> Tensor:
        """Some basis vectors.

        Args:
            index: (r,) whole numbers in [0, n).

        Returns:
            (r, n), one a row.
        """
        return self.matrix.index_select(0, index)

    def subspace(self, index: Tensor) -> Subspace:
        """The span of some basis vectors.

        Args:
            index: (r,) whole numbers in [0, n).

        Returns:
            What projects on it and leads back.
        """
        return Subspace(self.vectors(index))


class Subspace:
    """The span of r orthonormal vectors, to project rows on and to lead back from."""

    def __init__(self, vectors: Tensor) -> None:
        """Takes the vectors.

        Args:
            vectors: (r, n), orthonormal rows.
        """
        self.vectors = vectors

    def project(self, rows: Rows) -> Tensor:
        """Coordinates in the subspace.

        Args:
            rows: (rows, n).

        Returns:
            (rows, r), a new tensor.
        """
        if rows.whole is not None:
            return rows.whole @ self.vectors.mT
        reach = tiles(rows.height, rows.width) or [(0, 0)]  # A process may hold no rows at all.
        return torch.cat([rows.read(*tile) @ self.vectors.mT for tile in reach])

    def add_to(self, target: Tensor, coordinates: Tensor, *, alpha: float = 1.0, beta: float = 1.0) -> None:
        """``target = beta * target + alpha * coordinates @ vectors``, in place, without a temporary of its size.

        Args:
            target: (rows, n), any strides, in the vectors' dtype.
            coordinates: (rows, r).
            alpha: Factor of what is added.
            beta: Factor of what is there.
        """
        target.addmm_(coordinates, self.vectors, beta=beta, alpha=alpha)


class Columns(Subspace):
    """The span of r coordinate axes: some columns, and no arithmetic."""

    def __init__(self, index: Tensor) -> None:
        """Takes the columns.

        Args:
            index: (r,) whole numbers in [0, n).
        """
        self.index = index

    def project(self, rows: Rows) -> Tensor:
        """As ``Subspace.project``: the columns."""
        if rows.whole is not None:
            return rows.whole.index_select(1, self.index)
        reach = tiles(rows.height, rows.width) or [(0, 0)]  # A process may hold no rows at all.
        return torch.cat([rows.read(*tile).index_select(1, self.index) for tile in reach])

    def add_to(self, target: Tensor, coordinates: Tensor, *, alpha: float = 1.0, beta: float = 1.0) -> None:
        """As ``Subspace.add_to``."""
        if beta != 1:
            target.mul_(beta)
        target.index_add_(1, self.index, coordinates, alpha=alpha)


class Cosines(Basis):
    """The cosines of the DCT-II, through the FFT: a table of 4 n numbers instead of an n x n matrix."""

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device) -> None:
        """Builds the table.

        Args:
            n: Length of a row.
            dtype: float32 or float64.
            device: Where.
        """
        self.n = n
        self.fft = CosineFft(n, dtype, device)
        self.table = _cosine_table(n).to(dtype).to(device)

    @property
    def nbytes(self) -> int:
        """Bytes that the basis holds, once for all layers of its size."""
        held = (self.table, *self.fft.tensors)
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def spectrum(self, rows: Rows, norm: Norm) -> Spectrum:
        """As ``Basis.spectrum``, by the FFT."""
        return self.fft.spectrum(rows, norm)

    def vectors(self, index: Tensor) -> Tensor:
        """As ``Basis.vectors``, looked up in the table: the same bits as the matrix."""
        return self.table[_phases(self.n, index)]

    def subspace(self, index: Tensor) -> Subspace:
        """As ``Basis.subspace``, there and back by the FFT where that is the faster way."""
        if use_fft_for(index.numel(), self.table.dtype, self.table.device):
            return CosineSpan(self, index)
        return super().subspace(index)


class CosineSpan(Subspace):
    """The span of r cosines, there and back by the FFT."""

    def __init__(self, basis: Cosines, index: Tensor) -> None:
        """Takes the basis and the vectors' numbers.

        Args:
            basis: The cosines.
            index: (r,) whole numbers in [0, n).
        """
        self.basis, self.index = basis, index.long()

    def project(self, rows: Rows) -> Tensor:
        """As ``Subspace.project``."""
        return self.basis.fft.project(rows, self.index)

    def add_to(self, target: Tensor, coordinates: Tensor, *, alpha: float = 1.0, beta: float = 1.0) -> None:
        """As ``Subspace.add_to``."""
        self.basis.fft.add_to(target, coordinates, self.index, alpha=alpha, beta=beta)


class Identity(Basis):
    """The coordinates themselves: the r largest columns, and no transform."""

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device) -> None:
        """Holds nothing.

        Args:
            n: Length of a row.
            dtype: float32 or float64.
            device: Where.
        """
        self.n, self.like = n, torch.empty(0, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes that the basis holds: none."""
        return 0

    def spectrum(self, rows: Rows, norm: Norm) -> Spectrum:
        """As ``Basis.spectrum``: the columns as they are."""
        scores = self.like.new_zeros(self.n)
        values = rows.whole
        if values is None:
            values = self.like.new_empty(rows.height, self.n)
        for start, stop in tiles(rows.height, self.n):
            if rows.whole is None:
                values[start:stop] = rows.read(start, stop)
            add_scores(scores, values[start:stop], norm)
        return Spectrum(values, scores)

    def vectors(self, index: Tensor) -> Tensor:
        """As ``Basis.vectors``: rows of the identity matrix."""
        return self.like.new_zeros(index.numel(), self.n).scatter_(1, index[:, None], 1.0)

    def subspace(self, index: Tensor) -> Subspace:
        """As ``Basis.subspace``: some columns."""
        return Columns(index)


def get_basis(
    kind: str,
    n: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    transform: str = "auto",
    seed: int = 0,
) -> Basis:
    """A basis, shared by all who ask for the same one while any of them holds it.

    Args:
        kind: ``dct``, ``random`` (QR of a Gaussian matrix, signs fixed), ``hadamard`` or ``identity``. For n = 2^k m
            with m odd, ``hadamard`` is the Kronecker product of the Hadamard matrix of 2^k with the cosines of m:
            orthonormal for every n, plain Hadamard for powers of two, plain cosines for odd n. ``dct3`` is the
            transposed cosine matrix, which published code multiplies by.
        n: Length of a row.
        dtype: What to compute in: float32 or float64.
        device: Where.
        transform: How ``dct`` computes: ``matmul``, ``fft``, or ``auto`` for the committed table's choice.
        seed: Of ``random``; the others do not depend on it.

    Returns:
        The basis.

    Raises:
        ValueError: Unknown kind.
    """
    fft = kind == "dct" and (transform == "fft" or (transform == "auto" and use_fft(n, dtype, device)))
    name = (kind, n, dtype, device, fft, seed if kind == "random" else 0)
    found = _cache.get(name)
    if found is None:
        if fft:
            found = Cosines(n, dtype, device)
        elif kind == "identity":
            found = Identity(n, dtype, device)
        elif device.type == "meta":
            found = Basis(torch.empty(n, n, dtype=dtype, device=device))
        else:
            found = Basis(build(kind, n, seed).to(dtype).to(device))
        _cache[name] = found
    return found


def build(kind: str, n: int, seed: int = 0) -> Tensor:
    """A basis as a float64 matrix on the CPU.

    Args:
        kind: As for ``get_basis``.
        n: Its size.
        seed: Of ``random``.

    Returns:
        (n, n), one basis vector a row.

    Raises:
        ValueError: Unknown kind.
    """
    if kind == "dct":
        return _cosine_table(n)[_phases(n, torch.arange(n))]
    if kind == "dct3":
        return build("dct", n).mT.contiguous()
    if kind == "random":
        drawn = torch.randn(n, n, generator=generator(key(seed, n)), dtype=torch.float64)
        q, r = torch.linalg.qr(drawn)
        signed: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
        return signed.mT.contiguous()
    if kind == "hadamard":
        power = n & -n
        matrix = torch.ones(1, 1, dtype=torch.float64)
        for _ in range(power.bit_length() - 1):
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return torch.kron(matrix / math.sqrt(power), build("dct", n // power))
    if kind == "identity":
        return torch.eye(n, dtype=torch.float64)
    raise ValueError(f"basis must be one of {', '.join(KINDS)}, not {kind!r}")


def _cosine_table(n: int) -> Tensor:
    """sqrt(2 / n) cos(pi p / (2 n)) for p in [0, 4 n), then sqrt(1 / n); float64, folded to angles below pi / 4."""
    table = torch.cos(torch.arange(4 * n, dtype=torch.float64) * (math.pi / (2 * n))) * math.sqrt(2 / n)
    table[n], table[3 * n] = 0.0, 0.0
    return torch.cat([table, torch.tensor([math.sqrt(1 / n)], dtype=torch.float64)])


def _phases(n: int, index: Tensor) -> Tensor:
    """Where the entries of basis vectors stand in the table: k (2 j + 1) mod 4 n, and 4 n for k = 0; (r, n) int64."""
    odd = torch.arange(1, 2 * n, 2, device=index.device)
    wide = index.to(torch.int64)[:, None]
    return torch.where(wide == 0, 4 * n, (wide * odd) % (4 * n))
