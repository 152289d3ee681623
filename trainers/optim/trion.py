"""Trion (arXiv 2505.17967): Muon on the r coordinates of the momentum that matter, in a fixed orthonormal basis.

For a gradient G of rows of n numbers and a basis Q, each step does

    M = M + G,   S = M Q^T,   the r basis vectors with the highest column norms of S are chosen,   a = S[:, chosen]
    M = M - (1 - mu) a Q[chosen]          (what is not chosen stays whole: error feedback)
    W = (1 - lr wd) W - lr scale orthogonalize(a) Q[chosen]

on one device or many, with or without a process group. State: the momentum, 4 m n bytes in float32 (as much as Muon);
nothing of the choice is stored. Working memory: one matrix of the size of the largest parameter that is projected.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from trainers.optim.base import Parameters
from trainers.optim.fit import Fit
from trainers.optim.newton_schulz import CONSTANT, SCHEDULED, orthogonalize
from trainers.optim.projected import Layout, ProjectedOptimizer, noise, wrap, write
from trainers.optim.rules import Adam
from trainers.optim.select import choose
from trainers.optim.settings import in_range
from trainers.optim.tensors import as_matrix, compute_dtype, local, sum_over_shards
from trainers.optim.transform import Norm, plain_rows

_SCALES = ("kj", "none", "kimi", "dion")


class Trion(ProjectedOptimizer):
    """Orthogonalised low-rank momentum for matrices; AdamW, with a rate of its own, for vectors and groups of role
    full.

    Any keyword below may be overridden in a parameter group. Vectors among matrices are given a group of their own.
    """

    transposed_left = False

    def __init__(
        self,
        params: Parameters,
        lr: float = 0.02,
        *,
        rank: int = 256,
        density: float | None = None,
        basis: Literal["dct", "random", "hadamard", "identity", "learned"] = "dct",
        side: Literal["std", "reverse", "left", "right"] = "std",
        momentum: float = 0.95,
        norm: Norm = 1,
        steps: int = 5,
        coefficients: Literal["constant", "scheduled"] = "constant",
        newton_schulz_dtype: Literal["auto", "weights", "bfloat16"] = "auto",
        scale: Literal["kj", "none", "kimi", "dion"] = "kj",
        weight_decay: float = 0.0,
        transform: Literal["auto", "matmul", "fft"] = "auto",
        adam_lr: float = 3e-4,
        adam_betas: tuple[float, float] = (0.9, 0.95),
        adam_eps: float = 1e-10,
        learn_steps: int = 10,
        learn_gap: int = 200,
        seed: int = 0,
        compat: Literal["official"] | None = None,
    ) -> None:
        """Checks the settings; state comes with each parameter's first gradient.

        Args:
            params: Parameters, named parameters or groups; a group with ``role="full"`` gets plain AdamW.
            lr: Learning rate of the matrices.
            rank: Basis vectors kept for each matrix, at most its smaller side.
            density: Share of the basis vectors kept, instead of a rank.
            basis: Where to look: cosines, a random orthogonal basis, Hadamard, the columns as they are, or
                one learned for all layers of a type (learned.py).
            side: ``std`` transforms the shorter side of a matrix; ``right`` its rows, ``left`` its columns, ``reverse``
                the longer side. Rows that are spread over processes are always looked at from the right.
            momentum: Share of the chosen part of the momentum that stays.
            norm: Score by the sum of absolute values (1) or of squares (2) of a column.
            steps: Newton-Schulz steps, at most 5.
            coefficients: Of Newton-Schulz: Muon's constant triple, or the published kernel's schedule.
            newton_schulz_dtype: ``bfloat16`` as published, ``weights`` for float32 (float64 where weights are),
                ``auto`` for bfloat16 on CUDA; where rows are spread over processes it is always float32 or float64.
            scale: Factor of the update of an (R, C) matrix: ``kj`` sqrt(max(1, R / C)), ``none`` 1, ``kimi``
                0.2 sqrt(max(R, C)), ``dion`` sqrt(R / C).
            weight_decay: Share of each weight taken off per unit of learning rate.
            transform: How the cosines are computed; ``auto`` takes the faster way by a committed table.
            adam_lr: Learning rate of groups of role full that bring none.
            adam_betas: Their decay of the mean of the gradient and of its square.
            adam_eps: Added to their root of the mean square.
            learn_steps: Steps whose gradients a learned basis is made of.
            learn_gap: Steps between two learned bases.
            seed: Of the random basis and of stochastic rounding.
            compat: ``official`` multiplies by the published bases: the transposed cosines on the right, the cosines on
                the left.
        """
        defaults = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, defaults)

    def check(self, group: dict[str, Any]) -> None:
        """See ``LowMemoryOptimizer.check``."""
        super().check(group)
        _check(group)

    def fit_matrix(self, parameter: Tensor, group: dict[str, Any], layout: Layout) -> Fit:  # noqa: ARG002
        """See ``ProjectedOptimizer.fit_matrix``."""
        return Fit({"momentum_buffer": tuple(local(parameter).shape)}, ("momentum_buffer",))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, and another of role full for its vectors, if it has both.

        Args:
            param_group: As torch takes it.
        """
        self.check(self.defaults | param_group)
        given = param_group["params"]
        members = [given] if isinstance(given, Tensor) else list(given)
        group = dict(param_group) | {"params": members}
        rate = group.get("adam_lr", self.defaults["adam_lr"])
        if group.get("role") == "full":
            super().add_param_group({"lr": rate} | group)
            return
        flat = [as_matrix((m[1] if isinstance(m, tuple) else m).shape) is None for m in members]
        if not all(flat):
            super().add_param_group(_pick(group, [not one for one in flat]))
        if any(flat):
            super().add_param_group(_pick(group, flat) | {"lr": rate, "role": "full"})

    def update(self, parameter: Tensor, group: dict[str, Any], place: int) -> None:
        """See the base class."""
        layout = self.layout(parameter, group)
        if layout is None:
            beta1, beta2 = group["adam_betas"]
            self.update_full(parameter, group, place, Adam(beta1, beta2, group["adam_eps"]))
            return
        state, weight = self.state[parameter], local(parameter)
        if "step" not in state:
            dtype = compute_dtype(parameter.dtype)
            state["step"] = torch.tensor(0.0, device="cpu")
            state["momentum_buffer"] = wrap(parameter, torch.zeros(weight.shape, dtype=dtype, device=weight.device))
        state["step"] += 1
        momentum = local(state["momentum_buffer"]).add_(local(parameter.grad))  # type: ignore[arg-type]
        work = weight if weight.is_contiguous() else weight.contiguous()
        draw = noise(weight, group, place, int(state["step"]))
        for target, whole in zip(layout.views(work), layout.views(momentum), strict=True):
            self._update_matrix(parameter, group, layout, target, whole, draw)
        if work is not weight:
            weight.copy_(work)

    def _update_matrix(
        self,
        parameter: Tensor,
        group: dict[str, Any],
        layout: Layout,
        target: Tensor,
        momentum: Tensor,
        draw: torch.Generator | None,
    ) -> None:
        """One step of one matrix, oriented so that its rows are transformed."""
        basis = self.basis(parameter, group, layout)
        total = partial(sum_over_shards, parameter) if layout.split else None
        spectrum = basis.spectrum(plain_rows(momentum, momentum.dtype), group["norm"])
        scores = spectrum.scores if total is None else total(spectrum.scores)
        index = choose(scores, layout.rank).sort().values
        coordinates = spectrum.take(index)
        del spectrum
        subspace = basis.subspace(index)
        subspace.add_to(momentum, coordinates, alpha=group["momentum"] - 1)
        wanted = group["newton_schulz_dtype"]
        coarse = wanted == "bfloat16" or (wanted == "auto" and target.is_cuda and momentum.dtype == torch.float32)
        orthogonal = orthogonalize(
            coordinates,
            (CONSTANT if group["coefficients"] == "constant" else SCHEDULED)[: group["steps"]],
            dtype=torch.bfloat16 if coarse and total is None else None,
            total=total,
        )
        rate = float(group["lr"])
        alpha = -rate * _scale(group["scale"], layout.m, layout.n)
        write(target, subspace, orthogonal, alpha=alpha, beta=1 - rate * group["weight_decay"], draw=draw)


def _pick(group: dict[str, Any], keep: list[bool]) -> dict[str, Any]:
    """A group with some of its parameters, and their names where it lists them."""
    lists = {name: group[name] for name in ("params", "names") if name in group}
    return group | {name: [one for one, kept in zip(many, keep, strict=True) if kept] for name, many in lists.items()}


def _scale(kind: str, rows: int, columns: int) -> float:
    """Factor of the update of a (rows, columns) matrix."""
    if kind == "kj":
        return math.sqrt(max(1, rows / columns))
    if kind == "kimi":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(rows / columns) if kind == "dion" else 1.0


def _check(group: dict[str, Any]) -> None:
    """Raises ``ValueError`` for settings of Trion that are out of range."""
    in_range("momentum", group["momentum"], low=0, high=1, open_high=True)
    in_range("adam_lr", group["adam_lr"], low=0)
    in_range("adam_eps", group["adam_eps"], low=0)
    for number, beta in enumerate(group["adam_betas"]):
        in_range(f"adam_betas[{number}]", beta, low=0, high=1, open_high=True)
    if group["steps"] not in (1, 2, 3, 4, 5):
        raise ValueError(f"steps must be in 1 to 5, not {group['steps']}")
    for name, values in (
        ("scale", _SCALES),
        ("coefficients", ("constant", "scheduled")),
        ("newton_schulz_dtype", ("auto", "weights", "bfloat16")),
    ):
        if group[name] not in values:
            raise ValueError(f"{name} must be one of {', '.join(values)}, not {group[name]!r}")
