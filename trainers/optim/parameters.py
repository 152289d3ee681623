"""Which parameters are split and which keep all their state: the linear layers inside blocks against the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

PROJECTED = (
    "attn",
    "mlp",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "up_proj",
    "down_proj",
    "gate_proj",
    "query",
    "key",
    "value",
    "intermediate.dense",
    "output.dense",
)
"""A linear layer is split if its name contains one of these, as in FRUGAL's published scripts."""


def split_parameters(
    model: nn.Module,
    *,
    project: Sequence[str] = PROJECTED,
    embeddings: bool = False,
    norms: bool = False,
    head: bool = False,
) -> list[dict[str, Any]]:
    """Groups the parameters that train, for any of the optimizers of this package.

    Projected are the weights (not biases) of linear layers whose name contains one of ``project``, of convolutions
    in two or more dimensions and of stacked experts likewise (a convolution in one dimension keeps all its state: its
    weight has the shape of a stack). Everything else keeps all its state: embeddings, the head, norms, biases, and
    linear layers that are not named. A tied weight is listed once; it counts as what it is first registered as, which
    for a language model is the embedding.

    Args:
        model: Any module; only parameters that require gradients are taken.
        project: Parts of module names.
        embeddings: Project embeddings too.
        norms: Project norms' vectors too, which only ``split="block"`` can split.
        head: Project the output layer too: a linear layer called ``lm_head`` or ``classifier``.

    Returns:
        Up to three groups with ``params``, ``names``, and ``role``: ``"projected"`` matrices, ``"full"`` matrices, and
        ``"full"`` vectors with ``weight_decay`` 0.

    Raises:
        ValueError: Nothing is projected; the message lists the linear layers that there are.
    """
    modules = dict(model.named_modules())
    projected: dict[str, Tensor] = {}
    matrices: dict[str, Tensor] = {}
    vectors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        owner, _, leaf = name.rpartition(".")
        if _is_projected(owner, leaf, modules[owner], parameter, project, embeddings, norms, head):
            projected[name] = parameter
        elif parameter.dim() < 2:
            vectors[name] = parameter
        else:
            matrices[name] = parameter
    if not projected:
        linear = sorted({name.rpartition(".")[2] for name, m in modules.items() if isinstance(m, nn.Linear)})
        raise ValueError(
            f"no layer's name contains any of {', '.join(project) or 'nothing'}; this model has the linear layers "
            f"{', '.join(linear) or 'none'}"
        )
    groups: list[dict[str, Any]] = [_group(projected, "projected")]
    if matrices:
        groups.append(_group(matrices, "full"))
    if vectors:
        groups.append(_group(vectors, "full") | {"weight_decay": 0.0})
    return groups


def is_kind(kind: str, name: str, module: nn.Module) -> bool:
    """Whether a module is one of those that are told apart by what they do.

    Args:
        kind: ``embeddings``, ``norms`` or ``head``.
        name: Its name in the model.
        module: Itself.

    Returns:
        True for an embedding table; for a module called or typed a norm; for an output layer by its usual names.
    """
    last = name.rpartition(".")[2]
    if kind == "embeddings":
        return isinstance(module, nn.Embedding)
    if kind == "norms":
        return "norm" in last.lower() or "norm" in type(module).__name__.lower()
    return last in ("lm_head", "classifier", "score")


def _is_projected(
    owner: str,
    leaf: str,
    module: nn.Module,
    parameter: Tensor,
    project: Sequence[str],
    embeddings: bool,
    norms: bool,
    head: bool,
) -> bool:
    for kind, wanted in (("embeddings", embeddings), ("norms", norms), ("head", head)):
        if is_kind(kind, owner, module):
            return wanted and (kind != "head" or leaf == "weight")
    if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):  # Three dimensions as well, but no stack of experts.
        return False
    return parameter.dim() >= 2 and "bias" not in leaf and any(part in owner for part in project)


def _group(parameters: dict[str, Tensor], role: str) -> dict[str, Any]:
    return {"params": list(parameters.values()), "names": list(parameters), "role": role}
