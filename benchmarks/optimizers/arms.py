"""The optimizers of the pre-training study, each with the learning rate that its authors publish.

Density .25 everywhere it applies; methods with a rank have a quarter of the width, which is the same share. Embeddings
(tied to the head), norms and biases get AdamW in every arm. No weight decay. Subspaces are redrawn every ``size.gap``
steps, and at every step by DCT-AdamW and Trion, as published.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.optimizers.llama import Size
from benchmarks.optimizers.plan import Subject
from benchmarks.optimizers.training import Optimizers
from trainers.optim import DctAdamW, Frugal, GaLore, Trion, split_parameters

ADAM_SHARE = 0.05
"""Muon's and Trion's rate for what AdamW trains, as a share of theirs: AdamW's 1e-3 at their .02, all published."""

Build = Callable[[nn.Module, float, int, Size], Optimizers]


@dataclass(frozen=True)
class Arm(Subject):
    """A subject of the study, and how its optimizer is made from (model, rate, seed, size)."""

    build: Build = lambda *_: ()
    source: str = ""
    """Where ``centre`` is from."""


def adamw(model: nn.Module, rate: float, seed: int, size: Size) -> Optimizers:
    """torch's, on everything."""
    return [torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)]


def muon(model: nn.Module, rate: float, seed: int, size: Size) -> Optimizers:
    """torch's, with the scale of its paper, on the layers' matrices; AdamW on the rest."""
    groups = split_parameters(model)
    matrices = [p for group in groups if group["role"] == "projected" for p in group["params"]]
    others = [p for group in groups if group["role"] == "full" for p in group["params"]]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.0, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=ADAM_SHARE * rate, weight_decay=0.0, fused=True),
    ]


def galore(model: nn.Module, rate: float, seed: int, size: Size) -> Optimizers:
    """GaLore with an SVD each refresh and its published scale of .25."""
    return [GaLore(split_parameters(model), lr=rate, density=0.25, update_gap=size.gap, scale=0.25)]


def trion(model: nn.Module, rate: float, seed: int, size: Size) -> Optimizers:
    """Trion; AdamW on the rest."""
    return [Trion(split_parameters(model), lr=rate, rank=size.rank, adam_lr=ADAM_SHARE * rate)]


def frugal(**options: object) -> Build:
    """FRUGAL as published for pre-training but for its split, which is by columns, and what ``options`` change."""

    def build(model: nn.Module, rate: float, seed: int, size: Size) -> Optimizers:
        settings = {"density": 0.25, "split": "columns", "update_gap": size.gap, "seed": seed, **options}
        return [Frugal(split_parameters(model), lr=rate, **settings)]  # type: ignore[arg-type]

    return build


def dct_adamw(*, share: float = 1.0, **options: object) -> Build:
    """DCT-AdamW, its state rotated into each step's subspace; ``share`` of the common rank."""

    def build(model: nn.Module, rate: float, seed: int, size: Size) -> Optimizers:
        settings = {"rank": round(share * size.rank), "weight_decay": 0.0, "seed": seed, **options}
        return [DctAdamW(split_parameters(model), lr=rate, **settings)]  # type: ignore[arg-type]

    return build


FRUGAL, ADAM, MUON = "FRUGAL's pre-training scripts", "AdamW's, none is published", "its reference code"

ARMS = [
    Arm("adamw", 1e-3, claimed=True, build=adamw, source=FRUGAL),
    Arm("frugal", 1e-3, claimed=True, build=frugal(), source=FRUGAL),
    Arm("frugal-density-0", 1e-3, claimed=True, build=frugal(density=0.0), source=FRUGAL),
    Arm("galore", 1e-2, claimed=True, build=galore, source="GaLore's and FRUGAL's scripts"),
    Arm("dct-adamw", 1e-3, claimed=True, build=dct_adamw(), source=ADAM),
    Arm("dct-adamw-random-basis", 1e-3, claimed=True, build=dct_adamw(basis="random"), source=ADAM),
    # Variants that go beyond the papers. Those with 8-bit moments or a basis of their own are given what density or
    # rank comes out at the parent's bytes.
    Arm("frugal-selected", 1e-3, parent="frugal", build=frugal(select="top"), source=FRUGAL),
    Arm("frugal-selected-carried", 1e-3, parent="frugal", build=frugal(select="top", state="carry"), source=FRUGAL),
    Arm("frugal-int8", 1e-3, parent="frugal", build=frugal(moments="int8", density=0.98), source=FRUGAL),
    Arm("dct-adamw-learned-basis", 1e-3, parent="dct-adamw", build=dct_adamw(basis="learned", share=0.66), source=ADAM),
    Arm("dct-adamw-ages", 1e-3, parent="dct-adamw", build=dct_adamw(ages=True, hysteresis=0.1), source=ADAM),
    # For the table and the plot.
    Arm("block", 1e-3, build=frugal(split="block", order="descending", free="none"), source=FRUGAL),
    Arm("trion", 2e-2, build=trion, source=MUON),
    Arm("muon", 2e-2, build=muon, source=MUON),
    Arm("dct-adamw-hadamard-basis", 1e-3, build=dct_adamw(basis="hadamard"), source=ADAM),
    Arm("dct-adamw-identity-basis", 1e-3, build=dct_adamw(basis="identity"), source=ADAM),
]


def arm(name: str) -> Arm:
    """The arm of that name."""
    return next(each for each in ARMS if each.name == name)
