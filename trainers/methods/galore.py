"""GaLore: Adam in the leading singular subspace of each matrix's gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trainers.method import Attached, Method, MethodConfig, TrainContext
from trainers.optim.settings import check_galore, in_range

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class GaloreConfig(MethodConfig):
    """Settings of ``galore``."""

    rank: int | None = None
    """Rank of the subspace: higher has more capacity and takes more memory. None: a share, ``density``."""
    density: float = 0.25
    """Rank as a share of a matrix's shorter side, in (0, 1], if ``rank`` is not given."""
    update_gap: int = 200
    """Steps between two decompositions, which take long: lower follows the gradient closer."""
    scale: float = 0.25
    """Factor on the update of projected matrices."""
    side: Literal["std", "reverse", "left", "right", "full"] = "std"
    """On which side of a matrix the basis is: ``std`` is the shorter one."""
    beta1: float = 0.9
    """Decay of the mean of the gradient, in [0, 1)."""
    beta2: float = 0.999
    """Decay of the mean of the squared gradient, in [0, 1)."""
    epsilon: float = 1e-6
    """Added to the root of the mean square, before bias correction; larger is calmer."""
    weight_decay: float = 0.0
    """Share of each weight taken off per unit of learning rate (decoupled); biases and norms are spared."""
    targets: tuple[str, ...] = ()
    """Parts of names of the layers to project; none means the linear layers of attention and MLP."""

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            in_range(name, getattr(self, name), low=0, high=1, open_high=True)
        in_range("epsilon", self.epsilon, low=0)
        names = ("rank", "density", "update_gap", "scale", "side", "weight_decay")
        betas = (self.beta1, self.beta2)
        rest = {"betas": betas, "eps": self.epsilon, "lr": 0.0, "role": "projected"}
        check_galore({name: getattr(self, name) for name in names} | rest)

    def warnings(self) -> list[str]:
        """Settings that have no effect as they are combined, one sentence each."""
        return ["density has no effect beside rank"] if self.rank is not None and self.density != 0.25 else []


def attach(model: PreTrainedModel, config: GaloreConfig, context: TrainContext) -> Attached:
    """Makes every weight trainable, under ``GaLore``.

    Args:
        model: The base.
        config: Rank and rates.
        context: The run around it.

    Returns:
        The model and the optimizer.

    Raises:
        ValueError: No layer is named by ``targets``.
    """
    from trainers.optim import GaLore
    from trainers.optim.parameters import PROJECTED, split_parameters

    model.requires_grad_(True)
    optimizer = GaLore(
        split_parameters(model, project=config.targets or PROJECTED),
        lr=context.learning_rate,
        rank=config.rank,
        density=config.density,
        update_gap=config.update_gap,
        scale=config.scale,
        side=config.side,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        seed=context.seed,
    )
    return Attached(model, optimizer)


METHOD = Method(
    name="galore",
    summary="Every weight, with Adam in the leading singular subspace of each matrix's gradient.",
    paper="2403.03507",
    config=GaloreConfig,
    attach=attach,
    makes="weights",
    learning_rate=1e-4,
)
