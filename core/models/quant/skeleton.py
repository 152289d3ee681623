"""A model without weights, to be filled tensor by tensor: nothing is ever allocated twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from core.models.quant.linear import QuantLinear


def skeleton(config: Any, dtype: torch.dtype) -> Any:
    """A causal language model whose parameters take no memory yet; its buffers (rotary frequencies) are real.

    While it is made, modules that other threads make lose their weights too: load models from one thread.

    Args:
        config: a transformers configuration without quantisation settings.
        dtype: what the parameters will be held in.

    Returns:
        The model, in eval mode.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    return model.eval()


def fill(model: Any, layers: Mapping[str, QuantLinear], tensors: Mapping[str, Tensor]) -> None:
    """Puts weights into a skeleton.

    Args:
        model: from :func:`skeleton`.
        layers: quantised layers by the full name of the linear layer that each replaces.
        tensors: all other weights by their names in the state dict, in the dtypes that they will have. A tied head may
            be missing.

    Raises:
        ValueError: if a name or a shape is not the model's, or a weight is missing.
    """
    for name, layer in layers.items():
        try:
            old: Any = model.get_submodule(name)
        except AttributeError:
            old = None
        if type(old) is not nn.Linear or (old.out_features, old.in_features) != (layer.out_features, layer.in_features):
            raise ValueError(f"{name} is not a linear layer of {layer.out_features} x {layer.in_features} in the model")
        if (old.bias is None) != (layer.bias is None):
            raise ValueError(f"{name} {'has no' if layer.bias is None else 'has a'} bias, unlike the model's")
        model.set_submodule(name, layer.train(model.training))
    wanted = model.state_dict()
    for name, tensor in tensors.items():
        if name not in wanted or wanted[name].shape != tensor.shape:
            shape = "x".join(map(str, tensor.shape))
            raise ValueError(f"{name}, {shape}, is not a weight of the model" + _expected(wanted.get(name)))
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    everything = (*model.named_parameters(), *model.named_buffers())
    if missing := sorted(name for name, tensor in everything if tensor.is_meta):
        raise ValueError(f"{len(missing)} of the model's weights are missing, for instance {missing[0]}")


def _expected(tensor: Tensor | None) -> str:
    return "" if tensor is None else f", which has {'x'.join(map(str, tensor.shape))} there"
