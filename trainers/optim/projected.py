"""What optimizers in a subspace share: each parameter's side, rank and views, plain AdamW for the others, writing back.

A matrix (m, n) is looked at along its columns ("right": rows of n numbers, n x n basis) where m >= n, else along its
rows ("left"), which is the right side of its transpose: everything below is written for rows of ``width`` numbers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from trainers.optim.base import LowMemoryOptimizer, loss_of
from trainers.optim.bases import KINDS, Basis, Subspace, get_basis
from trainers.optim.coordinates import Scratch
from trainers.optim.fit import Fit, Shape
from trainers.optim.keyed import generator, key
from trainers.optim.learned import eigenbasis, family, gram, names_of, plan
from trainers.optim.rules import Adam
from trainers.optim.settings import in_range, whole
from trainers.optim.tensors import as_matrix, compute_dtype, like, local, round_to, sharded, sum_over_shards
from trainers.optim.transform import tiles
from trainers.optim.whole import sweep_all


class Layout(NamedTuple):
    """How a parameter is looked at."""

    matrices: int
    """How many matrices this process holds of it: 1, or its experts."""
    m: int
    """Rows of one matrix, over all processes."""
    n: int
    """Its columns."""
    right: bool
    """Whether a row of the matrix is what is transformed."""
    rank: int
    """Basis vectors kept."""
    split: bool
    """Whether the rows of the matrix are spread over processes."""

    @property
    def width(self) -> int:
        """Numbers in what is transformed, the size of the basis."""
        return self.n if self.right else self.m

    def views(self, tensor: Tensor) -> list[Tensor]:
        """Matrices of ``width`` columns.

        Args:
            tensor: This process's part of a tensor of the parameter's shape, contiguous.

        Returns:
            Views, one a matrix.
        """
        rows = tensor.numel() // max(1, self.matrices * self.n)
        stack = tensor.reshape(self.matrices, rows, self.n)
        return list((stack if self.right else stack.mT).unbind(0))


class ProjectedOptimizer(LowMemoryOptimizer):
    """Base of the optimizers that choose r basis vectors for each matrix."""

    transposed_left: ClassVar[bool]
    """Whether the published code uses the transposed cosines on the left too."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        """Keeps the groups.

        Args:
            params: Parameters, named parameters, or groups.
            defaults: Settings of every group that does not bring its own.
        """
        self._held: dict[tuple[object, ...], Basis] = {}
        self._leaders: dict[Tensor, Tensor] = {}
        super().__init__(params, defaults)

    def check(self, group: dict[str, Any]) -> None:
        """See ``LowMemoryOptimizer.check``."""
        check_group(group)

    def fit(self, parameter: Tensor, group: dict[str, Any]) -> Fit:
        """See ``LowMemoryOptimizer.fit``."""
        layout = self.layout(parameter, group)
        if layout is None:
            names = ("exp_avg", "exp_avg_sq")
            return Fit(dict.fromkeys(names, tuple(local(parameter).shape)), names)
        square: Shape = (layout.width, layout.width)
        own = self.fit_matrix(parameter, group, layout)
        return own._replace(shapes={"gram": square, "eigenbasis": square, **own.shapes})

    @abstractmethod
    def fit_matrix(self, parameter: Tensor, group: dict[str, Any], layout: Layout) -> Fit:
        """What the state of a matrix, or a stack of them, looks like.

        Args:
            parameter: That has been stepped.
            group: Its settings.
            layout: How it is looked at.

        Returns:
            Shapes of its own state, and what has to be there.
        """

    def layout(self, parameter: Tensor, group: dict[str, Any]) -> Layout | None:
        """How a parameter is looked at.

        Args:
            parameter: Any shape.
            group: Its settings.

        Returns:
            The layout, or None for plain AdamW.

        Raises:
            ValueError: The left side is asked for where the rows are spread over processes.
        """
        matrix = as_matrix(parameter.shape)
        official = group["compat"] == "official"
        if matrix is None or group.get("role") == "full" or (official and max(parameter.shape) >= 32000):
            return None
        stack, m, n = matrix
        if 0 in matrix:
            return None
        spread = sharded(parameter)
        split = spread and parameter.dim() != 3
        side = group["side"]
        right = side == "right" or (side == "std" and m >= n) or (side == "reverse" and m < n)
        if official and side == "std":
            # The published code knows the key and value shapes of two models.
            right = right or (m in (512, 1024) and n in (3584, 4096))
        if split and not right:
            if side != "std":
                raise ValueError("the rows of a sharded matrix are on several processes: use side right or std")
            right = True
        width = n if right else m
        rank = group["rank"] if group["density"] is None else round(group["density"] * width)
        held = local(parameter).shape[0] if spread and not split else stack
        return Layout(held, m, n, right, max(1, min(rank, width)), split)

    def basis(self, parameter: Tensor, group: dict[str, Any], layout: Layout) -> Basis:
        """The basis for a parameter.

        Args:
            parameter: For its dtype and device.
            group: Its settings.
            layout: For the size.

        Returns:
            The basis, kept for as long as the optimizer lives.
        """
        kind, transform = group["basis"], group["transform"]
        if kind == "learned":
            held = self.state[self._leader(parameter)]
            if "eigenbasis" not in held:
                raise ValueError(
                    "a learned basis needs the gradients of all layers of a type before any of them moves: step after "
                    "the backward pass, without gradient release, or choose another basis"
                )
            return Basis(held["eigenbasis"])
        if group["compat"] == "official" and transform != "fft":
            kind, transform = ("dct3" if layout.right or self.transposed_left else "dct"), "matmul"
        name = (kind, layout.width, compute_dtype(parameter.dtype), local(parameter).device, transform, group["seed"])
        if name not in self._held:
            self._held[name] = get_basis(*name[:4], transform=transform, seed=group["seed"])
        return self._held[name]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As in the base class; learned bases look at the gradients before any parameter moves."""
        loss = loss_of(closure)
        if any(group["basis"] == "learned" for group in self.param_groups):
            with torch.no_grad():
                self._learn()
        super().step()
        return loss

    def _learn(self) -> None:
        """One step of every learned basis whose type has a gradient."""
        families: dict[Tensor, list[tuple[Tensor, dict[str, Any], Layout]]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                layout = self.layout(parameter, group) if group["basis"] == "learned" else None
                if layout is not None:
                    leader = self._leader(parameter)
                    families.setdefault(leader, []).append((parameter, group, layout))
        for leader, members in families.items():
            if any(parameter.grad is not None for parameter, _, _ in members):
                self._learn_family(self.state[leader], members)

    def _learn_family(self, state: dict[str, Any], members: list[tuple[Tensor, dict[str, Any], Layout]]) -> None:
        _, group, layout = members[0]
        count = state.setdefault("learn_step", torch.tensor(0.0, device="cpu")).add_(1)
        add, renew, close = plan(int(count), group["learn_steps"], group["learn_gap"])
        if add:
            first = members[0][0]
            dtype, device, n = compute_dtype(first.dtype), local(first).device, layout.width
            total = state.setdefault("gram", torch.zeros(n, n, dtype=dtype, device=device))
            for parameter, _, own in members:
                if parameter.grad is not None:
                    share = torch.zeros_like(total)
                    for gradient in own.views(local(parameter.grad)):
                        part = gram(gradient.to(dtype))
                        part = sum_over_shards(parameter, part) if own.split else part
                        share.add_(part / part.diagonal().sum().clamp_(min=torch.finfo(dtype).tiny))
                    total.add_(share if own.split else sum_over_shards(parameter, share))
        if renew:
            old, new = state.get("eigenbasis"), eigenbasis(state["gram"])
            if old is not None:
                for parameter, _, own in members:
                    self.turn(parameter, own, old, new)
            state["eigenbasis"] = new
        if close:
            del state["gram"]

    def turn(self, parameter: Tensor, layout: Layout, old: Tensor, new: Tensor) -> None:
        """Takes a parameter's state from one learned basis to the next.

        Args:
            parameter: May have no state yet.
            layout: How it is looked at.
            old: (n, n), basis vectors as rows.
            new: The same, from now on.
        """

    def _leader(self, parameter: Tensor) -> Tensor:
        """The first parameter of a parameter's type, whose state holds their basis."""
        if parameter not in self._leaders:
            names = names_of(self.param_groups)
            firsts: dict[tuple[object, ...], Tensor] = {}
            self._leaders = {}
            for group in self.param_groups:
                for member in group["params"]:
                    layout = self.layout(member, group)
                    if layout is not None and group["basis"] == "learned":
                        kind = (family(names.get(member, "")), layout.width, layout.right, member.dtype)
                        self._leaders[member] = firsts.setdefault(kind, member)
        return self._leaders[parameter]

    def _forget(self) -> None:
        super()._forget()
        self._held, self._leaders, self._scratch = {}, {}, Scratch()

    def update_full(self, parameter: Tensor, group: dict[str, Any], place: int, rule: Adam) -> None:
        """One step of plain AdamW.

        Args:
            parameter: To be changed in place.
            group: Its settings.
            place: Its number.
            rule: Betas and eps.
        """
        state, dtype = self.state[parameter], compute_dtype(parameter.dtype)
        weight, gradient = local(parameter), local(parameter.grad)  # type: ignore[arg-type]
        if "step" not in state:
            state["step"] = torch.tensor(0.0, device="cpu")
            for name in rule.moments():
                state[name] = wrap(parameter, torch.zeros(weight.shape, dtype=dtype, device=weight.device))
        state["step"] += 1
        age, rate = int(state["step"]), float(group["lr"])
        moments = [local(state[name]) for name in rule.moments()]
        decay = rate * group["weight_decay"]
        if weight.is_meta:
            return
        work = weight.contiguous()
        draw = noise(weight, group, place, age)
        sweep_all(work, gradient.contiguous(), moments, rule, age, rate, decay, draw, self._scratch)
        if work is not weight:
            weight.copy_(work)


def write(
    target: Tensor,
    subspace: Subspace,
    coordinates: Tensor,
    *,
    alpha: float,
    beta: float,
    draw: torch.Generator | None,
) -> None:
    """``target = beta * target + alpha * combine(coordinates)``, in float32 and rounded where the target is narrower.

    Args:
        target: Weights, (rows, n), any strides.
        subspace: Where the coordinates live.
        coordinates: (rows, r).
        alpha: Factor of what is added.
        beta: Factor of what is there.
        draw: Source of random bits for stochastic rounding, or None.
    """
    if target.dtype == coordinates.dtype:
        subspace.add_to(target, coordinates, alpha=alpha, beta=beta)
        return
    for start, stop in tiles(*target.shape):
        wide = target[start:stop].to(coordinates.dtype)
        subspace.add_to(wide, coordinates[start:stop], alpha=alpha, beta=beta)
        round_to(target[start:stop], wide, draw)


def wrap(parameter: Tensor, part: Tensor) -> Tensor:
    """State as its parameter is: split over the same processes, for sharded checkpoints, or plain.

    Args:
        parameter: What the state belongs to.
        part: This process's rows of the state.

    Returns:
        A DTensor for a sharded parameter, else ``part``.
    """
    return like(parameter, part) if sharded(parameter) else part


def noise(weight: Tensor, group: dict[str, Any], place: int, step: int) -> torch.Generator | None:
    """Random bits for rounding a parameter's weights in one step: from its place and the step alone.

    Args:
        weight: For its dtype and device.
        group: With ``seed``.
        place: The parameter's number.
        step: The step's number.

    Returns:
        A generator for bfloat16 weights, else None.
    """
    if weight.dtype != torch.bfloat16 or weight.device.type == "meta":
        return None
    return generator(key(group["seed"], place, step), weight.device)


def check_group(group: dict[str, Any]) -> None:
    """Checks the settings that all of these optimizers share.

    Args:
        group: A parameter group.

    Raises:
        ValueError: A setting is out of range; the message says which.
    """
    in_range("lr", group["lr"], low=0)
    in_range("weight_decay", group["weight_decay"], low=0)
    if group["density"] is None:
        whole("rank", group["rank"])
    elif not 0 < group["density"] <= 1:
        raise ValueError(f"density must be in (0, 1], not {group['density']}")
    allowed: dict[str, tuple[object, ...]] = {
        "basis": (*KINDS, "learned"),
        "side": ("std", "reverse", "left", "right"),
        "norm": (1, 2),
        "transform": ("auto", "matmul", "fft"),
        "compat": (None, "official"),
        "role": (None, "full", "projected"),
    }
    for name, values in allowed.items():
        if group.get(name) not in values:
            raise ValueError(f"{name} must be one of {', '.join(map(str, values))}, not {group[name]!r}")
    if group["basis"] == "learned":
        whole("learn_steps", group["learn_steps"])
        whole("learn_gap", group["learn_gap"])
        in_range("learn_gap", group["learn_gap"], low=group["learn_steps"])
    if group["transform"] == "fft" and group["basis"] != "dct":
        raise ValueError(f"transform fft is for basis dct; {group['basis']} has no FFT")
    if group["compat"] == "official" and group["basis"] != "dct":
        raise ValueError("compat official is for basis dct, whose published pair of transforms it selects")
