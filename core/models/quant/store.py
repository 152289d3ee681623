"""A quantised model as files, saved and loaded without loss: one safetensors file and the schemes of its layers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from core.models import policy
from core.models.headers import read_safetensors_header
from core.models.lock import appearing
from core.models.quant.convert import quantised
from core.models.quant.linear import QuantLinear
from core.models.quant.scales import FROZEN, digest, identity
from core.models.quant.skeleton import fill, skeleton

FORMAT = "gradhelm-quant/1"
WEIGHTS, SETTINGS = "quant.safetensors", "quant.json"
_PARTS = ("scales", *FROZEN)
_KEYS = ("scheme", "group", "in_features")


@dataclass(frozen=True, slots=True)
class Stored:
    """A quantised model that was loaded.

    Attributes:
        model: a causal language model in eval mode.
        layers: its quantised layers by their full names.
        base_fingerprint: identity of the weights that it was made from.
    """

    model: Any
    layers: Mapping[str, QuantLinear]
    base_fingerprint: str


def save(model: Any, directory: Path, *, base_fingerprint: str, tokenizer: Any = None) -> Path:
    """Saves a model with quantised layers: every tensor as it is, bit for bit.

    Args:
        model: a transformers model with quantised layers, without adapters.
        directory: where it goes; a directory of that name is replaced once the new one is complete.
        base_fingerprint: identity of the weights that it was made from.
        tokenizer: saved beside it if given.

    Returns:
        ``directory``: ``config.json``, ``generation_config.json``, ``quant.safetensors`` and ``quant.json``.

    Raises:
        ValueError: if the model has no quantised layers, or carries an adapter.
    """
    from safetensors.torch import save_file

    layers = quantised(model)
    if not layers or hasattr(model, "peft_config"):
        raise ValueError("only a plain model with quantised layers is saved like this")
    tensors: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape)
        if place not in seen:  # a tied head is the embedding itself
            seen.add(place)
            tensors[name] = tensor.cpu().contiguous()
    settings = {
        "format": FORMAT,
        "base_fingerprint": base_fingerprint,
        "dtype": str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
        "quantiser": identity(layers),
        "scales": digest(layers),
        "layers": {name: {key: getattr(layer, key) for key in _KEYS} for name, layer in layers.items()},
    }
    with appearing(directory) as fresh:
        model.config.save_pretrained(fresh)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(fresh)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        save_file(tensors, fresh / WEIGHTS, metadata={"format": "pt"})
        (fresh / WEIGHTS).chmod(0o644)
        (fresh / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", "utf-8")
    return directory


def load(directory: Path) -> Stored:
    """Loads what :func:`save` wrote; codes stay mapped from the file, so they take memory only once they are used.

    Args:
        directory: where it lies. It is never written to.

    Returns:
        The model, bitwise what was saved.

    Raises:
        ValueError: if the files are not whole, do not fit together, or name code or a model that the policy refuses.
    """
    for name in ("config.json", SETTINGS, WEIGHTS):
        if not (directory / name).is_file():
            raise ValueError(f"{directory} has no {name}: it is not a quantised model that was saved here")
    plain = policy.read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    for settings in (plain, policy.read_json(generation) if generation.is_file() else {}):
        policy.check_config(settings)
    settings = policy.read_json(directory / SETTINGS)
    listed, dtype, base = settings.get("layers"), settings.get("dtype"), settings.get("base_fingerprint")
    if settings.get("format") != FORMAT or not isinstance(listed, dict) or not listed or not isinstance(base, str):
        raise ValueError(f"{directory / SETTINGS} is not of the format {FORMAT}")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"{directory / SETTINGS} names the dtype {dtype!r:.80}")
    policy.check_sizes(plain, list(read_safetensors_header(directory / WEIGHTS).values()))
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, GenerationConfig

    tensors = load_file(directory / WEIGHTS)
    layers = {name: _layer(name, its, tensors) for name, its in listed.items()}
    if identity(layers) != settings.get("quantiser") or digest(layers) != settings.get("scales"):
        raise ValueError(f"{directory / WEIGHTS} has changed since it was written")
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    model = skeleton(config, getattr(torch, dtype))
    fill(model, layers, tensors)
    if generation.is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    return Stored(model, layers, base)


def _layer(name: str, its: Any, tensors: dict[str, Tensor]) -> QuantLinear:
    """Takes one layer's tensors out of ``tensors``."""
    if not isinstance(its, dict) or its.keys() != set(_KEYS):
        raise ValueError(f"{SETTINGS} describes {name[:200]} by other keys than {', '.join(_KEYS)}")
    scheme, group, inputs = its["scheme"], its["group"], its["in_features"]
    if type(scheme) is not str or not all(type(size) is int and size >= 1 for size in (group, inputs)):
        raise ValueError(f"{SETTINGS} describes {name[:200]} by {its!r:.200}")
    parts = {part: tensors.pop(f"{name}.{part}", None) for part in _PARTS}
    codes, scales, table = (parts.pop(part) for part in ("codes", "scales", "table"))
    if codes is None or scales is None or table is None:
        raise ValueError(f"{WEIGHTS} lacks codes, scales or table of {name[:200]}")
    try:
        return QuantLinear(codes, scales, table, in_features=inputs, group=group, scheme=scheme, **parts)
    except ValueError as error:
        raise ValueError(f"{name[:200]}: {error}") from None
