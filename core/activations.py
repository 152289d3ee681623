"""Hidden states at chosen places of a model, a batch at a time.

Why not `output_hidden_states=True`: it keeps every layer at full length, knows only blocks, and applies the final norm
to the last one. Here a hook takes what is asked for, and may reduce it on the spot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from core.data.batch import Batch
from core.models.sites import site_modules


def record(
    model: nn.Module,
    batch: Batch,
    *,
    layers: Sequence[int],
    site: str = "block",
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Run a batch and take the output of some layers; no gradient, no cache, no hook left behind.

    Args:
        model: A causal language model, or a PeftModel around one, in eval mode.
        batch: B rows of T tokens, on any device; padding holds whatever the model makes of it.
        layers: L block indices, from 0; the result is in this order.
        site: "block", "attention" or "mlp".
        reduce: Applied to each layer's (B, T, D) before the next one runs, to hold less at once; keeps B in front.

    Returns:
        (B, L, T, D) in the model's dtype and on its device; with `reduce`, (B, L, *what it gives).

    Raises:
        ValueError: No layer, a layer that the model lacks or that is named twice, or an unknown site or family.
    """
    modules = site_modules(model, site)
    if not layers or len(set(layers)) != len(layers) or not all(0 <= layer < len(modules) for layer in layers):
        raise ValueError(f"layers must be different indices from 0 to {len(modules) - 1}, not {list(layers)}")
    taken: dict[int, Tensor] = {}
    with ExitStack() as stack, torch.no_grad():
        for layer in layers:
            handle = modules[layer].register_forward_hook(_hook(taken, layer, reduce))
            stack.callback(handle.remove)
        inputs = batch.to(next(model.parameters()).device)
        model(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            position_ids=inputs.position_ids,
            use_cache=False,
            logits_to_keep=1,
        )
    return torch.stack([taken[layer].to(taken[layers[0]].device) for layer in layers], dim=1)


def _hook(taken: dict[int, Tensor], layer: int, reduce: Callable[[Tensor], Tensor] | None) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        h: Tensor = output[0] if isinstance(output, tuple) else output
        # A copy: a later module may change its input in place.
        taken[layer] = h.detach().clone() if reduce is None else reduce(h.detach())

    return hook
