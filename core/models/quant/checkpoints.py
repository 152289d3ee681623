"""Models that others quantised to 4 bits: GPTQ, AWQ and bitsandbytes NF4, read from safetensors alone.

Layouts (N outputs, K inputs, G groups; eight codes to an int32, the first in the lowest bits):

- GPTQ: ``qweight`` (K / 8, N) packs along K, ``qzeros`` (G, N / 8) along N, ``scales`` (G, N), ``g_idx`` (K,) the group
  of each input. ``w = scale (q - zero)``; the format ``gptq`` stores zeros less one, ``gptq_v2`` stores them.
- AWQ (``gemm``): ``qweight`` (K, N / 8) and ``qzeros`` (G, N / 8) pack along N, the eight in the order 0 2 4 6 1 3 5 7.
- bitsandbytes: ``weight`` of bytes with ``weight.absmax`` and others (see :mod:`core.models.quant.bnb`).

Not covered: other widths than 4 bits, AWQ's other versions, marlin and fused layouts, quantised embeddings, and names
that differ from the model's own. Scales are taken to float32; what stays is cast to the dtype asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.models import policy
from core.models.fingerprint import weight_files
from core.models.quant import bnb
from core.models.quant.linear import QuantLinear
from core.models.quant.packing import pack
from core.models.quant.skeleton import fill, skeleton

_SUFFIXES = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "bitsandbytes": (
        *("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
        "weight.quant_state.bitsandbytes__nf4",
    ),
}
_MARK = {"gptq": "qweight", "awq": "qweight", "bitsandbytes": "weight.absmax"}
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in the eight of an int32 each output lies."""


def read(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Loads a quantised checkpoint; one layer after another, so the floats of its matrices never exist.

    Args:
        directory: ``config.json`` with ``quantization_config``, and safetensors; it passes the policy first.
        dtype: what everything but the quantised layers is held in.

    Returns:
        A causal language model in eval mode.

    Raises:
        ValueError: if the policy refuses the directory, its format is not covered, or its tensors do not fit.
    """
    policy.check_directory(directory, quantised=True)
    its = _settings(directory)
    files = {name: file for file in weight_files(directory) for name in _names(file)}
    method = its["quant_method"]
    mark = f".{_MARK[method]}"
    prefixes = [name.removesuffix(mark) for name in files if name.endswith(mark)]
    if not prefixes:
        raise ValueError(f"{directory} has no {_MARK[method]} in its weights: they are not {method}'s")
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = skeleton(config, dtype)
    layers = {}
    for prefix in prefixes:
        names = {part: f"{prefix}.{part}" for part in (*_SUFFIXES[method], "bias")}
        parts = {part: _tensor(files.pop(name), name) for part, name in names.items() if name in files}
        try:
            layers[prefix] = _layer(method, parts, its)
            if (bias := layers[prefix].bias) is not None:
                layers[prefix].bias = bias.to(dtype)
        except KeyError as error:
            raise ValueError(f"{prefix[:200]} lacks {error}") from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{prefix[:200]}: {error}") from None
    rest = {name: _tensor(file, name) for name, file in files.items()}
    fill(model, layers, {name: t.to(dtype) if t.is_floating_point() else t for name, t in rest.items()})
    return model


def gptq(parts: Mapping[str, Tensor], group: int, stored_less_one: bool) -> QuantLinear:
    """A layer from GPTQ's tensors.

    Args:
        parts: ``qweight``, ``qzeros``, ``scales``, and perhaps ``g_idx`` and ``bias``.
        group: inputs that share a scale; -1 for all.
        stored_less_one: whether ``qzeros`` hold the zeros less one (format ``gptq``).

    Returns:
        The layer.

    Raises:
        ValueError: if the parts do not fit together, or a stored zero is 15, which kernels read as 0 or as 16.
    """
    qweight, index = parts["qweight"], parts.get("g_idx")
    inputs = qweight.shape[0] * 8
    group = inputs if group == -1 else group
    zeros = _eights(parts["qzeros"])
    if stored_less_one:
        if bool((zeros == 15).any()):
            raise ValueError("it stores a zero of 15, which readers disagree about; save it in the format gptq_v2")
        zeros = zeros + 1
    codes = _eights(qweight.T.contiguous())
    order = None
    if index is not None:
        places = torch.arange(inputs) // group
        if not torch.equal(index.long(), places):
            order = torch.argsort(index, stable=True)
            if not torch.equal(index.long()[order], places):
                raise ValueError(f"its g_idx does not put {group} inputs into each group")
            codes, order = codes[:, order], order.int()
    return _affine("gptq", codes, parts, zeros, group, order)


def awq(parts: Mapping[str, Tensor], group: int) -> QuantLinear:
    """A layer from AWQ's tensors, version ``gemm``.

    Args:
        parts: ``qweight``, ``qzeros``, ``scales``, and perhaps ``bias``.
        group: inputs that share a scale; -1 for all.

    Returns:
        The layer.

    Raises:
        ValueError: if the parts do not fit together.
    """

    def ordered(packed: Tensor) -> Tensor:
        eights = _eights(packed).view(packed.shape[0], -1, 8)
        return eights[:, :, list(_AWQ_ORDER)].flatten(1)

    codes = ordered(parts["qweight"]).T.contiguous()
    group = codes.shape[1] if group == -1 else group
    return _affine("awq", codes, parts, ordered(parts["qzeros"]), group, None)


def _affine(
    scheme: str, codes: Tensor, parts: Mapping[str, Tensor], zeros: Tensor, group: int, order: Tensor | None
) -> QuantLinear:
    """``w = scale (q - zero)``: codes (N, K); zeros and scales (G, N)."""
    return QuantLinear(
        pack(codes.contiguous()),
        parts["scales"].T.float().contiguous(),
        torch.arange(16.0),
        in_features=codes.shape[1],
        group=group,
        scheme=scheme,
        zeros=zeros.T.float().contiguous(),
        order=order,
        bias=parts.get("bias"),
    )


def _layer(method: str, parts: Mapping[str, Tensor], its: Mapping[str, Any]) -> QuantLinear:
    if method == "gptq":
        return gptq(parts, its["group_size"], its["checkpoint_format"] == "gptq")
    if method == "awq":
        return awq(parts, its["group_size"])
    state = json.loads(bytes(parts["weight.quant_state.bitsandbytes__nf4"].tolist()))
    absmax, shape, block = parts["weight.absmax"], state["shape"], state["blocksize"]
    if "weight.nested_absmax" in parts:
        table, second = parts["weight.nested_quant_map"], parts["weight.nested_absmax"]
        absmax = bnb.expand(absmax, table, second, state["nested_blocksize"], state["nested_offset"])
    outputs, inputs = shape
    return bnb.layer(parts["weight"], absmax, parts["weight.quant_map"], (outputs, inputs), block, parts.get("bias"))


def _eights(packed: Tensor) -> Tensor:
    """(r, n) int32 to (r, 8 n) uint8 codes, the lowest bits first."""
    if packed.dtype != torch.int32 or packed.ndim != 2:
        raise ValueError(f"packed codes are {packed.dtype} of {packed.ndim} dimensions, not a matrix of int32")
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((packed.unsqueeze(2) >> shifts) & 15).to(torch.uint8).flatten(1)


def _settings(directory: Path) -> dict[str, Any]:
    """How the checkpoint was quantised, checked: from ``config.json``, or GPTQ's older ``quantize_config.json``."""
    its = policy.read_json(directory / "config.json").get("quantization_config")
    older = directory / "quantize_config.json"
    if its is None and older.is_file():
        its = {"quant_method": "gptq", **policy.read_json(older)}
    if not isinstance(its, dict) or its.get("quant_method") not in _SUFFIXES:
        raise ValueError(f"{directory} does not say in config.json that it is quantised by {' or '.join(_SUFFIXES)}")
    its = {"checkpoint_format": "gptq", "version": "gemm", **its}
    if its["quant_method"] == "bitsandbytes":
        if its.get("load_in_4bit") is not True or its.get("bnb_4bit_quant_type") != "nf4":
            raise ValueError(f"{directory} is quantised by bitsandbytes, but not to 4 bits of nf4")
        return its
    if its.get("bits") != 4:
        raise ValueError(f"{directory} is quantised to {its.get('bits')!r:.20} bits; only 4 are read here")
    group = its.get("group_size")
    if type(group) is not int or not (group == -1 or group >= 2):
        raise ValueError(f"{directory} has groups of {group!r:.20}")
    if its["quant_method"] == "gptq" and its["checkpoint_format"] not in ("gptq", "gptq_v2"):
        raise ValueError(f"{directory} has the format {its['checkpoint_format']!r:.40}; read are gptq and gptq_v2")
    if its["quant_method"] == "awq" and str(its["version"]).lower() != "gemm":
        raise ValueError(f"{directory} has AWQ's version {its['version']!r:.40}; only gemm is read here")
    return its


def _names(file: Path) -> Iterator[str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        yield from opened.keys()


def _tensor(file: Path, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor
