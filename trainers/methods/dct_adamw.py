"""DCT-AdamW: AdamW on the coordinates of each gradient that matter, in a fixed orthonormal basis (no SVD)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trainers.method import Attached, Method, MethodConfig, TrainContext
from trainers.optim.settings import basis_warnings, check_basis, in_range, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class DctAdamWConfig(MethodConfig):
    """Settings of ``dct_adamw``."""

    rank: int = 256
    """Basis vectors kept for each matrix, at most its shorter side: more is closer to AdamW and takes more memory."""
    density: float | None = None
    """Share of the basis vectors kept, in (0, 1], instead of a rank that is the same for all layers."""
    basis: Literal["dct", "random", "hadamard", "identity", "learned"] = "dct"
    """Where to look for them: cosines, a random orthogonal basis, Hadamard, the columns as they are, or learned."""
    side: Literal["std", "reverse", "left", "right"] = "std"
    """Which side of a matrix is transformed: the shorter (``std``), the longer, its columns, or its rows."""
    update_gap: int = 1
    """Steps between two choices: higher is faster and follows the gradient less closely."""
    norm: Literal[1, 2] = 1
    """Score vectors by the sum of absolute coordinates (1, as published) or of squares (2, keeps the most energy)."""
    feedback: Literal["none", "full", "8bit", "4bit"] = "none"
    """Add what an update left out to the next gradient, held in full precision or 8 or 4 bits for each weight."""
    ages: bool = False
    """Correct the bias of each kept vector's moments by its own age, not by that of the layer."""
    hysteresis: float = 0.0
    """Replace a kept vector only by one that scores this share higher: higher keeps moments longer."""
    learn_steps: int = 10
    """Steps whose gradients a learned basis is made of."""
    learn_gap: int = 200
    """Steps between two learned bases, at least ``learn_steps``."""
    beta1: float = 0.9
    """Decay of the mean of the gradient, in [0, 1)."""
    beta2: float = 0.999
    """Decay of the mean of the squared gradient, in [0, 1)."""
    epsilon: float = 1e-8
    """Added to the root of the mean square; larger is calmer."""
    weight_decay: float = 0.0
    """Share of each weight taken off per unit of learning rate (decoupled); biases and norms are spared."""
    targets: tuple[str, ...] = ()
    """Parts of names of the layers to project; none means the linear layers of attention and MLP."""
    compat: Literal["official"] | None = None
    """``official`` takes the published code's bases, sides and ties instead of ours; for comparisons."""

    def __post_init__(self) -> None:
        check_basis(self)
        whole("update_gap", self.update_gap)
        in_range("hysteresis", self.hysteresis, low=0)
        for name in ("beta1", "beta2"):
            in_range(name, getattr(self, name), low=0, high=1, open_high=True)
        if not self.epsilon > 0:
            raise ValueError(f"epsilon must be positive, not {self.epsilon}")

    def warnings(self) -> list[str]:
        """Settings that have no effect as they are combined, one sentence each."""
        found = basis_warnings(self)
        if self.density == 1 and (self.update_gap, self.hysteresis, self.ages) != (1, 0.0, False):
            found.append("update_gap, hysteresis and ages have no effect with density 1: every vector is kept")
        return found


def attach(model: PreTrainedModel, config: DctAdamWConfig, context: TrainContext) -> Attached:
    """Makes every weight trainable: matrices of blocks in their subspaces, the rest under plain AdamW.

    Args:
        model: The base.
        config: What is kept, and how.
        context: The run around it.

    Returns:
        The model and the optimizer.

    Raises:
        ValueError: No layer is named by ``targets``.
    """
    from trainers.optim import DctAdamW
    from trainers.optim.parameters import PROJECTED, split_parameters

    model.requires_grad_(True)
    optimizer = DctAdamW(
        split_parameters(model, project=config.targets or PROJECTED),
        lr=context.learning_rate,
        rank=config.rank,
        density=config.density,
        basis=config.basis,
        side=config.side,
        update_gap=config.update_gap,
        norm=config.norm,
        feedback=config.feedback,
        ages=config.ages,
        hysteresis=config.hysteresis,
        learn_steps=config.learn_steps,
        learn_gap=config.learn_gap,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        seed=context.seed,
        compat=config.compat,
    )
    return Attached(model, optimizer)


METHOD = Method(
    name="dct_adamw",
    summary="Every weight, with AdamW's state for the r strongest cosine coordinates of each matrix; no SVD.",
    paper="2505.17967",
    config=DctAdamWConfig,
    attach=attach,
    makes="weights",
    learning_rate=5e-5,
)
