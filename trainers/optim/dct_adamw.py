"""DCT-AdamW (arXiv 2505.17967): AdamW on the r coordinates of each gradient that matter, in a fixed orthonormal basis.

For a gradient G of rows of n numbers, a basis Q and error feedback E (zero without it), step t does

    A = G + E,   S = A Q^T,   the r basis vectors with the highest column norms of S are kept,   a = S[:, kept]
    E = A - a Q[kept]
    m = b1 m + (1 - b1) a,   v = b2 v + (1 - b2) a^2
    W = (1 - lr wd) W - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) Q[kept]

Choosing again every ``update_gap`` steps moves the state from the old subspace to the new one. Q is orthonormal, so
that rotation keeps the state of vectors that stay, bit for bit, and zeroes that of newcomers (see select.py).

State of a matrix (m, n) with rows m >= n: 8 m r + 4 r + 4 bytes in float32 (4 r more with ``ages``), m n 4 more with
full error feedback, m (n + 8 ceil(n / 256)) with 8 bits, m (n / 2 + 8 ceil(n / 256)) with 4; the basis, once for all
layers of a size, is no state. Working memory: one matrix of the size of the largest parameter that is
projected.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from trainers.optim.base import Parameters
from trainers.optim.bases import Subspace
from trainers.optim.feedback import BITS, BLOCK, Codes, Feedback, decode, empty_codes, encode
from trainers.optim.fit import Fit, Shape, up_to
from trainers.optim.learned import turn
from trainers.optim.projected import Layout, ProjectedOptimizer, noise, wrap, write
from trainers.optim.rules import Adam
from trainers.optim.select import arrange, choose, forget
from trainers.optim.settings import in_range, whole
from trainers.optim.tensors import compute_dtype, local, sum_over_shards
from trainers.optim.transform import Norm, Rows, plain_rows, tiles

_CODED = ("error_code", "error_low", "error_step")
_STATE = ("exp_avg", "exp_avg_sq", "index", "age", *_CODED)


class DctAdamW(ProjectedOptimizer):
    """AdamW in the r basis vectors of each matrix that score highest; plain AdamW for vectors and groups of role full.

    Any keyword below may be overridden in a parameter group.
    """

    transposed_left = True

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        *,
        rank: int = 256,
        density: float | None = None,
        basis: Literal["dct", "random", "hadamard", "identity", "learned"] = "dct",
        side: Literal["std", "reverse", "left", "right"] = "std",
        update_gap: int = 1,
        rotate: bool = True,
        norm: Norm = 1,
        feedback: Feedback = "none",
        transform: Literal["auto", "matmul", "fft"] = "auto",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        ages: bool = False,
        hysteresis: float = 0.0,
        learn_steps: int = 10,
        learn_gap: int = 200,
        seed: int = 0,
        compat: Literal["official"] | None = None,
    ) -> None:
        """Checks the settings; state comes with each parameter's first gradient.

        Args:
            params: Parameters, named parameters or groups; a group with ``role="full"`` gets plain AdamW.
            lr: Learning rate.
            rank: Basis vectors kept for each matrix, at most its smaller side; all of them is AdamW in a turned frame.
            density: Share of the basis vectors kept, instead of a rank.
            basis: Where to look: cosines, a random orthogonal basis, Hadamard, the columns as they are, or
                one learned for all layers of a type (learned.py).
            side: ``std`` transforms the shorter side of a matrix; ``right`` its rows, ``left`` its columns, ``reverse``
                the longer side. Rows that are spread over processes are always looked at from the right.
            update_gap: Choose again in step 1 and in every step that this divides.
            rotate: Give newcomers fresh state; False lets them go on with that of the vectors they replace.
            norm: Score by the sum of absolute values (1) or of squares (2) of a column.
            feedback: Add what an update left out to the next gradient, held in full or in 8 or 4 bits.
            transform: How the cosines are computed; ``auto`` takes the faster way by a committed table.
            betas: Decay of the mean of the coordinates and of their squares.
            eps: Added to the root of the mean square.
            weight_decay: Share of each weight taken off per unit of learning rate.
            ages: Correct the bias of each column by its own age instead of the parameter's: newcomers late in a run
                otherwise start with steps up to 3.2 times too long.
            hysteresis: A vector is replaced only by one with a score more than (1 + hysteresis) times as high.
            learn_steps: Steps whose gradients a learned basis is made of.
            learn_gap: Steps between two learned bases.
            seed: Of the random basis and of stochastic rounding.
            compat: ``official`` computes what the published code does: the transposed cosines by matmul, the DCT-II by
                fft with norm 1, slots in the order of the scores, plain AdamW from a dimension of 32,000 on, and the
                right side for the key and value shapes of two models.
        """
        defaults = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, defaults)

    def check(self, group: dict[str, Any]) -> None:
        """See ``LowMemoryOptimizer.check``."""
        super().check(group)
        _check(group)

    def fit_matrix(self, parameter: Tensor, group: dict[str, Any], layout: Layout) -> Fit:
        """See ``ProjectedOptimizer.fit_matrix``. The rank may be any: a group's may change."""
        weight, width, rank = local(parameter), layout.width, up_to(layout.width)
        stack = (layout.matrices,) if parameter.dim() == 3 else ()
        rows = weight.numel() // max(1, layout.matrices * width)
        shapes: dict[str, Shape] = dict.fromkeys(("exp_avg", "exp_avg_sq"), (*stack, rows, rank))
        shapes |= dict.fromkeys(("index", "age"), (*stack, rank))
        needed: tuple[str, ...] = ("exp_avg", "exp_avg_sq", "index")
        bits = BITS.get(group["feedback"])
        if group["feedback"] == "full":
            return Fit({**shapes, "error": tuple(weight.shape)}, (*needed, "error"), _CODED)
        if bits:
            shapes["error_code"] = (*stack, rows, width if bits == 8 else -(-width // 2))
            shapes |= dict.fromkeys(("error_low", "error_step"), (*stack, rows, -(-width // BLOCK)))
            return Fit(shapes, (*needed, *_CODED), ("error",))
        return Fit(shapes, needed, ("error", *_CODED))

    def update(self, parameter: Tensor, group: dict[str, Any], place: int) -> None:
        """See the base class."""
        beta1, beta2 = group["betas"]
        rule = Adam(beta1, beta2, group["eps"])
        layout = self.layout(parameter, group)
        if layout is None:
            self.update_full(parameter, group, place, rule)
            return
        state = self.state[parameter]
        if "step" not in state:
            self._start(parameter, group, layout)
        state["step"] += 1
        weight = local(parameter)
        work = weight if weight.is_contiguous() else weight.contiguous()
        targets, gradients = layout.views(work), layout.views(local(parameter.grad))  # type: ignore[arg-type]
        draw = noise(weight, group, place, int(state["step"]))
        for number, (target, gradient) in enumerate(zip(targets, gradients, strict=True)):
            own = self._own(parameter, layout, number)
            self._update_matrix(parameter, group, layout, target, gradient, own, rule, draw)
        if work is not weight:
            weight.copy_(work)

    def turn(self, parameter: Tensor, layout: Layout, old: Tensor, new: Tensor) -> None:
        """See the base class."""
        if "index" in self.state[parameter]:
            for number in range(layout.matrices):
                own = self._own(parameter, layout, number)
                energy = own["exp_avg_sq"].sum(0)
                turn(own, sum_over_shards(parameter, energy) if layout.split else energy, old, new)

    def _own(self, parameter: Tensor, layout: Layout, number: int) -> dict[str, Tensor]:
        """The state of one matrix of a parameter, as views."""
        own = {}
        for name, value in self.state[parameter].items():
            if name == "error":
                own[name] = layout.views(local(value))[number]
            elif name in _STATE:
                own[name] = local(value)[number] if parameter.dim() == 3 else local(value)
        return own

    def _start(self, parameter: Tensor, group: dict[str, Any], layout: Layout) -> None:
        """Makes the state of a matrix or a stack of them: zeros."""
        weight, dtype, state = local(parameter), compute_dtype(parameter.dtype), self.state[parameter]
        stack = (layout.matrices,) if parameter.dim() == 3 else ()
        rows = weight.numel() // max(1, layout.matrices * layout.width)
        new = {
            name: torch.zeros(*stack, rows, layout.rank, dtype=dtype, device=weight.device)
            for name in ("exp_avg", "exp_avg_sq")
        }
        bits = BITS.get(group["feedback"])
        if bits:
            codes = empty_codes(math.prod((*stack, rows)), layout.width, bits, dtype, weight.device)
            new |= {f"error_{name}": part.view(*stack, rows, part.shape[1]) for name, part in codes._asdict().items()}
        elif group["feedback"] == "full":
            new["error"] = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        state["step"] = torch.tensor(0.0, device="cpu")
        state.update({name: wrap(parameter, part) for name, part in new.items()})
        shared = {"index": torch.zeros(*stack, layout.rank, dtype=torch.int32, device=weight.device)}
        if group["ages"]:
            shared["age"] = torch.zeros(*stack, layout.rank, dtype=torch.int32, device=weight.device)
        state.update({name: part if layout.split else wrap(parameter, part) for name, part in shared.items()})

    def _update_matrix(
        self,
        parameter: Tensor,
        group: dict[str, Any],
        layout: Layout,
        target: Tensor,
        gradient: Tensor,
        own: dict[str, Tensor],
        rule: Adam,
        draw: torch.Generator | None,
    ) -> None:
        """One step of one matrix, oriented so that its rows are transformed."""
        mean, square = own["exp_avg"], own["exp_avg_sq"]
        step = int(self.state[parameter]["step"])
        basis = self.basis(parameter, group, layout)
        rows = _corrected(gradient, own, BITS.get(group["feedback"]), mean.dtype)
        if step == 1 or step % group["update_gap"] == 0:
            spectrum = basis.spectrum(rows, group["norm"])
            scores = sum_over_shards(parameter, spectrum.scores) if layout.split else spectrum.scores
            self._choose(scores, group, own, first=step == 1)
            subspace = basis.subspace(own["index"])
            coordinates = spectrum.take(own["index"])
            del spectrum
        else:
            subspace = basis.subspace(own["index"])
            coordinates = subspace.project(rows)
        _keep_rest(rows, subspace, coordinates, own, BITS.get(group["feedback"]))
        age: int | Tensor = step
        if "age" in own:
            age = own["age"].add_(1)
        rate = float(group["lr"])
        delta = rule.delta(coordinates, (mean, square), age, rate)
        write(target, subspace, delta, alpha=1.0, beta=1 - rate * group["weight_decay"], draw=draw)

    def _choose(self, scores: Tensor, group: dict[str, Any], own: dict[str, Tensor], *, first: bool) -> None:
        """Fills the slots anew and turns the state with them, in place."""
        index = own["index"]
        chosen = choose(scores, index.numel(), None if first else index, group["hysteresis"])
        if group["compat"] == "official" and not group["rotate"]:
            index.copy_(chosen)
        elif first:
            index.copy_(chosen.sort().values)
        else:
            arranged, fresh = arrange(index, chosen, scores.numel())
            index.copy_(arranged)
            if group["rotate"]:
                for name in ("exp_avg", "exp_avg_sq", "age"):
                    if name in own:
                        forget(own[name], fresh)


def _corrected(gradient: Tensor, own: dict[str, Tensor], bits: int | None, dtype: torch.dtype) -> Rows:
    """The gradient plus what earlier updates left out; held whole in full precision only, where it replaces the
    error."""
    if "error" in own:
        return plain_rows(own["error"].add_(gradient), dtype)
    if bits is None:
        return plain_rows(gradient, dtype)
    count, width = gradient.shape
    codes = _codes(own)

    def read(start: int, stop: int) -> Tensor:
        return decode(codes.tile(start, stop), width) + gradient[start:stop].to(dtype)

    return Rows(count, width, read)


def _keep_rest(rows: Rows, subspace: Subspace, coordinates: Tensor, own: dict[str, Tensor], bits: int | None) -> None:
    """Stores what the update leaves out, ``rows - combine(coordinates)``."""
    if "error" in own:
        subspace.add_to(own["error"], coordinates, alpha=-1)
    elif bits is not None:
        codes = _codes(own)
        for start, stop in tiles(rows.height, rows.width):
            rest = rows.read(start, stop)
            subspace.add_to(rest, coordinates[start:stop], alpha=-1)
            for held, new in zip(codes.tile(start, stop), encode(rest, bits), strict=True):
                held.copy_(new)


def _codes(own: dict[str, Tensor]) -> Codes:
    return Codes(own["error_code"], own["error_low"], own["error_step"])


def _check(group: dict[str, Any]) -> None:
    """Raises ``ValueError`` for settings of DCT-AdamW that are out of range or do not go together."""
    for name, beta in zip(("betas[0]", "betas[1]"), group["betas"], strict=True):
        in_range(name, beta, low=0, high=1, open_high=True)
    in_range("eps", group["eps"], low=0)
    whole("update_gap", group["update_gap"])
    in_range("hysteresis", group["hysteresis"], low=0)
    if group["feedback"] not in ("none", "full", *BITS):
        raise ValueError(f"feedback must be none, full, 8bit or 4bit, not {group['feedback']!r}")
    if group["compat"] == "official" and group["transform"] == "fft" and group["norm"] != 1:
        raise ValueError("compat official with transform fft scores by norm 1, as published; leave norm at 1")
    if group["ages"] and not group["rotate"]:
        raise ValueError("ages needs rotate: without it a newcomer goes on with the state of another vector")
