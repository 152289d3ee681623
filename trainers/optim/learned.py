"""One orthonormal basis for all layers of a type, learned from their gradients; each layer keeps r vectors of its own.

The layers of a type (queries, keys and values; gate and up projections; any other by its own name) see similar inputs,
so their gradients share directions. For ``learn_steps`` steps the Gram matrices G^T G, each divided by its trace, are
summed over the layers; the eigenvectors of the sum, highest eigenvalue first, are the basis until the next time,
``learn_gap`` steps later. Before the first window is full, the gradients of the first step alone give the basis.

A basis (n, n) is state, held once for each type beside the state of its first parameter, and so is the sum while a
window is open. A change of basis turns the moments of each layer: with R = V_old[kept] V_new^T,

    kept' = the r vectors with the highest sum_i (sum of v_i over rows) R_ij^2
    m' = m R[:, kept'],   v' = v R[:, kept']^2

(v as if the coordinates were uncorrelated: it stays positive), and a column's age is the same mean of the old ages.

Costs an n^2 product of each gradient in the steps of a window, and one symmetric eigenproblem in float64 for each type
at its end: seconds at n = 1,024, minutes at 4,096 on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_FAMILIES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "query", "key", "value"), "qkv"),
    **dict.fromkeys(("gate_proj", "up_proj"), "up"),
}


def family(name: str) -> str:
    """The type of a layer.

    Args:
        name: Of its weight, such as ``model.layers.3.mlp.up_proj.weight``.

    Returns:
        ``qkv`` for queries, keys and values, ``up`` for gate and up projections, else the module's own name.
    """
    parts = name.removesuffix(".weight").split(".")
    return _FAMILIES.get(parts[-1], parts[-1])


def plan(step: int, window: int, gap: int) -> tuple[bool, bool, bool]:
    """What a type does in a step.

    Args:
        step: Of the type, from 1.
        window: Steps whose gradients are summed.
        gap: Steps between two bases, at least ``window``.

    Returns:
        Whether to add the gradients to the sum, to take a new basis from it, and then to close the window.
    """
    if step <= window:
        return True, step in (1, window), step == window
    since = (step - window) % gap
    return since == 0 or since > gap - window, since == 0, since == 0


def gram(gradient: Tensor) -> Tensor:
    """G^T G, to be divided by its trace once it is summed over processes.

    Args:
        gradient: (rows, n).

    Returns:
        (n, n).
    """
    return gradient.mT @ gradient


def eigenbasis(total: Tensor) -> Tensor:
    """Eigenvectors of a sum of Gram matrices.

    Args:
        total: (n, n), symmetric.

    Returns:
        (n, n) in its dtype, one a row, highest eigenvalue first, each with its largest entry positive.
    """
    vectors = torch.linalg.eigh(total.double()).eigenvectors.mT.flip(0)
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    signed: Tensor = vectors * torch.where(largest < 0, -1.0, 1.0)
    return signed.to(total.dtype).contiguous()


def turn(own: dict[str, Tensor], energy: Tensor, old: Tensor, new: Tensor) -> None:
    """Takes the state of a matrix from one basis to another, in place.

    Args:
        own: ``index`` (r,), ``exp_avg`` and ``exp_avg_sq`` (rows, r), and ``age`` (r,) if there are ages.
        energy: (r,): sum of ``exp_avg_sq`` over all rows, of all processes.
        old: (n, n), basis vectors as rows.
        new: The same, from now on.
    """
    overlap = old.index_select(0, own["index"]) @ new.mT
    weight = overlap.square()
    kept = torch.sort(energy @ weight, descending=True, stable=True).indices[: energy.numel()].sort().values
    across, share = overlap.index_select(1, kept), weight.index_select(1, kept)
    own["exp_avg"].copy_(own["exp_avg"] @ across)
    own["exp_avg_sq"].copy_(own["exp_avg_sq"] @ share)
    own["index"].copy_(kept)
    if "age" in own:
        own["age"].copy_((own["age"].to(share.dtype) @ share).round_())


def names_of(groups: list[dict[str, Any]]) -> dict[Tensor, str]:
    """Names of parameters, where their groups give them.

    Args:
        groups: With ``names``, or ``param_names`` as torch makes it of named parameters.

    Returns:
        Parameter to name; unnamed ones are missing.
    """
    return {
        parameter: name
        for group in groups
        for parameter, name in zip(group["params"], group.get("names") or group.get("param_names") or [], strict=False)
    }
