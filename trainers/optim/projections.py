"""The split by a low-rank subspace: the leading singular vectors of the gradient (GaLore's), or random ones.

Right: down(G) = G B^T and up(x) = x B with B (r, n) orthonormal rows. Left: down(G) = A^T G and up(x) = A x with
A (m, r) orthonormal columns. Full: down(G) = A^T G B^T, (r, r).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainers.optim import compact, keyed
from trainers.optim.clock import BASIS, CODES, Turn
from trainers.optim.rules import rule_of
from trainers.optim.splits import Sum, rounding
from trainers.optim.tensors import compute_dtype, round_to


@dataclass(frozen=True)
class Basis:
    """An orthonormal basis on one side of a matrix, or on both."""

    left: Tensor | None
    """(m, r)."""
    right: Tensor | None
    """(r, n)."""

    def down(self, x: Tensor) -> Tensor:
        """Coordinates of a matrix in the subspace."""
        x = x if self.right is None else x @ self.right.T
        return x if self.left is None else self.left.T @ x

    def up(self, x: Tensor) -> Tensor:
        """The matrix that some coordinates stand for."""
        x = x if self.right is None else x @ self.right
        return x if self.left is None else self.left @ x

    def whole(self) -> bool:
        """Whether it spans the whole space: what is left of a matrix is then rounding, and its sign means nothing."""
        sides = [side for side in (self.left, self.right) if side is not None]
        return all(side.shape[0] == side.shape[1] for side in sides)

    def moved(self, value: Tensor, to: Basis, *, square: bool) -> Tensor:
        """Re-projects a moment into another subspace of the same side (Algorithm 1 of arXiv 2411.07837).

        Args:
            value: In this basis's coordinates.
            to: New basis.
            square: Whether it is a mean square. Its entries then move by the squared entries of the rotation, as
                variances of independent numbers do, which keeps them from turning negative.

        Returns:
            In the new basis's coordinates.
        """
        if self.right is not None and to.right is not None:
            turn = self.right @ to.right.T
            value = value @ (turn.square() if square else turn)
        if self.left is not None and to.left is not None:
            turn = to.left.T @ self.left
            value = (turn.square() if square else turn) @ value
        return value


def side_of(side: str, shape: tuple[int, int]) -> str:
    """Resolves a side for one matrix.

    Args:
        side: ``std`` is right for m >= n, else left; ``reverse`` the opposite; ``left``, ``right`` and ``full`` as
            they say.
        shape: (m, n).

    Returns:
        ``left``, ``right`` or ``full``.
    """
    tall = shape[0] >= shape[1]
    if side == "std":
        return "right" if tall else "left"
    if side == "reverse":
        return "left" if tall else "right"
    return side


def rank_of(side: str, shape: tuple[int, int], density: float) -> int:
    """Rank at a density: its share of the columns (right), the rows (left), or the fewer of them (full)."""
    dim = {"right": shape[1], "left": shape[0], "full": min(shape)}[side]
    return round(dim * density)


def leading(g: Tensor, side: str, rank: int) -> Basis:
    """The leading singular vectors of a gradient; each with its largest entry positive, as their signs are arbitrary.

    Args:
        g: (m, n), float32 or float64.
        side: ``left``, ``right`` or ``full``.
        rank: How many; a matrix has no more than its shorter side.

    Returns:
        The basis.
    """
    left, _, right = torch.linalg.svd(g, full_matrices=False)
    left, right = left[:, :rank], right[:rank]
    if not g.is_meta:
        left, right = left * _signs(left, 0), right * _signs(right, 1)
    return Basis(
        left.contiguous() if side in ("left", "full") else None,
        right.contiguous() if side in ("right", "full") else None,
    )


def random(shape: tuple[int, int], side: str, rank: int, key: int, like: Tensor, dtype: torch.dtype) -> Basis:
    """A uniformly random subspace: the Q of a Gaussian matrix, drawn on the CPU in float64 under a key.

    Args:
        shape: (m, n).
        side: ``left``, ``right`` or ``full``.
        rank: Its dimension.
        key: From ``keyed.key``.
        like: Gives the device.
        dtype: Of the result.

    Returns:
        The basis.
    """

    def orthonormal(size: int, number: int) -> Tensor:
        if like.is_meta:
            return torch.empty(size, rank, dtype=dtype, device=like.device)
        source = keyed.generator(keyed.key(key, number))
        q, r = torch.linalg.qr(torch.randn(size, rank, generator=source, dtype=torch.float64, device="cpu"))
        turned: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
        return turned.contiguous().to(like.device, dtype)

    return Basis(
        orthonormal(shape[0], 0) if side in ("left", "full") else None,
        orthonormal(shape[1], 1).T.contiguous() if side in ("right", "full") else None,
    )


class Projections:
    """Steps matrices that are split by ``svd`` or ``random``.

    State of a matrix: the moments in the subspace, (m, r), (r, n) or (r, r), and the basis as ``right`` and ``left``.
    """

    def refresh(
        self,
        p: Tensor,
        g: Tensor,
        old: dict[str, Tensor],
        turn: Turn,
        group: dict[str, Any],
        total: Sum,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Finds a new subspace, and gives state that fits; see ``Coordinates.refresh``."""
        names = rule_of(group).moments()
        shape, dtype = (p.shape[0], p.shape[1]), compute_dtype(p.dtype)
        side = side_of(group["side"], shape)
        rank = rank_of(side, shape, turn.density)
        rank = min(rank, *shape) if group["split"] == "svd" else rank
        if rank == 0:
            return {}
        if group["split"] == "svd":
            basis = leading(g.to(dtype), side, rank)
        else:
            basis = random(shape, side, rank, turn.key(BASIS, turn.refreshes), p, dtype)
        kept = {"left": basis.left, "right": basis.right}
        fresh = {name: value for name, value in kept.items() if value is not None}
        sizes = {"right": (shape[0], rank), "left": (rank, shape[1]), "full": (rank, rank)}[side]
        fresh |= compact.blank(names, sizes, group, p, dtype)
        if names[0] in old and group["state"] != "reset":
            before = _basis(old)
            values = [
                compact.kept_as_it_is(value, sizes)
                if group["state"] == "keep"
                else before.moved(value, basis, square=name == "exp_avg_sq")
                for name, value in zip(names, compact.read(old, names), strict=True)
            ]
            compact.write(fresh, names, values, lambda: turn.generator(CODES, p.device))
        return fresh

    def advance(
        self,
        p: Tensor,
        g: Tensor,
        state: dict[str, Tensor],
        turn: Turn,
        group: dict[str, Any],
        total: Sum,  # noqa: ARG002
    ) -> None:
        """Takes one step of a matrix, in place; see ``Coordinates.advance``.

        The sign is that of the residual's entries, as published: it is not confined to the complement, and about a
        tenth of it falls back into the subspace.
        """
        rule, dtype = rule_of(group), compute_dtype(p.dtype)
        rate = float(group["lr"]) * group["lr_scale"]
        free, free_rate = group["free"], rate * group["free_lr_scale"]
        g = g.to(dtype)
        if rule.moments()[0] in state:
            basis = _basis(state)
            moments = compact.read(state, rule.moments())
            low = basis.down(g)
            age = turn.age if group["state"] == "reset" else turn.step
            change = basis.up(rule.delta(low, moments, age, rate))
            compact.write(state, rule.moments(), moments, lambda: turn.generator(CODES, p.device))
            if basis.whole() and group["compat"] != "official":
                free = "none"
            residual = g - basis.up(low) if free != "none" else g
        else:
            change, residual = torch.zeros_like(g), g
        if free == "sign":
            change.add_(residual.sign(), alpha=-free_rate)
        elif free == "sgd":
            change.add_(residual, alpha=-free_rate)
        decay = float(group["lr"]) * group["weight_decay"]
        round_to(p, p.to(dtype).mul(1 - decay).add_(change), rounding(p, turn, group))


def _basis(state: dict[str, Tensor]) -> Basis:
    return Basis(state.get("left"), state.get("right"))


def _signs(vectors: Tensor, dim: int) -> Tensor:
    largest = vectors.gather(dim, vectors.abs().argmax(dim, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0).to(vectors.dtype)
