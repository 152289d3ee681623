"""Where each model family keeps its blocks, their attention and MLP, and the final norm."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

SITES = ("block", "attention", "mlp")


@dataclass(frozen=True, slots=True)
class Family:
    """Dotted paths inside a causal language model.

    Attributes:
        blocks: the list of transformer blocks.
        norm: the norm after the last block.
        attention: inside a block, the module whose output (its first element) is what attention computed.
        mlp: inside a block, the module whose output is what the MLP computed.
    """

    blocks: str = "model.layers"
    norm: str = "model.norm"
    attention: str = "self_attn"
    mlp: str = "mlp"


_LLAMA = Family()
_MULTIMODAL = Family("model.language_model.layers", "model.language_model.norm")

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "granite", "smollm3"),
        _LLAMA,
    ),
    "gemma3": _MULTIMODAL,
    "phi": Family(norm="model.final_layernorm"),
    "gpt2": Family("transformer.h", "transformer.ln_f", "attn"),
    "gpt_neox": Family("gpt_neox.layers", "gpt_neox.final_layer_norm", "attention"),
}
"""``config.model_type`` -> where things are."""


def family(model: nn.Module) -> Family:
    """The family of a model.

    Args:
        model: a causal language model or a PEFT model around one.

    Returns:
        Where the family keeps its parts.

    Raises:
        ValueError: if the family is unknown; the message lists the known ones.
    """
    kind = getattr(getattr(_base(model), "config", None), "model_type", type(model).__name__)
    if kind not in FAMILIES:
        raise ValueError(f"model family {kind!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kind]


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks, first to last."""
    layers = _base(model).get_submodule(family(model).blocks)
    assert isinstance(layers, nn.ModuleList)
    return list(layers)


def site_modules(model: nn.Module, site: str) -> list[nn.Module]:
    """One module per block whose output, a (B, T, D) tensor or a tuple that begins with one, is the site's value.

    Args:
        model: a causal language model or a PEFT model around one.
        site: one of :data:`SITES`.

    Returns:
        The modules, first block to last.

    Raises:
        ValueError: if the site or the model's family is unknown.
    """
    if site not in SITES:
        raise ValueError(f"unknown site {site!r}; sites are {', '.join(SITES)}")
    layers = blocks(model)
    if site == "block":
        return layers
    known = family(model)
    return [layer.get_submodule(known.attention if site == "attention" else known.mlp) for layer in layers]


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last block and the output head."""
    return _base(model).get_submodule(family(model).norm)


def _base(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model; the model itself otherwise."""
    unwrap = getattr(model, "get_base_model", None)
    inner = unwrap() if callable(unwrap) else model
    assert isinstance(inner, nn.Module)
    return inner
