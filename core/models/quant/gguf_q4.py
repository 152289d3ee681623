"""Q4_1 straight from a GGUF file of the Llama architecture: the codes as they lie there, never the floats between.

A block of 32 weights of a row is ``w = D q + M`` with q from 0 to 15. Here that is ``D (q - z)`` with ``z = -M / D``
frozen, so a change of the scale D moves no block's mean relative to its spread; where D is 0, the scale is fixed at 0
and the block is the constant M. The format keeps each head's rows of q and k interleaved (the pairs that its rotary
embedding turns); they are put back in the model's order, codes, scales and offsets alike.

Not covered: other architectures, other block formats inside the blocks, biases, rope factors in the file.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from core.models.gguf import GGUFTensor, check
from core.models.quant.linear import QuantLinear
from core.models.quant.packing import pack
from core.models.quant.skeleton import fill, skeleton

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = 32
_F32, _F16, _Q4_1, _Q8_0 = 0, 1, 3, 8
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAME = re.compile(r"(?:blk\.(?P<block>[0-9]{1,6})\.)?(?P<part>[a-z_]+)\.weight", re.ASCII)


def read(file: Path, config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Makes the model of a GGUF file, with its Q4_1 matrices as quantised layers.

    Embeddings, head and norms become floats, whatever they are in the file (F32, F16, Q8_0 or Q4_1); so does a linear
    layer inside a block that is F32, F16 or Q8_0.

    Args:
        file: the GGUF file; its header passes our own reader first.
        config: the model's transformers configuration.
        dtype: what the floats are held in.

    Returns:
        A causal language model in eval mode, which computes what transformers' load of the same file computes.

    Raises:
        ValueError: if the file is malformed, of another architecture, without Q4_1 matrices, or no file of this
            configuration.
    """
    header = check(file)
    if (kind := header.settings["general.architecture"]) != "llama":
        raise ValueError(f"{file.name}: 4-bit reading knows the architecture llama, not {kind}")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    layers: dict[str, QuantLinear] = {}
    floats: dict[str, Tensor] = {}
    data = np.memmap(file, dtype=np.uint8, mode="r")
    try:
        for name, info in header.tensors.items():
            match = _NAME.fullmatch(name)
            if match is None or match["part"] not in _NAMES:
                raise ValueError(f"it has the tensor {name[:80]!r}, which is not one of a Llama that is read here")
            part, block = match["part"], match["block"]
            target = _NAMES[part] if block is None else f"model.layers.{int(block)}.{_NAMES[part]}"
            rows = _order(info, heads[part]) if part in heads else None
            if info.type == _Q4_1 and block is not None and len(info.shape) == 2:
                layers[target] = _layer(data[info.start : info.end], info, rows)
            else:
                floats[f"{target}.weight"] = _floats(data[info.start : info.end], info, rows).to(dtype)
        if not layers:
            raise ValueError("it has no Q4_1 matrices; quantise the model with int4 or nf4")
        model = skeleton(config, dtype)
        fill(model, layers, floats)
    except ValueError as error:
        raise ValueError(f"{file.name} cannot be read as a 4-bit model: {error}") from None
    return model


def _order(info: GGUFTensor, heads: int) -> Tensor:
    """Which row of the file each row of the model is: (head, pair, half) in the file, (head, half, pair) here."""
    count = info.shape[-1]
    if len(info.shape) != 2 or count % (2 * heads):
        raise ValueError(f"a matrix of {count} rows does not divide into {heads} heads")
    return torch.arange(count).view(heads, count // heads // 2, 2).transpose(1, 2).reshape(-1)


def _layer(raw: NDArray[np.uint8], info: GGUFTensor, rows: Tensor | None) -> QuantLinear:
    """A Q4_1 matrix: blocks of D and M in float16, then 16 bytes, codes 0-15 in their low halves and 16-31 above."""
    inputs, outputs = info.shape
    blocks = torch.from_numpy(raw.reshape(outputs, inputs // BLOCK, 20).copy())
    if rows is not None:
        blocks = blocks[rows]
    scales, offsets = blocks[:, :, :4].contiguous().view(torch.float16).float().unbind(2)
    if not bool(torch.isfinite(scales).all() and torch.isfinite(offsets).all()):
        raise ValueError("a block's scale or offset is not finite")
    codes = torch.cat((blocks[:, :, 4:] & 15, blocks[:, :, 4:] >> 4), dim=2).flatten(1)
    dead = scales == 0
    return QuantLinear(
        pack(codes),
        scales.contiguous(),
        torch.arange(16.0),
        in_features=inputs,
        group=BLOCK,
        scheme="q4_1",
        zeros=torch.where(dead, 0, -offsets / torch.where(dead, 1, scales)),
        constants=torch.where(dead, offsets, 0) if bool(dead.any()) else None,
    )


def _floats(raw: NDArray[np.uint8], info: GGUFTensor, rows: Tensor | None) -> Tensor:
    """Any tensor that stays in floating point, float32."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    if info.type not in (_F32, _F16, _Q4_1, _Q8_0):
        raise ValueError(f"it has blocks of GGML's type {info.type}; read are Q4_1, and F32, F16 or Q8_0 beside it")
    shape = info.shape[::-1]
    wide = dequantize(raw.reshape(math.prod(shape[:-1]), -1), GGMLQuantizationType(info.type))
    if np.may_share_memory(wide, raw):  # floats as they lie in the file, which is mapped
        wide = wide.copy()
    made = torch.from_numpy(wide).view(shape)
    return made if rows is None else made[rows]
