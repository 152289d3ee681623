"""A model quantised while it is read, tensor by tensor: its floats are never in memory together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.models.fingerprint import weight_files
from core.models.headers import TensorInfo, read_safetensors_header
from core.models.quant.convert import linears
from core.models.quant.quantise import check, quantise
from core.models.quant.skeleton import fill, skeleton

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load(directory: Path, scheme: str, group: int, dtype: torch.dtype) -> Any | None:
    """Quantises the linear layers inside the blocks from the floats of the files, whatever dtype the rest is held in.

    The codes are those of :func:`core.models.quant.convert.quantise_model` on the model in the dtype of its files.

    Args:
        directory: a model directory that the policy has accepted.
        scheme: ``int4`` or ``nf4``.
        group: as in :func:`core.models.quant.quantise.quantise`.
        dtype: what everything but the quantised layers is held in.

    Returns:
        A causal language model in eval mode; None where the files name weights otherwise than the model does, which
        transformers may know how to load.

    Raises:
        ValueError: if the scheme, the group or the model is refused, or a matrix is not finite.
    """
    check(scheme, group)
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    model = skeleton(config, dtype)
    found = {
        name: (file, info) for file in weight_files(directory) for name, info in read_safetensors_header(file).items()
    }
    names, state = linears(model), model.state_dict()
    own = {f"{name}.{part}" for name in names for part in ("weight", "bias")} & state.keys()
    if found.keys() - state.keys() or own - found.keys() or any(i.dtype not in _DTYPES for _, i in found.values()):
        return None
    scratch = bytearray(max(info.end - info.start for _, info in map(found.__getitem__, own)))
    layers = {}
    for name in names:
        bias = _read(*found[f"{name}.bias"]).to(dtype) if f"{name}.bias" in found else None
        try:
            layers[name] = quantise(_read(*found[f"{name}.weight"], scratch), scheme, group, bias)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    fill(model, layers, {name: _read(*found[name]).to(dtype) for name in found.keys() - own})
    return model


def _read(file: Path, info: TensorInfo, into: bytearray | None = None) -> Tensor:
    """One tensor, perhaps in memory that is used again and again.

    It is read and not mapped: pages of a mapped file would count until the last tensor of it is gone.
    """
    length = info.end - info.start
    data = bytearray(length) if into is None else into
    with file.open("rb") as opened, memoryview(data)[:length] as view:
        opened.seek(info.start)
        opened.readinto(view)
    dtype = _DTYPES[info.dtype]
    return torch.frombuffer(data, dtype=dtype, count=length // dtype.itemsize).view(info.shape)
