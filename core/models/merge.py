"""The weights that a model has once its adapter is folded in, computed without changing the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from core.models.quant.convert import quantised


def inner_model(model: nn.Module) -> Any:
    """The transformers model inside a PEFT model; the model itself otherwise."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that the model would have with its active adapter merged.

    Merging goes layer by layer into new tensors, after which each layer gets its own tensor back: the model is bitwise
    unchanged. Tensors that the adapter does not touch are shared with the model, not copied.

    Args:
        model: a transformers model, or a PEFT model around one with exactly one active adapter.

    Returns:
        Tensors by the names that they have in the plain model.

    Raises:
        ValueError: if the base is quantised, the adapter is merged already, several adapters are active, or the merged
            weights are not finite.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper
    from peft.utils.other import AuxiliaryTrainingWrapper

    if quantised(model):
        raise ValueError("the model's linear layers are quantised: save it as it is, or dequantise it first")
    if not isinstance(model, PeftModel):
        return dict(model.state_dict())
    base = inner_model(model)
    if getattr(base, "is_quantized", False):
        raise ValueError("a quantised base cannot be merged: load the base with quant none and this adapter, then save")
    active = list(model.active_adapters)
    if len(active) != 1:
        raise ValueError(f"exactly one adapter must be active to merge it, not {len(active)}")
    state = dict(base.state_dict())
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            own = _take(state, name)
            kept = {
                key.removeprefix("base_layer."): value for key, value in own.items() if key.startswith("base_layer.")
            }
            state.update({f"{name}.{key}": value for key, value in {**kept, **_merge(module, active)}.items()})
        elif isinstance(module, ModulesToSaveWrapper):
            prefix = f"modules_to_save.{active[0]}."
            own = _take(state, name)
            state.update({f"{name}.{k.removeprefix(prefix)}": v for k, v in own.items() if k.startswith(prefix)})
        elif isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError(f"{type(module).__name__} adapters cannot be merged yet; export the adapter instead")
    return state


def _take(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Removes a module's entries and returns them by their names inside the module."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): state.pop(key) for key in [k for k in state if k.startswith(prefix)]}


def _merge(layer: Any, active: list[str]) -> dict[str, Tensor]:
    """The layer's merged parameters; the layer ends with the very tensors that it began with."""
    if layer.merged:
        raise ValueError("the adapter is merged into the model already; unmerge it first")
    inner = layer.get_base_layer()
    before = {name: parameter.data for name, parameter in inner.named_parameters()}
    with torch.no_grad():
        try:
            layer.merge(safe_merge=True, adapter_names=active)  # into a copy, and refused if not finite
            return {name: parameter.data for name, parameter in inner.named_parameters()}
        finally:
            if layer.merged:
                for name, parameter in inner.named_parameters():
                    if parameter.data is not before[name]:
                        parameter.data = parameter.data.clone()
                layer.unmerge()
            for name, parameter in inner.named_parameters():
                parameter.data = before[name]
