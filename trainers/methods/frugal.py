"""FRUGAL: AdamW on a small, changing part of each matrix, the sign of the gradient on the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trainers.method import Attached, Method, MethodConfig, TrainContext
from trainers.optim.settings import check_frugal, in_range

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Treatment = Literal["full", "projected", "frozen"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FrugalConfig(MethodConfig):
    """Settings of ``frugal``."""

    density: float = 0.25
    """Share of each matrix that has optimizer state, in [0, 1]: higher learns more like AdamW and takes more memory; 0
    is signSGD. A rank r of n columns is r / n."""
    split: Literal["columns", "column_blocks", "rows", "randk", "block", "svd", "random"] = "columns"
    """What that part is: columns, blocks of them, or rows (blocks and rows are the fastest), single elements, whole
    matrices in turn (``block``), the gradient's leading singular vectors, or a random subspace."""
    side: Literal["std", "reverse", "left", "right", "full"] = "std"
    """For ``svd`` and ``random``, the side of the basis: ``std`` is the shorter one."""
    order: Literal["random", "ascending", "descending", "mirror"] = "random"
    """For ``block``, how the matrices take turns."""
    update_gap: int = 200
    """Steps between two choices of the part; lower reaches all of the matrix sooner and keeps less momentum."""
    lr_scale: float = 1.0
    """Factor on the learning rate of split matrices; the paper takes 0.3 for 7B models."""
    free_lr_scale: float = 0.1
    """Further factor for the part without state: 0.1 in the paper's fine-tuning, 1 in its pre-training."""
    full: Literal["adamw", "lion", "sgdm"] = "adamw"
    """Rule of what has state."""
    free: Literal["sign", "sgd", "none"] = "sign"
    """Rule of what has none: the gradient's sign, the gradient, or no update."""
    beta1: float = 0.9
    """Decay of the mean of the gradient, in [0, 1)."""
    beta2: float = 0.999
    """Decay of the mean of the squared gradient, in [0, 1)."""
    epsilon: float = 1e-8
    """Added to the root of the mean square; larger is calmer."""
    momentum: float = 0.9
    """Of ``sgdm``, in [0, 1)."""
    weight_decay: float = 0.0
    """Share of each weight taken off per unit of learning rate (decoupled); biases and norms are spared."""
    state: Literal["reset", "keep", "project", "carry"] = "reset"
    """What becomes of the moments when the part changes: zeros; left as they are; what belongs to the new part is kept;
    or kept with an age for each column or row."""
    select: Literal["random", "top"] = "random"
    """Random columns, blocks or rows, or those with the largest gradient."""
    density_end: float | None = None
    """Density after ``decay_steps``, on a straight line."""
    decay_steps: int | None = None
    """Steps from ``density`` to ``density_end``."""
    stagger: bool = False
    """Spread the choices of different matrices over different steps, so that no step is slow."""
    block_columns: int = 64
    """Width of a block of ``column_blocks``."""
    moments: Literal["float32", "int8"] = "float32"
    """How moments of split matrices are held; ``int8`` takes a quarter of the memory."""
    targets: tuple[str, ...] = ()
    """Parts of names of the layers to split; none means the linear layers of attention and MLP."""
    signed: tuple[str, ...] = ()
    """Parts of names of layers that get no state at all, whatever the density."""
    embeddings: Treatment = "full"
    """Embeddings (and a head tied to them): all their state, split like the layers, or not trained."""
    norms: Treatment = "full"
    """Norms: all their state, split (only ``block`` can), or not trained."""
    head: Treatment = "full"
    """An output layer of its own: all its state, split, or not trained."""

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            in_range(name, getattr(self, name), low=0, high=1, open_high=True)
        in_range("epsilon", self.epsilon, low=0)
        if self.norms == "projected" and self.split != "block":
            raise ValueError("norms are vectors: only split: block can take turns with them; use full or frozen")
        check_frugal(self.optimizer() | {"lr": 0.0, "compat": None, "role": "projected"})

    def optimizer(self) -> dict[str, Any]:
        """The settings that the optimizer itself takes."""
        own = ("beta1", "beta2", "epsilon", "targets", "signed", "embeddings", "norms", "head")
        names = [name for name in self.__dataclass_fields__ if name not in own]
        betas = {"betas": (self.beta1, self.beta2), "eps": self.epsilon}
        return {name: getattr(self, name) for name in names} | betas

    def warnings(self) -> list[str]:
        """Settings that have no effect as they are combined, one sentence each."""
        default = type(self)()
        changed = {name for name in self.__dataclass_fields__ if getattr(self, name) != getattr(default, name)}
        steady = self.density_end is None
        found = []
        for unless, has_it, names in (
            ("split is svd or random", self.split in ("svd", "random"), ("side",)),
            ("split is block", self.split == "block", ("order",)),
            ("split is column_blocks", self.split == "column_blocks", ("block_columns",)),
            ("full is sgdm", self.full == "sgdm", ("momentum",)),
            ("full is adamw or lion", self.full != "sgdm", ("beta1", "beta2")),
            ("full is adamw", self.full == "adamw", ("epsilon",)),
            ("free is sign or sgd", self.free != "none", ("free_lr_scale",)),
            ("some of a matrix has state", not steady or self.density > 0, _OF_STATE),
            ("some of a matrix has none", not steady or self.density < 1 or bool(self.signed), _OF_A_PART),
        ):
            idle = [name for name in names if name in changed and not has_it]
            found += [f"{name} has no effect unless {unless}" for name in idle]
        both = [name for name in self.targets if any(other in name for other in self.signed)]
        found += [f"{name} in targets has no effect: it is in signed too, which gives it no state" for name in both]
        return found


_OF_A_PART = ("free", "free_lr_scale", "update_gap", "state", "select", "stagger")
_OF_STATE = ("split", "side", "order", "update_gap", "state", "select", "stagger", "block_columns", "moments")


def attach(model: PreTrainedModel, config: FrugalConfig, context: TrainContext) -> Attached:
    """Makes all weights trainable but those that are to stay frozen, under ``Frugal``.

    Args:
        model: The base.
        config: What has state, and how it is kept.
        context: The run around it.

    Returns:
        The model, and the optimizer with one group for each kind of parameter.

    Raises:
        ValueError: No layer is named by ``targets`` or ``signed``.
    """
    from trainers.optim import Frugal
    from trainers.optim.parameters import PROJECTED, is_kind, split_parameters

    treatments = {"embeddings": config.embeddings, "norms": config.norms, "head": config.head}
    model.requires_grad_(True)
    for name, module in model.named_modules():
        if any(treatment == "frozen" and is_kind(kind, name, module) for kind, treatment in treatments.items()):
            module.requires_grad_(False)
    groups = split_parameters(
        model,
        project=(*(config.targets or PROJECTED), *config.signed),
        **{kind: treatment == "projected" for kind, treatment in treatments.items()},
    )
    if config.signed:
        groups = [part for group in groups for part in _by_name(group, config.signed)]
    return Attached(model, Frugal(groups, lr=context.learning_rate, seed=context.seed, **config.optimizer()))


def _by_name(group: dict[str, Any], signed: tuple[str, ...]) -> list[dict[str, Any]]:
    """Splits a projected group into layers with state and layers without."""
    if group["role"] == "full":
        return [group]
    parts: list[dict[str, Any]] = []
    for without, more in ((False, {}), (True, {"density": 0.0, "density_end": None, "decay_steps": None})):
        pairs = zip(group["params"], group["names"], strict=True)
        chosen = [(p, name) for p, name in pairs if any(part in name for part in signed) == without]
        if chosen:
            rest = {"params": [p for p, _ in chosen], "names": [name for _, name in chosen]}
            parts.append({**group, **rest, **more})
    return parts


METHOD = Method(
    name="frugal",
    summary="Every weight, with AdamW's state for a changing quarter of each matrix, the gradient's sign on the rest.",
    paper="2411.07837",
    config=FrugalConfig,
    attach=attach,
    makes="weights",
    learning_rate=1e-4,
)
