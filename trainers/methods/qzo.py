"""QZO: the scales of 4-bit weights, by two losses a step and no gradient.

Not covered: bases that are 4-bit files already (Q4_1, GPTQ, AWQ); serving in 4 bits: what is exported is the whole
model that codes and tuned scales stand for, beside the scales alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trainers.method import Attached, Method, MethodConfig, TrainContext
from trainers.optim.estimator import Normalised

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class QzoConfig(Normalised, MethodConfig):
    """Settings of ``qzo``."""

    scheme: Literal["int4", "nf4"] = "int4"
    """How the linear layers of the blocks are quantised when the model is loaded: evenly spaced levels, or NF4's."""
    group: int = 64
    """Weights of a row that share a scale: 32, 64 or 128 (64 for ``nf4``); fewer are closer to the model, and more
    scales to tune."""
    last_blocks: int | None = None
    """Tune the scales of so many blocks at the end alone; all are quantised. None: of every block."""

    def __post_init__(self) -> None:
        Normalised.__post_init__(self)
        if self.group not in ((32, 64, 128) if self.scheme == "int4" else (64,)):
            raise ValueError(f"group must be {'32, 64 or 128' if self.scheme == 'int4' else 64}, not {self.group}")
        if self.last_blocks is not None and self.last_blocks < 1:
            raise ValueError(f"last_blocks must be at least 1, not {self.last_blocks}")


def attach(model: PreTrainedModel, config: QzoConfig, context: TrainContext) -> Attached:
    """Quantises the linear layers of the blocks, where loading has not, and trains their scales alone, under ``Qzo``.

    Args:
        model: The base, in float32; changed in place.
        config: Of the quantisation and the estimator.
        context: The run around it.

    Returns:
        The model, the optimizer, and what it measures.

    Raises:
        ValueError: The model has no linear layers in its blocks, or fewer blocks than ``last_blocks``.
    """
    from core.models.quant.convert import quantise_model, quantised
    from core.models.sites import blocks
    from trainers.optim import Qzo

    inside = blocks(model)
    tuned = len(inside) if config.last_blocks is None else config.last_blocks
    if tuned > len(inside):
        raise ValueError(f"last_blocks is {tuned}, and the model has {len(inside)} blocks")
    model.requires_grad_(False)
    if not quantised(model):
        quantise_model(model, config.scheme, config.group)
    scales = [layer.scales for block in inside[len(inside) - tuned :] for layer in quantised(block).values()]
    for one in scales:
        one.requires_grad_(True)
    optimizer = Qzo(
        [{"params": scales, "scales": True}], lr=context.learning_rate, seed=context.seed, **config.estimator()
    )
    return Attached(model, optimizer, optimizer.measured)


METHOD = Method(
    name="qzo",
    summary="The scales of a 4-bit model, by the difference of two losses along a random direction: no gradients.",
    paper="2505.13430",
    config=QzoConfig,
    attach=attach,
    makes="scales",
    learning_rate=1e-2,
    needs_gradients=False,
)
