"""Zeroth-order tuning: QZO on the scales of quantised weights (arXiv 2505.13430), MeZO on weights (arXiv 2305.17333).

A step needs two losses, no gradient and no moments. Its direction is not stored but drawn again from its place
(``noise``), so a step is known from two numbers (``Record``), and ``replay`` takes it again without any loss, bit for
bit.

Not covered: momentum, sharded parameters (DTensor), and weights narrower than float32 (their updates would round to
nothing) except with ``compat="official"``, which shows just that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from trainers.optim import keyed
from trainers.optim.base import Parameters
from trainers.optim.derivative import Derivatives
from trainers.optim.estimator import Estimator
from trainers.optim.median import median_size
from trainers.optim.official_walk import OfficialWalk
from trainers.optim.record import Record
from trainers.optim.settings import in_range
from trainers.optim.walk import Moved, TiledWalk, Walk

_SEEDS = 10**9


class Qzo(torch.optim.Optimizer):
    """SGD along the derivative that differences of the loss give along random directions."""

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.0,
        scales: bool = False,
        seed: int = 0,
        seeds: Callable[[], int] | None = None,
        **settings: Any,
    ) -> None:
        """Keeps the parameters; the unit and the distance are measured by the first step, or by ``prepare``.

        Args:
            params: Parameters or groups, contiguous, float32 or float64. Their order numbers their noise.
            lr: Learning rate, the same for all groups.
            weight_decay: Share taken off each element per unit of learning rate; not from scales.
            scales: They are scales of quantised weights: those of zero are held there, no other reaches zero. May be a
                key of a group, as may ``weight_decay``.
            seed: Of the noise.
            seeds: With ``compat="official"``: gives the seed of each step; None: derived from ``seed``.
            **settings: Fields of ``Estimator``.

        Raises:
            ValueError: A setting is out of range, a parameter of another kind, or two groups differ in rate.
        """
        self.settings = Estimator(**settings)
        if seeds is not None and self.settings.compat is None:
            raise ValueError("seeds is for compat official alone; the noise of a step follows from seed")
        self.seed, self._seeds = seed & ((1 << 64) - 1), seeds
        self.on_step: Callable[[Record], None] | None = None
        """Called with each record of a step that has been taken."""
        self._made: Walk | None = None
        self._last: list[Record] = []
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "scales": scales})
        self.derivatives = Derivatives(self.settings)
        parameters = self.parameters
        first = self.state[parameters[0]]
        first.update(self.derivatives.state)
        # Distance, unit, and each tensor's own unit; 0 until they are measured.
        first["distance"] = torch.zeros(2 + len(parameters), dtype=torch.float64, device="cpu")

    @property
    def parameters(self) -> list[Tensor]:
        """All parameters, in the order that numbers their noise."""
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def steps(self) -> int:
        """Steps taken, skipped ones included."""
        return self.derivatives.count("step")

    @property
    def skipped(self) -> int:
        """Directions whose loss was not finite: skipped, unless ``nan`` says otherwise."""
        return self.derivatives.count("skipped")

    @property
    def clipped(self) -> int:
        """Directions whose derivative was cut."""
        return self.derivatives.count("clipped")

    @property
    def epsilon(self) -> float:
        """Distance of the two points from the middle, once prepared."""
        return float(self.state[self.parameters[0]]["distance"][0])

    @property
    def unit(self) -> float:
        """Median size of all elements before the first step, once prepared; 0 where nothing needs it."""
        return float(self.state[self.parameters[0]]["distance"][1])

    @property
    def copied_bytes(self) -> int:
        """Size of the copy that a step restores from."""
        exact = self.settings.restore == "copy"
        return sum(p.numel() * p.element_size() for p in self.parameters) if exact else 0

    def measured(self) -> dict[str, float]:
        """What the last step measured, for logs: finite numbers alone, means over its directions."""
        found = {
            "loss_plus": [record.loss_plus for record in self._last],
            "loss_minus": [record.loss_minus for record in self._last],
            "derivative": [record.d_raw for record in self._last],
        }
        finite = {name: values for name, values in found.items() if values and all(map(math.isfinite, values))}
        means = {name: sum(values) / len(values) for name, values in finite.items()}
        counts = {
            "clipped_share": self.clipped / max(1, self.derivatives.count("seen")),
            "skipped": float(self.skipped),
        }
        return means | counts

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group after checking it; see ``torch.optim.Optimizer.add_param_group``.

        Args:
            param_group: As torch takes it.

        Raises:
            ValueError: It cannot be moved, or comes after the first step.
        """
        if self.state:
            raise ValueError("groups are numbered by their order: give them all at once")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        in_range("lr", float(group["lr"]), low=0)
        in_range("weight_decay", group["weight_decay"], low=0)
        if group["scales"] and group["weight_decay"]:
            raise ValueError("weight_decay on scales would shrink the weights that they hold: give 0")
        for parameter in group["params"]:
            if not parameter.is_contiguous():
                raise ValueError("a parameter is not contiguous: give it .contiguous() memory")
            if self.settings.compat is None and parameter.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"updates would be lost in {parameter.dtype}: hold what is tuned in float32")

    @torch.no_grad()
    def prepare(self) -> float:
        """Measures unit and distance, unless that is done.

        Returns:
            The distance, fixed for the run.

        Raises:
            ValueError: Every element is zero, and the distance is to be relative.
        """
        settings, parameters = self.settings, self.parameters
        distance = self.state[parameters[0]]["distance"]
        if not distance[0]:
            if settings.needs_unit:
                distance[1] = median_size(parameters)
            if settings.per == "tensor":
                for number, parameter in enumerate(parameters):
                    if bool(parameter.any()):
                        distance[2 + number] = median_size([parameter])
            distance[0] = settings.eps_rel * float(distance[1]) if settings.eps is None else settings.eps
        return float(distance[0])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> float:  # type: ignore[override]
        """Takes one step: 2 R losses for R directions, or R + 1 one-sided.

        Args:
            closure: Computes the loss of the step's rows, the same at each call. If it raises, the parameters are put
                back (with ``restore="additive"`` up to rounding), and the step has not been taken.

        Returns:
            Mean of the finite losses at the two points; one-sided the loss in the middle; with ``compat="official"``
            the loss ahead. Not a number where none is.

        Raises:
            ValueError: There is no closure, or too many steps in a row had no finite loss.
        """
        if closure is None:
            raise ValueError("a zeroth-order step computes losses: call step(closure)")
        lr, settings, walk = self._lr(), self.settings, self._walk()
        number, seed = self.steps + 1, self._seed()
        ahead, behind = self._losses(walk, number, seed, closure)
        records = []
        self.derivatives.begin()
        for direction, (plus, minus) in enumerate(zip(ahead, behind, strict=True)):
            raw = (plus - minus) / (settings.sides * self.epsilon)
            applied, cut = self.derivatives.judge(raw, self.unit)
            self.derivatives.observe(raw, cut)
            records.append(Record(number, seed, raw, applied, lr, plus, minus, cut, direction))
        self._take(walk, records)
        self._last = records
        if self.on_step is not None:
            for record in records:
                self.on_step(record)
        if settings.nan == "skip" and self.derivatives.count("in_row") >= settings.patience:
            raise ValueError(
                f"{settings.patience} steps in a row had no finite loss: lower learning_rate or the distance (eps_rel)"
            )
        if settings.compat == "official":
            return ahead[0]
        finite = [loss for loss in (behind[:1] if settings.sides == 1 else ahead + behind) if math.isfinite(loss)]
        return sum(finite) / len(finite) if finite else math.nan

    @torch.no_grad()
    def replay(self, records: Iterable[Record]) -> int:
        """Takes steps again from their records: parameters and state are then, bit for bit, as those steps left them.

        ``on_step`` is not called.

        Args:
            records: Of whole steps, in order, beginning with the one after the last that was taken.

        Returns:
            Steps taken by it.

        Raises:
            ValueError: A step or one of its directions is missing or stands elsewhere; what came before it is taken.
        """
        taken, walk = 0, self._walk()
        for number, group in groupby(records, key=lambda record: record.step):
            step = list(group)
            if number != self.steps + 1:
                raise ValueError(f"the record of step {number} comes where that of step {self.steps + 1} belongs")
            if [record.direction for record in step] != list(range(self.settings.samples)):
                raise ValueError(
                    f"step {number} needs a record for each of {self.settings.samples} directions, in order"
                )
            if self.settings.restore == "additive":
                # The way there and back leaves its rounding behind, whatever the losses were.
                self._losses(walk, number, step[0].seed, lambda: 0.0)
            self.derivatives.begin()
            for record in step:
                self.derivatives.observe(record.d_raw, record.clipped)
            self._take(walk, step)
            taken += 1
        return taken

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` gave, bit for bit.

        Args:
            state_dict: Of an optimizer with the same groups and settings.

        Raises:
            ValueError: It is of another one; the optimizer is then as it was.
        """
        (saved,) = state_dict["state"].values() if len(state_dict["state"]) == 1 else ({},)
        own = self.state[self.parameters[0]]
        same = saved.keys() == own.keys() and all(saved[name].shape == value.shape for name, value in own.items())
        if not same:
            raise ValueError("the state is not that of a zeroth-order optimizer with these parameters and this window")
        super().load_state_dict({**state_dict, "state": {}})
        for name, value in own.items():
            value.copy_(saved[name])
        self.state[self.parameters[0]] = own
        self._made = None

    def _losses(
        self, walk: Walk, number: int, seed: int, closure: Callable[[], Any]
    ) -> tuple[list[float], list[float]]:
        """Losses ahead of and behind the point (or in the middle) for each direction; the point is then as before."""
        ahead, behind = [], []
        walk.save()
        try:
            middle = float(closure()) if self.settings.sides == 1 else math.nan
            for direction in range(self.settings.samples):
                walk.move(seed, number, direction, 1)
                ahead.append(float(closure()))
                if self.settings.sides == 2:
                    walk.move(seed, number, direction, -1)
                    behind.append(float(closure()))
        finally:
            walk.restore()
        return ahead, behind or [middle] * self.settings.samples

    def _lr(self) -> float:
        rates = {float(group["lr"]) for group in self.param_groups}
        if len(rates) != 1:
            raise ValueError(f"all groups step along one derivative: give them one learning rate, not {sorted(rates)}")
        return rates.pop()

    def _seed(self) -> int:
        if self.settings.compat is None:
            return self.seed
        return self._seeds() if self._seeds is not None else keyed.key(self.seed, self.steps + 1) % _SEEDS

    def _walk(self) -> Walk:
        if self._made is None:
            epsilon = self.prepare()
            moved = [
                Moved(p.detach(), group["weight_decay"], group["scales"])
                for group in self.param_groups
                for p in group["params"]
            ]
            if self.settings.compat == "official":
                self._made = OfficialWalk(moved, self.settings, epsilon)
            else:
                units = self.state[self.parameters[0]]["distance"][2:].tolist()
                self._made = TiledWalk(moved, self.settings, epsilon, self.unit, units)
        return self._made

    def _take(self, walk: Walk, records: list[Record]) -> None:
        first = records[0]
        if self.settings.nan == "official" or not all(record.skipped for record in records):
            walk.update(first.seed, first.step, first.lr, [record.d_applied for record in records])
        self.derivatives.end()
