"""Optimizer state and random generators as tensors and JSON, without loss and without pickle.

The JSON is tagged where JSON itself would forget something: {"$tensor": name}, {"$tuple": [...]}, {"$dict": [[key,
value], ...]} for mappings whose keys are no plain texts.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def flatten_optimizer(state_dict: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Take an optimizer's (or scheduler's) state apart into tensors by name and JSON.

    Args:
        state_dict: what `optimizer.state_dict()` gave: any nesting of mappings, lists, tuples, tensors and scalars.

    Returns:
        Tensors under dotted names ("state.0.exp_avg"), and JSON that says where each belongs.

    Raises:
        ValueError: a value of a kind that cannot be stored, with its place.
    """
    tensors: dict[str, torch.Tensor] = {}
    return tensors, {"tree": _encode(state_dict, "", tensors)}


def unflatten_optimizer(tensors: Mapping[str, torch.Tensor], data: Mapping[str, Any]) -> dict[str, Any]:
    """Put together again what `flatten_optimizer` took apart: same kinds, dtypes, shapes and bits.

    Args:
        tensors: at least the tensors that `flatten_optimizer` returned.
        data: the JSON that it returned.

    Returns:
        What `optimizer.load_state_dict` takes.

    Raises:
        ValueError: a tensor is missing, or the JSON is not of this form.
    """
    try:
        tree = _decode(data["tree"], tensors)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"optimizer state does not fit together: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError("optimizer state is not a mapping")
    return tree


def _encode(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.Tensor):
        name = place
        while name in tensors:
            name += "_"
        tensors[name] = value
        return {"$tensor": name}
    if isinstance(value, list | tuple):
        items = [_encode(item, _join(place, index), tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, Mapping):
        items = [(key, _encode(item, _join(place, key), tensors)) for key, item in value.items()]
        if all(type(key) is str and not key.startswith("$") for key in value):
            return dict(items)
        if not all(type(key) in (bool, int, str) for key in value):
            raise ValueError(f"optimizer state {place} has keys other than texts and whole numbers")
        return {"$dict": [[key, item] for key, item in items]}
    raise ValueError(f"optimizer state {place} is a {type(value).__name__}, which cannot be stored without pickle")


def _decode(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$tuple" in value:
        return tuple(_decode(item, tensors) for item in value["$tuple"])
    if "$dict" in value:
        return {key: _decode(item, tensors) for key, item in value["$dict"]}
    return {key: _decode(item, tensors) for key, item in value.items()}


def _join(place: str, key: object) -> str:
    return f"{place}.{key}" if place else str(key)


def rng_state() -> dict[str, Any]:
    """Take down all random generators of this process: Python's, NumPy's, torch's on CPU and on every GPU.

    Returns:
        JSON data for `set_rng_state`. GPUs are left out while torch has not touched one.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    touched = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state_all() if touched else []
    return {
        "python": {"version": version, "words": list(words), "gauss": gauss},
        "numpy": {
            "name": str(name),
            "keys": base64.b64encode(np.asarray(keys, dtype="<u4").tobytes()).decode(),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": _pack(torch.get_rng_state()),
        "cuda": [_pack(state) for state in cuda],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Bring all random generators back to where `rng_state` saw them.

    Args:
        state: what `rng_state` returned, also after a round trip through JSON.

    Raises:
        ValueError: the data is not of this form, or was taken with more GPUs than there are now.
    """
    try:
        python, numpy, cuda = state["python"], state["numpy"], state["cuda"]
        if len(cuda) > torch.cuda.device_count():
            raise ValueError(f"random state is that of {len(cuda)} GPUs; here are {torch.cuda.device_count()}")
        keys = np.frombuffer(base64.b64decode(numpy["keys"], validate=True), dtype="<u4").astype(np.uint32)
        random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
        np.random.set_state((numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
        torch.set_rng_state(_unpack(state["torch"]))
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"random state does not fit this process: {error}") from error
    for index, text in enumerate(cuda):
        torch.cuda.set_rng_state(_unpack(text), index)


def _pack(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _unpack(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)
