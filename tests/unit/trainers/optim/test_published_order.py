"""``compat="official"`` is the published order of operations, to the last bit in float32.

The step is told here once more, in the published order and plain torch: update of the part with state, brought to full
size, residual, sign, sum, and one addition to the decayed weights.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.trainers.optim.helpers import problem, run
from trainers.optim import Frugal, keyed
from trainers.optim.clock import SUBSET

LR, DECAY, SCALE, FREE, GAP = 3e-3, 0.1, 0.7, 0.3, 4


def _adam(g: Tensor, m: Tensor, v: Tensor, t: int, lr: float) -> Tensor:
    m.mul_(0.9).add_(g, alpha=1 - 0.9)
    v.mul_(0.999).addcmul_(g, g, value=1 - 0.999)
    root = (v.sqrt() / math.sqrt(1 - 0.999**t)).add_(1e-8)
    return m.div(root).mul_(-lr / (1 - 0.9**t))


def _published(w: Tensor, gradients: list[Tensor], down: Any, up: Any, size: Any, *, reset: bool) -> Tensor:
    p = w.clone()
    m = v = torch.zeros(0)
    age = 0
    for step, g in enumerate(gradients):
        refresh = step // GAP + 1
        if step == 0 or (step % GAP == 0 and reset):
            m, v, age = torch.zeros(size), torch.zeros(size), 0
        age += 1
        p.mul_(1 - LR * DECAY)
        low = down(g, refresh)
        update = up(_adam(low, m, v, age, LR * SCALE), refresh)
        update += -LR * SCALE * FREE * torch.sign(g - up(low, refresh))
        p.add_(update)
    return p


@pytest.mark.parametrize("shape", [(12, 20), (33, 17), (4, 49)], ids=str)
@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("split", ["columns", "rows", "randk"])
def test_coordinates(split: str, reset: bool, shape: tuple[int, int]) -> None:
    w, arrays = problem(shape, 13)
    total = {"columns": shape[1], "rows": shape[0], "randk": shape[0] * shape[1]}[split]
    k = int(total * 0.3)

    def index(refresh: int) -> Tensor:
        return keyed.subset(total, k, keyed.key(0, SUBSET, 0, 0, refresh))

    def down(x: Tensor, refresh: int) -> Tensor:
        i = index(refresh)
        return {"columns": lambda: x[:, i], "rows": lambda: x[i], "randk": lambda: x.reshape(-1)[i]}[split]().clone()

    def up(x: Tensor, refresh: int) -> Tensor:
        i, whole = index(refresh), torch.zeros(shape)
        if split == "columns":
            whole[:, i] = x
        elif split == "rows":
            whole[i] = x
        else:
            whole.view(-1)[i] = x
        return whole

    size = {"columns": (shape[0], k), "rows": (k, shape[1]), "randk": (k,)}[split]
    gradients = [torch.tensor(g, dtype=torch.float32) for g in arrays]
    wanted = _published(torch.tensor(w, dtype=torch.float32), gradients, down, up, size, reset=reset)
    settings: dict[str, Any] = {"split": split, "density": 0.3, "state": "reset" if reset else "keep"}
    (p,), _ = run(_maker(settings), [w], [[g] for g in arrays], dtype=torch.float32)
    assert torch.equal(p, wanted)


@pytest.mark.parametrize("shape", [(12, 20), (33, 17)], ids=str)
def test_singular_vectors(shape: tuple[int, int]) -> None:
    w, arrays = problem(shape, 13)
    gradients = [torch.tensor(g, dtype=torch.float32) for g in arrays]
    tall = shape[0] >= shape[1]
    rank = round(min(shape) * 0.3)

    def basis(refresh: int) -> Tensor:
        left, _, right = torch.linalg.svd(gradients[(refresh - 1) * GAP], full_matrices=False)
        vectors = right[:rank] if tall else left[:, :rank]
        dim = 1 if tall else 0
        signs = vectors.gather(dim, vectors.abs().argmax(dim, keepdim=True)).sign()
        return (vectors * signs).contiguous()

    def down(x: Tensor, refresh: int) -> Tensor:
        return x @ basis(refresh).T if tall else basis(refresh).T @ x

    def up(x: Tensor, refresh: int) -> Tensor:
        return x @ basis(refresh) if tall else basis(refresh) @ x

    size = (shape[0], rank) if tall else (rank, shape[1])
    wanted = _published(torch.tensor(w, dtype=torch.float32), gradients, down, up, size, reset=True)
    (p,), _ = run(_maker({"split": "svd", "density": 0.3}), [w], [[g] for g in arrays], dtype=torch.float32)
    assert torch.equal(p, wanted)


def _maker(settings: dict[str, Any]) -> Any:
    common = {"lr": LR, "weight_decay": DECAY, "lr_scale": SCALE, "free_lr_scale": FREE, "update_gap": GAP}
    return lambda ps: Frugal(ps, **common, **settings, compat="official")
