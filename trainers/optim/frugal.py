"""FRUGAL (arXiv 2411.07837): AdamW on a small, changing part of each weight matrix, and the sign of the gradient on
the rest, so that only the small part needs state.

With G the gradient, D the projection down to the part that has state and U back up, one step is
``W <- (1 - lr wd) W + U(rule(D G)) - lr_free sign(G - U D G)``. The part is drawn anew every ``update_gap`` steps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from trainers.optim.base import LowMemoryOptimizer, Parameters
from trainers.optim.blocks import Blocks
from trainers.optim.clock import Turn, advance, tick
from trainers.optim.coordinates import Scratch
from trainers.optim.fit import Fit, Shape, compact_shape, up_to
from trainers.optim.projections import Projections, side_of
from trainers.optim.rules import rule_of
from trainers.optim.settings import check_frugal
from trainers.optim.splits import Coordinates, rounding
from trainers.optim.tensors import as_matrix, compute_dtype, like, local, sharded, sum_over_shards
from trainers.optim.whole import sweep_all


class Frugal(LowMemoryOptimizer):
    """FRUGAL with any split; see ``__init__`` for the settings.

    State: each parameter's clock (``step``, ``refreshes``, ``since``: int64 scalars), and what its split keeps, as
    described in ``Coordinates``, ``Projections`` and ``Blocks``. All of it is tensors. Groups with ``role="full"``, and
    vectors and scalars of any other split than ``block``, have the plain rule's moments for every weight.

    Sharded parameters (DTensor, by dimension 0) are stepped shard by shard without communication for ``columns``,
    ``column_blocks``, ``block`` and ``random`` with ``side="right"``; ``select="top"`` adds one number a column up.

    Not covered: sparse and complex parameters; global-norm clipping and gradient scaling, which belong before the step;
    NaN among the gradients: in the part without state it has the sign 0 and leaves no trace, so look at the loss.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        *,
        density: float = 0.25,
        split: Literal["columns", "column_blocks", "rows", "randk", "block", "svd", "random"] = "columns",
        side: Literal["std", "reverse", "left", "right", "full"] = "std",
        order: Literal["random", "ascending", "descending", "mirror"] = "random",
        update_gap: int = 200,
        lr_scale: float = 1.0,
        free_lr_scale: float = 1.0,
        full: Literal["adamw", "lion", "sgdm"] = "adamw",
        free: Literal["sign", "sgd", "none"] = "sign",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        state: Literal["reset", "keep", "project", "carry"] = "reset",
        select: Literal["random", "top"] = "random",
        density_end: float | None = None,
        decay_steps: int | None = None,
        stagger: bool = False,
        block_columns: int = 64,
        moments: Literal["float32", "int8"] = "float32",
        seed: int = 0,
        compat: Literal["official"] | None = None,
    ) -> None:
        """Makes the optimizer; every setting may also be a key of a group.

        Args:
            params: Parameters, named parameters, or groups as ``split_parameters`` gives them. Matrices of a group
                are split unless its ``role`` is ``"full"``; convolutions count as (out, in * kernel) and stacks
                (E, m, n) as E matrices.
            lr: Learning rate. Decay takes ``lr * weight_decay`` of all weights, with or without state.
            density: Share of columns, rows, elements, parameters (``block``) or dimensions that has state. 0 is
                signSGD, 1 is the plain rule.
            split: What the part with state consists of: scattered ``columns``; whole ``column_blocks`` of
                ``block_columns``; ``rows``; single elements anywhere (``randk``); whole parameters (``block``); the
                gradient's leading singular vectors (``svd``) or ``random`` orthonormal ones.
            side: For ``svd`` and ``random``: on which side of the matrix the basis is. ``std`` is right (columns) for
                m >= n, else left.
            order: For ``block``: how the parameters take turns.
            update_gap: Steps between refreshes, counted for each parameter.
            lr_scale: Factor on ``lr`` for split matrices.
            free_lr_scale: Further factor for their part without state.
            full: Rule for what has state: AdamW, Lion, or SGD with momentum.
            free: Rule for what has none: sign of the gradient, the gradient, or no update.
            betas: Decay of the moments.
            eps: Added to the root of the mean square.
            weight_decay: Decoupled.
            momentum: Of ``sgdm``.
            state: What a refresh does to the moments. ``reset``: zeros, and bias correction starts again.
                ``keep``: they stay as they are, although they now belong to other coordinates. ``project``: the
                paper's Algorithm 1, what belongs to the new part is kept. ``carry``: the same, with an age for each
                column or row, so that fresh ones are corrected as fresh ones.
            select: ``random`` part, or the ``top`` columns, blocks or rows by the running mean of the gradient's
                squared norm.
            density_end: Density after ``decay_steps``; it changes on a straight line, at refreshes.
            decay_steps: Steps to get there.
            stagger: Spread the refreshes of different parameters over different steps.
            block_columns: Width of a block of ``column_blocks``.
            moments: How the moments of split matrices are stored; ``int8`` takes a quarter of the memory.
            seed: Of all random choices.
            compat: ``official`` follows the published code to the bit: numbers of coordinates rounded down, plain
                order of operations, and bfloat16 weights rounded to nearest.

        Raises:
            ValueError: A setting is out of range, or has no meaning beside another.
        """
        settings = dict(locals())
        for name in ("self", "params", "__class__"):
            settings.pop(name, None)
        super().__init__(params, settings | {"role": "projected"})

    def check(self, group: dict[str, Any]) -> None:
        """See ``LowMemoryOptimizer.check``."""
        check_frugal(group)

    def fit(self, parameter: Tensor, group: dict[str, Any]) -> Fit:
        """See ``LowMemoryOptimizer.fit``. The number of columns, rows or dimensions may be any: densities change."""
        names, state = rule_of(group).moments(), self.state[parameter]
        shape, split, stack = tuple(local(parameter).shape), group["split"], as_matrix(local(parameter).shape)
        if group["role"] == "full" or stack is None or split == "block":
            plain = group["role"] == "full" or split != "block"
            return Fit(dict.fromkeys(names, shape), () if plain else CLOCK)
        many, m, n = stack
        shapes: dict[str, Shape] = {}
        own: tuple[str, ...] = ()
        if split in ("svd", "random"):
            side = side_of(group["side"], (m, n))
            size = compact_shape(side, m, n)
            own = ("left", "right") if side == "full" else (side,)
            shapes = {"left": (m, up_to(m)), "right": (up_to(n), n)}
        else:
            line = m if split == "rows" else n
            sizes: dict[str, Shape] = {"rows": (up_to(m), n), "randk": (up_to(m * n),)}
            size = sizes.get(split, (m, up_to(n)))
            shapes = {"score": (line,), "indices": (up_to(line),), "age": (up_to(line),)}
        shapes |= dict.fromkeys(names, size)
        if len(shape) == 3:
            shapes = {name: (many, *size) for name, size in shapes.items()}
        return Fit(shapes, (*CLOCK, *names, *own) if names[0] in state else CLOCK)

    def _forget(self) -> None:
        super()._forget()
        self._scratch = Scratch()
        self._coordinates = Coordinates(self._scratch)
        self._blocks = Blocks(self._scratch)
        self._projections = Projections()

    def update(self, parameter: Tensor, group: dict[str, Any], place: int) -> None:
        """Takes one step of one parameter; see ``LowMemoryOptimizer.update``."""
        assert parameter.grad is not None
        block = group["split"] == "block"
        whole = group["role"] == "full" or (as_matrix(parameter.shape) is None and not block)
        if not whole:
            _check_sharding(parameter, group)
        weights, gradient = local(parameter), local(parameter.grad)
        p, g = weights.contiguous(), gradient.contiguous()
        if whole:
            self._whole(parameter, p, g, group, place)
        elif block:
            self._block(parameter, p, g, group, place)
        else:
            self._matrices(parameter, p, g, group, place)
        if p is not weights:
            weights.copy_(p)

    def _whole(self, parameter: Tensor, p: Tensor, g: Tensor, group: dict[str, Any], place: int) -> None:
        state, rule = self.state[parameter], rule_of(group)
        turn = Turn(int(group["seed"]), place, part=0, step=tick(state), refreshes=1, since=1, density=1.0)
        for name in rule.moments():
            if name not in state:
                state[name] = like(parameter, torch.zeros_like(p, dtype=compute_dtype(p.dtype)))
        if not p.is_meta:
            moments = [local(state[name]) for name in rule.moments()]
            rate = float(group["lr"])
            decay = rate * group["weight_decay"]
            source = rounding(p, turn, group)
            sweep_all(p, g, moments, rule, turn.step, rate, decay, source, self._scratch)

    def _block(self, parameter: Tensor, p: Tensor, g: Tensor, group: dict[str, Any], place: int) -> None:
        state = self.state[parameter]
        turn = advance(state, group, place)
        if turn.due:
            fresh = self._blocks.refresh(p, turn, group, self.place(group["params"][0]))
            for name in rule_of(group).moments():
                state.pop(name, None)
            state.update({name: like(parameter, value) for name, value in fresh.items()})
        if not p.is_meta:
            own = {name: local(state[name]) for name in rule_of(group).moments() if name in state}
            self._blocks.advance(p, g, own, turn, group)

    def _matrices(self, parameter: Tensor, p: Tensor, g: Tensor, group: dict[str, Any], place: int) -> None:
        stack, state = as_matrix(p.shape), self.state[parameter]
        assert stack is not None
        split = self._projections if group["split"] in ("svd", "random") else self._coordinates
        turn = advance(state, group, place)
        shape, many = stack[1:], p.dim() == 3
        pairs = [
            (p[i].view(shape), g[i].view(shape)) if many else (p.view(shape), g.view(shape)) for i in range(stack[0])
        ]

        def own(part: int) -> dict[str, Tensor]:
            found = {name: local(value) for name, value in state.items() if name not in CLOCK}
            return {name: value[part] for name, value in found.items()} if many else found

        def total(value: Tensor) -> Tensor:
            return sum_over_shards(parameter, value)

        turns = [replace(turn, part=part) if part else turn for part in range(stack[0])]
        if turn.due:
            made = [split.refresh(*pairs[i], own(i), turns[i], group, total) for i in range(stack[0])]
            for name in [name for name in state if name not in CLOCK]:
                del state[name]
            for name in made[0]:
                value = torch.stack([one[name] for one in made]) if many else made[0][name]
                state[name] = like(parameter, value) if name in rule_of(group).moments() else value
        if not p.is_meta:
            for i in range(stack[0]):
                split.advance(*pairs[i], own(i), turns[i], group, total)


CLOCK = ("step", "refreshes", "since")


def _check_sharding(parameter: Tensor, group: dict[str, Any]) -> None:
    """Raises ``ValueError`` for a split that would need other processes' rows."""
    if not sharded(parameter):
        return
    split, side = group["split"], group["side"]
    if parameter.dim() == 3:
        raise ValueError("stacks of matrices cannot be sharded by their first dimension; give them role='full'")
    if group["moments"] == "int8":
        raise ValueError("moments='int8' cannot be sharded: a block of codes would span processes; use float32")
    if split in ("columns", "column_blocks", "block") or (split == "random" and side == "right"):
        return
    what = f"split={split!r}" + (f" with side={side!r}" if split in ("svd", "random") else "")
    raise ValueError(
        f"{what} needs rows that other processes hold, as this parameter is sharded by rows; use columns, "
        "column_blocks, block, or random with side='right'"
    )
