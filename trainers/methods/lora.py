"""LoRA and its variants, through PEFT: rank-stabilised scale, DoRA, LoRA+, and a 4-bit base (QLoRA)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trainers.method import Attached, Method, MethodConfig, TrainContext

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig(MethodConfig):
    """Settings of ``lora``."""

    rank: int = 16
    """Rank of each update: higher has more capacity and takes more memory."""
    alpha: float = 32.0
    """The update is scaled by alpha / rank, or alpha / sqrt(rank) with ``rslora``: higher acts like a higher rate."""
    dropout: float = 0.0
    """Share of the adapter's inputs dropped while training, in [0, 1): higher fits less closely."""
    targets: tuple[str, ...] = ("all-linear",)
    """Names of the modules to adapt, such as ``q_proj``; ``all-linear`` is every linear layer but the head."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank), so that a high rank learns as fast as a low one (arXiv 2312.03732)."""
    dora: bool = False
    """Learn magnitude and direction apart (arXiv 2402.09353): often better at a low rank, slower, served merged."""
    lora_plus_ratio: float = 1.0
    """Learning rate of B over that of A (LoRA+, arXiv 2402.12354, suggests 16); 1 is plain LoRA."""
    weight_decay: float = 0.0
    """Share of each adapter weight taken off per unit of learning rate (decoupled)."""
    base: Literal["none", "bnb-nf4"] = "none"
    """How the frozen weights are held: as they are, or in 4 bits by bitsandbytes (QLoRA; needs the ``bnb`` extra)."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be positive, not {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        if not self.targets:
            raise ValueError("targets must name at least one module, or be all-linear")
        if "all-linear" in self.targets and len(self.targets) > 1:
            raise ValueError("targets is either all-linear alone or a list of module names")
        if not self.lora_plus_ratio > 0:
            raise ValueError(f"lora_plus_ratio must be positive, not {self.lora_plus_ratio}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must not be negative, not {self.weight_decay}")

    def warnings(self) -> list[str]:
        """Settings that have no effect as they are combined, one sentence each."""
        if self.rslora and self.rank == 1:
            return ["rslora has no effect at rank 1: both scales are alpha"]
        return []


def attach(model: PreTrainedModel, config: LoraConfig, context: TrainContext) -> Attached:
    """Wraps the model with a fresh adapter; only the adapter trains. B starts at zero, so step 0 is the base model.

    Args:
        model: The base.
        config: Rank, scale and variant.
        context: The run around it.

    Returns:
        The wrapped model, and AdamW with one group for B, whose rate ``lora_plus_ratio`` raises, and one for the rest.

    Raises:
        ValueError: No module matches ``targets``; the message lists the model's linear layers.
    """
    import peft
    import torch

    targets: Any = "all-linear" if config.targets == ("all-linear",) else list(config.targets)
    linear = sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
    if targets != "all-linear":
        modules = [name for name, _ in model.named_modules()]
        for target in targets:
            if not any(name == target or name.endswith(f".{target}") for name in modules):
                raise ValueError(f"targets: no module is called {target!r}; linear layers here: {', '.join(linear)}")
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.23 by a name that the latter is about to drop; goes with a PEFT that does not.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        adapted = peft.get_peft_model(
            model,
            peft.LoraConfig(
                task_type="CAUSAL_LM",
                r=config.rank,
                lora_alpha=config.alpha,
                lora_dropout=config.dropout,
                target_modules=targets,
                use_rslora=config.rslora,
                use_dora=config.dora,
            ),
        )
    if context.activation_checkpointing:
        # The frozen embeddings' output does not require gradients, and a recomputed block whose input does not would
        # pass none to the adapter inside it.
        adapted.enable_input_require_grads()
    fast = [p for name, p in adapted.named_parameters() if p.requires_grad and ".lora_B." in name]
    slow = [p for name, p in adapted.named_parameters() if p.requires_grad and ".lora_B." not in name]
    optimizer = torch.optim.AdamW(
        [
            {"params": slow, "lr": context.learning_rate},
            {"params": fast, "lr": context.learning_rate * config.lora_plus_ratio},
        ],
        weight_decay=config.weight_decay,
        fused=all(p.device.type in ("cpu", "cuda") for p in slow + fast),
    )
    return Attached(adapted, optimizer)


METHOD = Method(
    name="lora",
    summary="A low-rank update beside each linear layer, with AdamW: small to train, to store and to serve.",
    paper="2106.09685",
    config=LoraConfig,
    attach=attach,
    makes="adapter",
    learning_rate=4e-4,
    works_on_4bit=True,
    inherits=("rank", "alpha", "targets", "rslora", "dora"),
)
