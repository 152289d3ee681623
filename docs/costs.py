"""What each method's optimizer keeps, counted by letting it take a step on matrices without data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

DENSITY, RANK = 0.25, 256


@dataclass(frozen=True, slots=True)
class Cost:
    """One method with its settings."""

    method: str
    formula: str
    """Bytes for an (m, n) matrix with m >= n, in words."""
    predict: Callable[[int, int], float]
    """The same, as a function of m and n."""
    make: Callable[[list[Any]], Any]
    """Parameters to optimizer."""


@dataclass(frozen=True, slots=True)
class Size:
    """The matrices of one block, and how many blocks there are."""

    name: str
    width: int
    keys: int
    mlp: int
    blocks: int

    def shapes(self) -> list[tuple[int, int]]:
        """Query, key, value, output, gate, up and down projection, as (out, in)."""
        width, keys, mlp = self.width, self.keys, self.mlp
        return [(width, width), (keys, width), (keys, width), (width, width), (mlp, width), (mlp, width), (width, mlp)]


SIZES = (
    Size("135M", 576, 192, 1536, 30),
    Size("1B", 2048, 2048, 5461, 24),
    Size("7B", 4096, 4096, 11008, 32),
)


def costs() -> Iterator[Cost]:
    """Every method that trains all weights, at the settings that the page compares."""
    import torch

    from trainers.optim import DctAdamW, Frugal, GaLore, Trion

    def low(n: int) -> int:
        return min(RANK, n)

    yield Cost("`full` (AdamW)", "8 mn", lambda m, n: 8 * m * n, lambda ps: torch.optim.AdamW(ps, foreach=False))
    yield Cost("`muon`", "4 mn", lambda m, n: 4 * m * n, torch.optim.Muon)
    yield Cost("`trion`, rank 256", "4 mn", lambda m, n: 4 * m * n, lambda ps: Trion(ps, rank=RANK))
    yield Cost(
        "`galore`, density .25",
        "8 mr + 4 nr, r = n / 4",
        lambda m, n: (8 * m + 4 * n) * round(n / 4),
        lambda ps: GaLore(ps, density=DENSITY),
    )
    yield Cost(
        "`frugal`, split svd, density .25",
        "8 mr + 4 nr, r = n / 4",
        lambda m, n: (8 * m + 4 * n) * round(n / 4),
        lambda ps: Frugal(ps, density=DENSITY, split="svd"),
    )
    for split in ("columns", "rows", "randk"):
        yield Cost(
            f"`frugal`, split {split}, density .25",
            "8 mn / 4",
            lambda m, n: 2 * m * n,
            lambda ps, split=split: Frugal(ps, density=DENSITY, split=split),
        )
    yield Cost(
        "`frugal`, columns, density .25, moments int8",
        "(2 + 8 / 256) mn / 4",
        lambda m, n: (2 + 8 / 256) * m * n / 4,
        lambda ps: Frugal(ps, density=DENSITY, moments="int8"),
    )
    yield Cost(
        "`dct_adamw`, rank 256",
        "8 mr + 4 r",
        lambda m, n: (8 * m + 4) * low(n),
        lambda ps: DctAdamW(ps, rank=RANK),
    )
    yield Cost("`frugal`, density 0 (signSGD)", "0", lambda m, n: 0 * m * n, lambda ps: Frugal(ps, density=0.0))


def measured(cost: Cost, size: Size) -> int:
    """Bytes of optimizer state for all blocks of a model: one block is stepped, on tensors without data."""
    import torch

    parameters = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in size.shapes()]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer = cost.make(parameters)
    optimizer.step()
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return size.blocks * sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def predicted(cost: Cost, size: Size) -> float:
    """The same by the formula."""
    return size.blocks * sum(cost.predict(max(shape), min(shape)) for shape in size.shapes())


def table() -> list[tuple[str, ...]]:
    """Rows of the page: method, formula, measured size for each model."""
    rows = []
    for cost in costs():
        sizes = [measured(cost, size) for size in SIZES]
        rows.append((cost.method, cost.formula, *(_shown(size) for size in sizes)))
    return rows


def _shown(size: int) -> str:
    if size < 2**20:
        return "0"
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
