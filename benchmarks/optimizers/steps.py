"""What is timed: optimizers over one matrix, and the forward and backward pass of the layer that it belongs to.

Legend: m rows (outputs), n columns (inputs), r rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.optimizers import formulas
from trainers.optim import DctAdamW, Frugal, GaLore, Trion

NEVER = 10**9
DECAY = 0.1
TOKENS = 4096
"""Of the layer's batch."""

Make = Callable[[nn.Parameter], torch.optim.Optimizer]


@dataclass(frozen=True)
class Arm:
    """An optimizer over one matrix."""

    name: str
    make: Make
    bytes: float | None
    """Its state by the formula; None where it keeps some of it out of sight."""
    heavy: bool = False
    """Whether it multiplies matrices: timed beside the forward and backward pass, with few repetitions."""
    once: bool = False
    """Timed once, alone."""


def optimizers(m: int, n: int, rank: int) -> list[Arm]:
    """All arms for an (m, n) matrix. Refreshes apart, except where a method refreshes at every step by design."""
    quarter = min(m, n) // 4

    def frugal(gap: int = NEVER, density: float = 0.25, split: str = "columns") -> Make:
        options = {"split": split, "density": density, "update_gap": gap, "weight_decay": DECAY}
        return lambda p: Frugal([p], lr=1e-6, **options)  # type: ignore[arg-type]

    def dct(r: int, gap: int) -> Make:
        return lambda p: DctAdamW([p], lr=1e-6, rank=r, update_gap=gap, weight_decay=DECAY)

    def trion(r: int) -> Make:
        return lambda p: Trion([p], lr=1e-6, rank=r, weight_decay=DECAY)

    def adamw(**options: bool) -> Make:
        return lambda p: torch.optim.AdamW([p], lr=1e-6, weight_decay=DECAY, **options)  # type: ignore[arg-type]

    by_columns, by_rows = formulas.frugal(m, n, 0.25, n), formulas.frugal(m, n, 0.25, m)
    return [
        Arm("adamw-fused", adamw(fused=True), formulas.adamw(m, n)),
        Arm("adamw-foreach", adamw(foreach=True), formulas.adamw(m, n)),
        Arm("frugal-rows", frugal(split="rows"), by_rows),
        Arm("frugal-column-blocks", frugal(split="column_blocks"), by_columns),
        Arm("frugal-columns", frugal(), by_columns),
        Arm("frugal-signsgd", frugal(density=0.0), 0),
        Arm("frugal-rows refresh", frugal(1, split="rows"), by_rows),
        Arm("frugal-column-blocks refresh", frugal(1, split="column_blocks"), by_columns),
        Arm("frugal-columns refresh", frugal(1), by_columns),
        Arm("galore", _galore, formulas.galore(m, n, 0.25), heavy=True),
        Arm("dct-adamw", dct(rank, 1), formulas.dct_adamw(m, n, rank), heavy=True),
        Arm("dct-adamw n/4 refresh", dct(quarter, 1), formulas.dct_adamw(m, n, quarter), heavy=True),
        Arm("dct-adamw n/4 between", dct(quarter, NEVER), formulas.dct_adamw(m, n, quarter), heavy=True),
        Arm("trion", trion(rank), formulas.trion(m, n, rank), heavy=True),
        Arm("trion n/4", trion(quarter), formulas.trion(m, n, quarter), heavy=True),
        Arm("muon", _muon, formulas.muon(m, n), heavy=True, once=True),
    ]


def _galore(parameter: nn.Parameter) -> torch.optim.Optimizer:
    return GaLore([parameter], lr=1e-6, density=0.25, update_gap=NEVER, weight_decay=DECAY)


def _muon(parameter: nn.Parameter) -> torch.optim.Optimizer:
    return torch.optim.Muon([parameter], lr=1e-6, weight_decay=DECAY)


def matrix(m: int, n: int) -> nn.Parameter:
    """A weight with a gradient, both drawn from a fixed seed."""
    draw = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(m, n, generator=draw) / n**0.5)
    weight.grad = torch.randn(m, n, generator=draw)
    return weight


def stepper(optimizer: torch.optim.Optimizer) -> Callable[[], float]:
    """A call that takes one step and returns its seconds."""

    def step() -> float:
        began = time.perf_counter()
        optimizer.step()
        return time.perf_counter() - began

    return step


def layer(weight: Tensor, tokens: int) -> Callable[[], float]:
    """A call that passes forward and backward through a linear layer (gradients of weight and input): its seconds."""
    m, n = weight.shape
    held = weight.detach().clone().requires_grad_()
    inputs = torch.randn(tokens, n, requires_grad=True)
    back = torch.randn(tokens, m)

    def both() -> float:
        held.grad = inputs.grad = None
        began = time.perf_counter()
        F.linear(inputs, held).backward(back)  # type: ignore[no-untyped-call]
        return time.perf_counter() - began

    return both


@contextmanager
def no_svd() -> Iterator[None]:
    """Within, an SVD costs nothing and is wrong: for timing what GaLore does between refreshes of large matrices."""

    def svd(a: Tensor, full_matrices: bool = True, **_: object) -> tuple[Tensor, Tensor, Tensor]:
        assert not full_matrices
        k = min(a.shape)
        noise = torch.Generator(a.device).manual_seed(0)
        u, vh = (torch.randn(shape, generator=noise, dtype=a.dtype) for shape in ((a.shape[0], k), (k, a.shape[1])))
        return u / a.shape[0] ** 0.5, torch.ones(k, dtype=a.dtype), vh / a.shape[1] ** 0.5

    with mock.patch("torch.linalg.svd", svd):
        yield


def svd_seconds(m: int, n: int) -> float:
    """One SVD of an (m, n) matrix of noise: what a refresh of GaLore mostly is."""
    noise = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    began = time.perf_counter()
    torch.linalg.svd(noise, full_matrices=False)
    return time.perf_counter() - began
