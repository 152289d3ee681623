"""GPTQ, AWQ and bitsandbytes checkpoints, written here number by number as their layouts are published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from core.models.load import load
from core.models.quant.bnb import expand, layer
from core.models.quant.checkpoints import read
from core.models.quant.convert import quantised
from core.models.quant.quantise import NF4

IDS = torch.tensor([[5, 17, 300, 42, 1000, 3, 77]])
GROUP = 32
AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which output of eight the i-th four bits hold."""
CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": False},
    "gptq-order": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True},
    "gptq-v2": {"quant_method": "gptq", "bits": 4, "group_size": -1, "checkpoint_format": "gptq_v2"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "GEMM"},
    "bnb": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}


def _words(codes: Any, places: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """(r, 8 n) codes to (r, n) int32: ``places[i]`` of each eight goes to bits 4 i."""
    rows, columns = codes.shape
    words = np.zeros((rows, columns // 8), dtype=np.uint32)
    for r in range(rows):
        for c in range(columns // 8):
            for i, place in enumerate(places):
                words[r, c] |= np.uint32(int(codes[r, 8 * c + place]) << (4 * i))
    return torch.from_numpy(words.view(np.int32))


def _integer(kind: str, weight: Any, rng: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Random codes, scales and zeros of a matrix (N, K); the tensors to write, and the matrix in float64."""
    outputs, inputs = weight.shape
    group = inputs if kind == "gptq-v2" else GROUP
    codes = rng.integers(0, 16, (outputs, inputs))
    low, high = (1, 16) if kind.startswith("gptq") else (0, 15)  # GPTQ stores them less one
    zeros = rng.integers(0 if kind == "gptq-v2" else low, high, (inputs // group, outputs))
    scales = (rng.random((inputs // group, outputs)) * 0.02 + 0.002).astype(np.float16)
    owner = np.arange(inputs) // group
    if kind == "gptq-order":
        owner = rng.permutation(owner)
    matrix = np.empty(codes.shape)
    for k in range(inputs):
        matrix[:, k] = scales[owner[k]].astype(np.float64) * (codes[:, k] - zeros[owner[k]])
    made = {"scales": torch.from_numpy(scales)}
    if kind == "awq":
        made |= {"qweight": _words(codes.T, AWQ_PLACES), "qzeros": _words(zeros, AWQ_PLACES)}
    else:
        stored = zeros if kind == "gptq-v2" else zeros - 1
        made |= {"qweight": _words(codes).T.contiguous(), "qzeros": _words(stored)}
        made["g_idx"] = torch.from_numpy(owner.astype(np.int32))
    return made, matrix


def _nf4(weight: Any, rng: Any) -> tuple[dict[str, torch.Tensor], Any]:
    outputs, inputs = weight.shape
    codes = rng.integers(0, 16, outputs * inputs)
    blocks = codes.size // 64
    absmax, table = rng.integers(0, 256, blocks), np.sort(rng.random(256)).astype(np.float32)
    second = (rng.random(-(-blocks // 256)) * 0.1).astype(np.float32)
    scales = np.array([float(table[absmax[b]]) * float(second[b // 256]) + 0.125 for b in range(blocks)])
    levels = np.array(NF4, dtype=np.float32)
    matrix = np.array([float(levels[c]) * scales[i // 64] for i, c in enumerate(codes)]).reshape(outputs, inputs)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [outputs, inputs]}
    state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.125}
    return {
        "weight": torch.from_numpy((codes[0::2] * 16 + codes[1::2]).astype(np.uint8)).unsqueeze(1),
        "weight.absmax": torch.from_numpy(absmax.astype(np.uint8)),
        "weight.quant_map": torch.from_numpy(levels),
        "weight.nested_absmax": torch.from_numpy(second),
        "weight.nested_quant_map": torch.from_numpy(table),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }, matrix


def _write(source: Path, kind: str, target: Path) -> dict[str, Any]:
    """Turns the model in ``source`` into a checkpoint of ``kind``; returns the matrices that it stands for."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIGS[kind]}))
    rng, kept, matrices = np.random.default_rng(5), {}, {}
    for name, weight in load_file(target / "model.safetensors").items():
        if "layers" not in name or weight.ndim < 2:
            kept[name] = weight.half()
            continue
        path = name.removesuffix(".weight")
        made, matrices[path] = _nf4(weight, rng) if kind == "bnb" else _integer(kind, weight, rng)
        kept |= {f"{path}.{part}": tensor for part, tensor in made.items()}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return matrices


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_checkpoint_computes_what_its_numbers_say(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    matrices = _write(tiny_llama, kind, tmp_path / "q")
    model = read(tmp_path / "q")
    layers = quantised(model)
    assert layers.keys() == matrices.keys() and len(layers) == 14 and not model.training
    for path, matrix in matrices.items():
        made = layers[path].dequantised().numpy()
        np.testing.assert_allclose(made, matrix, rtol=3e-7, atol=1e-9 if kind != "bnb" else 1e-7)
        assert layers[path].scales.dtype == torch.float32
    plain = load(str(tiny_llama)).model
    plain.load_state_dict(
        {name: tensor.half().float() for name, tensor in plain.state_dict().items()}
        | {f"{path}.weight": torch.from_numpy(matrix).float() for path, matrix in matrices.items()}
    )
    with torch.no_grad():
        wanted = plain(IDS).logits
        torch.testing.assert_close(model(IDS).logits, wanted, rtol=1e-4, atol=1e-4)
        half = read(tmp_path / "q", torch.bfloat16)
        assert half.dtype == torch.bfloat16 and half(IDS).logits.dtype == torch.bfloat16
        assert all(layer.scales.dtype == torch.float32 for layer in quantised(half).values())


def test_settings_of_older_gptq_and_the_weights_of_several_files_are_found(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "q"
    matrices = _write(tiny_llama, "gptq", folder)
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "quant_method"}))
    tensors = load_file(folder / "model.safetensors")
    names, index = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2])):  # a layer's parts lie in both
        save_file({name: tensors[name] for name in part}, folder / f"model-{number}.safetensors")
        index |= dict.fromkeys(part, f"model-{number}.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    layers = quantised(read(folder))
    assert layers.keys() == matrices.keys()
    path = "model.layers.1.mlp.down_proj"
    np.testing.assert_allclose(layers[path].dequantised().numpy(), matrices[path], rtol=3e-7)


Tensors = dict[str, torch.Tensor]
PATH = "model.layers.0.mlp.up_proj"


def _fifteen(tensors: Tensors) -> None:
    tensors[f"{PATH}.qzeros"][0, 0] |= 0xF0


def _crowded(tensors: Tensors) -> None:
    tensors[f"{PATH}.g_idx"][0] = 1


BROKEN: dict[str, tuple[str, dict[str, Any], Callable[[Tensors], object], str]] = {
    "three bits": ("gptq", {"bits": 3}, lambda t: None, "quantised to 3 bits"),
    "group": ("awq", {"group_size": 0}, lambda t: None, "has groups of 0"),
    "wrong group": ("awq", {"group_size": 64}, lambda t: None, "scales are"),
    "marlin": ("gptq", {"checkpoint_format": "marlin"}, lambda t: None, "the format 'marlin'"),
    "gemv": ("awq", {"version": "gemv"}, lambda t: None, "version 'gemv'"),
    "another method": ("awq", {"quant_method": "aqlm"}, lambda t: None, "does not say .* quantised by gptq or awq"),
    "fp4": ("bnb", {"bnb_4bit_quant_type": "fp4"}, lambda t: None, "not to 4 bits of nf4"),
    "not it": ("gptq", {"quant_method": "bitsandbytes", **CONFIGS["bnb"]}, lambda t: None, "no weight.absmax"),
    "zero of 15": ("gptq", {}, _fifteen, f"{PATH}: it stores a zero of 15"),
    "crowded group": ("gptq", {}, _crowded, f"{PATH}: its g_idx does not put 32"),
    "no zeros": ("awq", {}, lambda t: t.pop(f"{PATH}.qzeros"), f"{PATH} lacks 'qzeros'"),
    "floats": ("awq", {}, lambda t: t.update({f"{PATH}.qweight": torch.ones(64, 16)}), "not a matrix of int32"),
    "no norm": ("awq", {}, lambda t: t.pop("model.norm.weight"), "missing, for instance model.norm.weight"),
    "absmax": ("bnb", {}, lambda t: t.update({f"{PATH}.weight.absmax": torch.ones(3)}), "do not fit together"),
}


@pytest.mark.parametrize("which", BROKEN)
def test_what_is_not_covered_or_does_not_fit_is_refused(which: str, tiny_llama: Path, tmp_path: Path) -> None:
    kind, settings, change, says = BROKEN[which]
    folder = tmp_path / "q"
    _write(tiny_llama, kind, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=says):
        read(folder)


def test_pickles_code_and_plain_models_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not say"):
        read(tiny_llama)
    folder = tmp_path / "q"
    _write(tiny_llama, "gptq", folder)
    (folder / "x.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="only safetensors are accepted"):
        read(folder)
    (folder / "x.bin").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"a": "b.c"}}))
    with pytest.raises(ValueError, match="runs code from the model"):
        read(folder)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="give the plain, unquantised"):
        load(str(folder))


def test_blocks_that_straddle_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="straddle the rows of 96"):
        layer(torch.zeros(96, dtype=torch.uint8), torch.ones(3), torch.tensor(NF4), (2, 96), 64)
    with pytest.raises(ValueError, match="not those of the matrix's shape"):
        layer(torch.zeros(64, dtype=torch.uint8), torch.ones(3), torch.tensor(NF4), (2, 64), 64)
    with pytest.raises(ValueError, match="do not fit together"):
        expand(torch.zeros(257, dtype=torch.uint8), torch.ones(256), torch.ones(1), 256, 0.0)


def test_each_of_the_second_scales_covers_its_256() -> None:
    table = torch.linspace(-1, 1, 256)
    made = expand(torch.full((513,), 255, dtype=torch.uint8), table, torch.tensor([1.0, 2.0, 3.0]), 256, 0.5)
    assert made.tolist() == [1.5] * 256 + [2.5] * 256 + [3.5]
