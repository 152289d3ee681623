"""Trion: Muon's orthogonalised momentum on the coordinates that matter, in a fixed orthonormal basis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trainers.method import Attached, Method, MethodConfig, TrainContext
from trainers.optim.settings import basis_warnings, check_basis, in_range

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class TrionConfig(MethodConfig):
    """Settings of ``trion``."""

    rank: int = 256
    """Basis vectors kept for each matrix, at most its shorter side: more is closer to Muon and slower."""
    density: float | None = None
    """Share of the basis vectors kept, in (0, 1], instead of a rank that is the same for all layers."""
    basis: Literal["dct", "random", "hadamard", "identity", "learned"] = "dct"
    """Where to look for them: cosines, a random orthogonal basis, Hadamard, the columns as they are, or learned."""
    side: Literal["std", "reverse", "left", "right"] = "std"
    """Which side of a matrix is transformed: the shorter (``std``), the longer, its columns, or its rows."""
    momentum: float = 0.95
    """Share of the chosen part of the momentum that stays, in [0, 1); what is not chosen stays whole."""
    norm: Literal[1, 2] = 1
    """Score vectors by the sum of absolute coordinates (1, as published) or of squares (2, keeps the most energy)."""
    coefficients: Literal["constant", "scheduled"] = "constant"
    """Of Newton-Schulz: Muon's, or the published kernel's, which end nearer to orthogonal."""
    scale: Literal["kj", "none", "kimi", "dion"] = "kj"
    """Factor for an (R, C) matrix: kj sqrt(max(1, R / C)), none 1, kimi 0.2 sqrt(max(R, C)), dion sqrt(R / C)."""
    weight_decay: float = 0.0
    """Share of each weight taken off per unit of learning rate (decoupled); biases and norms are spared."""
    adam_ratio: float = 0.015
    """Learning rate of embeddings, head, norms and biases, which AdamW trains, over that of the matrices."""
    adam_beta1: float = 0.9
    """AdamW's decay of the mean of the gradient, in [0, 1)."""
    adam_beta2: float = 0.95
    """AdamW's decay of the mean of the squared gradient, in [0, 1)."""
    adam_epsilon: float = 1e-10
    """Added to AdamW's root of the mean square; larger is calmer."""
    learn_steps: int = 10
    """Steps whose gradients a learned basis is made of."""
    learn_gap: int = 200
    """Steps between two learned bases, at least ``learn_steps``."""
    targets: tuple[str, ...] = ()
    """Parts of names of the layers to project; none means the linear layers of attention and MLP."""
    compat: Literal["official"] | None = None
    """``official`` takes the published code's pair of bases instead of one; for comparisons."""

    def __post_init__(self) -> None:
        check_basis(self)
        for name in ("momentum", "adam_beta1", "adam_beta2"):
            in_range(name, getattr(self, name), low=0, high=1, open_high=True)
        for name in ("adam_ratio", "adam_epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")

    def warnings(self) -> list[str]:
        """Settings that have no effect as they are combined, one sentence each."""
        return basis_warnings(self)


def attach(model: PreTrainedModel, config: TrionConfig, context: TrainContext) -> Attached:
    """Makes every weight trainable: matrices of blocks under Trion, the rest under AdamW with a rate of its own.

    Args:
        model: The base.
        config: What is kept, and how.
        context: The run around it.

    Returns:
        The model and the optimizer.

    Raises:
        ValueError: No layer is named by ``targets``.
    """
    from trainers.optim import Trion
    from trainers.optim.parameters import PROJECTED, split_parameters

    model.requires_grad_(True)
    optimizer = Trion(
        split_parameters(model, project=config.targets or PROJECTED),
        lr=context.learning_rate,
        rank=config.rank,
        density=config.density,
        basis=config.basis,
        side=config.side,
        momentum=config.momentum,
        norm=config.norm,
        coefficients=config.coefficients,
        scale=config.scale,
        weight_decay=config.weight_decay,
        adam_lr=context.learning_rate * config.adam_ratio,
        adam_betas=(config.adam_beta1, config.adam_beta2),
        adam_eps=config.adam_epsilon,
        learn_steps=config.learn_steps,
        learn_gap=config.learn_gap,
        seed=context.seed,
        compat=config.compat,
    )
    return Attached(model, optimizer)


METHOD = Method(
    name="trion",
    summary="Every weight, with orthogonalised momentum in the r strongest cosine coordinates of each matrix.",
    paper="2505.17967",
    config=TrionConfig,
    attach=attach,
    makes="weights",
    learning_rate=2e-3,
)
