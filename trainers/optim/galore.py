"""GaLore (arXiv 2403.03507): Adam on the gradient's coordinates in its leading singular subspace, the rest dropped.

As published: the moments are neither reset nor rotated when the subspace changes, ``eps`` is added before bias
correction, and weight decay follows the update. W <- W - lr sqrt(1 - b2^t)/(1 - b1^t) scale up(m / (sqrt(v) + eps)),
then W <- (1 - lr wd) W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trainers.optim.base import LowMemoryOptimizer, Parameters
from trainers.optim.clock import ROUNDING, Turn, tick
from trainers.optim.coordinates import Scratch
from trainers.optim.fit import Fit, Shape, compact_shape, up_to
from trainers.optim.projections import Basis, leading, rank_of, side_of
from trainers.optim.rules import Adam, Age
from trainers.optim.settings import check_galore
from trainers.optim.tensors import as_matrix, compute_dtype, like, local, round_to, sharded
from trainers.optim.transform import tiles
from trainers.optim.whole import sweep_all


class GaLore(LowMemoryOptimizer):
    """GaLore with AdamW.

    State of a matrix: ``step``, ``exp_avg`` and ``exp_avg_sq`` in the subspace, and its basis as ``left`` (m, r) or
    ``right`` (r, n); of everything else: the plain moments. Stacks (E, m, n) are E matrices, convolutions
    (out, in * kernel).

    Not covered: sharded matrices, as a singular value decomposition needs all rows.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-2,
        *,
        rank: int | None = None,
        density: float = 0.25,
        update_gap: int = 200,
        scale: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        side: Literal["std", "reverse", "left", "right", "full"] = "std",
        seed: int = 0,
    ) -> None:
        """Makes the optimizer; every setting may also be a key of a group.

        Args:
            params: Parameters, named parameters, or groups as ``split_parameters`` gives them. Groups with
                ``role="full"``, vectors and scalars get the same Adam on the whole gradient, without ``scale``.
            lr: Learning rate.
            rank: Of the subspace; a smaller matrix gets its own full rank. None: see ``density``.
            density: Rank as a share of the side in (0, 1], at least 1, if ``rank`` is None.
            update_gap: Steps between decompositions, counted for each parameter.
            scale: Factor on the update of projected matrices.
            betas: Decay of the moments.
            eps: Added to the root of the mean square, before bias correction.
            weight_decay: Decoupled; ``lr * weight_decay`` is taken off after the update.
            side: On which side of the matrix the basis is; ``std`` is right (columns) for m >= n, else left.
            seed: Of stochastic rounding, for bfloat16 weights.

        Raises:
            ValueError: A setting is out of range.
        """
        settings = dict(locals())
        for name in ("self", "params", "__class__"):
            settings.pop(name, None)
        super().__init__(params, settings | {"role": "projected"})

    def check(self, group: dict[str, Any]) -> None:
        """See ``LowMemoryOptimizer.check``."""
        check_galore(group)

    def _forget(self) -> None:
        super()._forget()
        self._scratch = Scratch()

    def fit(self, parameter: Tensor, group: dict[str, Any]) -> Fit:
        """See ``LowMemoryOptimizer.fit``."""
        names = ("exp_avg", "exp_avg_sq")
        stack = None if group["role"] == "full" else as_matrix(parameter.shape)
        if stack is None:
            return Fit(dict.fromkeys(names, tuple(local(parameter).shape)), names)
        many, m, n = stack
        side = side_of(group["side"], (m, n))
        shapes: dict[str, Shape] = dict.fromkeys(names, (many, *compact_shape(side, m, n)))
        shapes |= {"left": (many, m, up_to(m)), "right": (many, up_to(n), n)}
        own = ("left", "right") if side == "full" else (side,)
        return Fit(shapes, (*names, *own))

    def update(self, parameter: Tensor, group: dict[str, Any], place: int) -> None:
        """Takes one step of one parameter; see ``LowMemoryOptimizer.update``."""
        assert parameter.grad is not None
        if not parameter.numel():
            return
        stack = None if group["role"] == "full" else as_matrix(parameter.shape)
        if stack is not None and sharded(parameter):
            raise ValueError(
                "GaLore decomposes whole matrices, and this one is sharded by rows: use Frugal with split='columns', "
                "or with split='random' and side='right'"
            )
        state, rule = (
            self.state[parameter],
            EarlyEps(beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"]),
        )
        step = tick(state)
        turn = Turn(int(group["seed"]), place, part=0, step=step, refreshes=1, since=1, density=group["density"])
        weights, gradient = local(parameter), local(parameter.grad)
        p, g = weights.contiguous(), gradient.contiguous()
        source = turn.generator(ROUNDING, p.device) if p.dtype == torch.bfloat16 else None
        rate = float(group["lr"])
        decay = rate * group["weight_decay"]
        if stack is None:
            for name in rule.moments():
                if name not in state:
                    state[name] = like(parameter, torch.zeros_like(g, dtype=compute_dtype(p.dtype)))
            if not p.is_meta:
                moments = [local(state[name]) for name in rule.moments()]
                sweep_all(p, g, moments, rule, step, rate, decay, source, self._scratch)
        else:
            parts = g.view(stack)
            if (step - 1) % group["update_gap"] == 0:
                self._refresh(parts, state, group)
            if not p.is_meta:
                for i, (w, part) in enumerate(zip(p.view(stack), parts, strict=True)):
                    basis = Basis(*(state[side][i] if side in state else None for side in ("left", "right")))
                    moments = [state[name][i] for name in rule.moments()]
                    low = rule.delta(basis.down(part.to(compute_dtype(p.dtype))), moments, step, rate)
                    _write(w, basis.up(low).mul_(group["scale"]), 1 - decay, source)
        if p is not weights:
            weights.copy_(p)

    def _refresh(self, parts: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Decomposes each matrix of a stack; its moments stay as they are."""
        many, *rest = parts.shape
        shape = (rest[0], rest[1])
        side = side_of(group["side"], shape)
        share = max(1, rank_of(side, shape, group["density"]))
        rank = min(share if group["rank"] is None else group["rank"], *shape)
        dtype = compute_dtype(parts.dtype)
        bases = [leading(part.to(dtype), side, rank) for part in parts]
        if side in ("left", "full"):
            state["left"] = torch.stack([basis.left for basis in bases if basis.left is not None])
        if side in ("right", "full"):
            state["right"] = torch.stack([basis.right for basis in bases if basis.right is not None])
        size = {"right": (shape[0], rank), "left": (rank, shape[1]), "full": (rank, rank)}[side]
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros(many, *size, dtype=dtype, device=parts.device)


@dataclass(frozen=True)
class EarlyEps(Adam):
    """Adam as GaLore has it: u = -rate sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps), and decay after the update."""

    def delta(self, g: Tensor, moments: Sequence[Tensor], age: Age, rate: float) -> Tensor:
        """See ``Rule``."""
        mean, square = moments
        mean.mul_(self.beta1).add_(g, alpha=1 - self.beta1)
        square.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
        corrected = rate * (1 - self.beta2**age) ** 0.5 / (1 - self.beta1**age)
        return mean.div(square.sqrt().add_(self.eps)).mul_(-corrected)

    def apply(self, p: Tensor, g: Tensor, moments: Sequence[Tensor], age: Age, rate: float, decay: float) -> None:
        """See ``Rule``."""
        p.add_(self.delta(g, moments, age, rate))
        if decay:
            p.mul_(1 - decay)


def _write(w: Tensor, change: Tensor, kept: float, source: torch.Generator | None) -> None:
    """``w = kept * (w + change)`` in the change's dtype, rounded where the weights are narrower."""
    if w.dtype == change.dtype:
        w.add_(change).mul_(kept)
        return
    for start, stop in tiles(*w.shape):
        round_to(w[start:stop], change[start:stop].add_(w[start:stop]).mul_(kept), source)
