"""Variants whose state is counted against what the docs say, on matrices without data; they are not timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.optimizers import formulas
from trainers.optim import DctAdamW, Frugal


def predicted(m: int, n: int, rank: int) -> dict[str, tuple[Callable[[nn.Parameter], torch.optim.Optimizer], float]]:
    """What makes each variant over an (m, n) matrix, and its bytes, float32 moments: by name.

    ``k`` columns of n have state; error feedback adds what it holds for every weight; a learned basis is an n x n
    matrix of the shorter side, which a type of layer has once.
    """
    k, short, long = round(0.25 * n), min(m, n), max(m, n)
    compact = 8 * m * k

    def frugal(**settings: Any) -> Callable[[nn.Parameter], torch.optim.Optimizer]:
        return lambda p: Frugal([p], density=0.25, **settings)

    def dct(**settings: Any) -> Callable[[nn.Parameter], torch.optim.Optimizer]:
        return lambda p: DctAdamW([p], rank=rank, **settings)

    low = 8 * long * min(rank, short) + 4 * min(rank, short)
    scales = 8 * long * -(-short // 256)
    return {
        "frugal-columns select top": (frugal(select="top"), compact + 4 * n + 4 * k),
        "frugal-columns state carry": (frugal(state="carry"), compact + 4 * k),
        "frugal-columns moments int8": (frugal(moments="int8"), (2 + 8 / 256) * m * k),
        "frugal-randk": (frugal(split="randk"), 8 * round(0.25 * m * n)),
        "frugal-svd": (frugal(split="svd"), formulas.galore(m, n, 0.25)),
        "dct-adamw ages": (dct(ages=True), low + 4 * min(rank, short)),
        "dct-adamw feedback full": (dct(feedback="full"), low + 4 * m * n),
        "dct-adamw feedback 8bit": (dct(feedback="8bit"), low + m * n + scales),
        "dct-adamw feedback 4bit": (dct(feedback="4bit"), low + long * -(-short // 2) + scales),
        "dct-adamw basis learned": (dct(basis="learned", learn_steps=1), low + 4 * short**2),
    }


def state_rows(m: int, n: int, rank: int) -> list[dict[str, Any]]:
    """A row for each variant, after two steps."""
    rows = []
    for name, (make, formula) in predicted(m, n, rank).items():
        weight = nn.Parameter(torch.empty(m, n, device="meta"))
        optimizer = make(weight)
        for _ in range(2):
            weight.grad = torch.empty_like(weight)
            optimizer.step()
        values = [v for v in optimizer.state[weight].values() if isinstance(v, torch.Tensor)]
        held = sum(value.numel() * value.element_size() for value in values)
        sizes = {"state_bytes": held, "formula_bytes": formula, "matrix_bytes": 4 * m * n}
        rows.append({"shape": f"{m}x{n}", "arm": name, "counted_without_data": True, **sizes})
    return rows
