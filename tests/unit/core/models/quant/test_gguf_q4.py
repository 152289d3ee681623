"""Q4_1 as it lies in a GGUF file computes what transformers computes from the dequantised file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from core.models.load import load
from core.models.quant import gguf_q4
from core.models.quant.convert import quantised
from core.models.quant.linear import QuantLinear
from tests.gguf_file import KINDS, write_gguf

IDS = torch.tensor([[5, 17, 300, 42, 1000, 3, 77, 512, 8]])
DEAD = ("model.layers.1.self_attn.q_proj", 5, 32)


def _source(tiny_llama: Path, folder: Path) -> Path:
    """The tiny model with a block that is one constant, in a row of q that the format moves."""
    copy = folder / "source"
    shutil.copytree(tiny_llama, copy)
    weights = load_file(copy / "model.safetensors")
    name, row, start = DEAD
    weights[f"{name}.weight"][row, start : start + 32] = 0.125  # exact in float16
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.fixture(scope="module")
def file(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("q4")
    write_gguf(_source(tiny_llama, folder), folder / "tiny.gguf", KINDS)
    return folder / "tiny.gguf"


@pytest.fixture(scope="module")
def theirs(file: Path) -> Any:
    return load(str(file)).model


def test_logits_matrices_and_the_rest_are_those_of_transformers(file: Path, theirs: Any) -> None:
    model = gguf_q4.read(file, theirs.config)
    layers = quantised(model)
    assert len(layers) == 14 and not model.training
    assert {(layer.scheme, layer.group) for layer in layers.values()} == {("q4_1", 32)}
    for name, layer in layers.items():
        # D (q + M / D) instead of D q + M: two more roundings, of numbers below 16 D.
        torch.testing.assert_close(layer.dequantised(), theirs.get_submodule(name).weight, rtol=0, atol=1e-6)
    wanted = {k: v for k, v in theirs.state_dict().items() if k.removesuffix(".weight") not in layers}
    assert len(wanted) == 7 and all(torch.equal(model.state_dict()[key], value) for key, value in wanted.items())
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-4)


def test_scaling_keeps_the_zero_and_a_block_without_scale_stays_its_constant(file: Path, theirs: Any) -> None:
    name, row, start = DEAD
    layers = quantised(gguf_q4.read(file, theirs.config))
    layer: QuantLinear = layers[name]
    dead = [(key, *where) for key, one in layers.items() if one.fixed is not None for where in one.fixed.nonzero()]
    assert [(key, int(o), int(g) * 32) for key, o, g in dead] == [DEAD]
    before = layer.dequantised()
    assert (before[row, start : start + 32] == 0.125).all()
    with torch.no_grad():
        layer.scales.mul_(2)
    wanted = before * 2
    wanted[row, start : start + 32] = 0.125
    assert torch.equal(layer.dequantised(), wanted)  # twice a number is exact


def test_floats_beside_the_codes_are_read_and_held_in_the_dtype_asked_for(tiny_llama: Path, tmp_path: Path) -> None:
    mixed = {"blk.0.ffn_up": "Q8_0", "blk.0.attn_k": "F16", "blk.0.ffn_down": "F32"} | KINDS | {"output.": "Q4_1"}
    write_gguf(tiny_llama, tmp_path / "mixed.gguf", mixed)
    theirs = load(str(tmp_path / "mixed.gguf")).model
    model = gguf_q4.read(tmp_path / "mixed.gguf", theirs.config)
    assert len(quantised(model)) == 11
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-4)
        half = gguf_q4.read(tmp_path / "mixed.gguf", theirs.config, torch.bfloat16)
        assert half.dtype == torch.bfloat16 and half.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
        assert all(layer.scales.dtype == torch.float32 for layer in quantised(half).values())
        assert half(IDS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kinds", "changed", "says"),
    [
        ({}, {}, "no Q4_1 matrices"),
        ({"blk.": "Q5_0"}, {}, "type 6; read are Q4_1"),
        (KINDS, {"vocab_size": 512}, "not a weight of the model"),
        (KINDS, {"intermediate_size": 64}, "is not a linear layer of"),
        (KINDS, {"num_attention_heads": 5}, "does not divide into 5 heads"),
        (KINDS, {"num_hidden_layers": 3}, "are missing, for instance model.layers.2"),
    ],
)
def test_files_that_are_not_this_model_are_refused(
    kinds: dict[str, str], changed: dict[str, int], says: str, tiny_llama: Path, tmp_path: Path
) -> None:
    write_gguf(tiny_llama, tmp_path / "a.gguf", kinds)
    config = AutoConfig.from_pretrained(tiny_llama)
    for key, value in changed.items():
        setattr(config, key, value)
    with pytest.raises(ValueError, match=rf"a\.gguf cannot be read as a 4-bit model: .*{says}"):
        gguf_q4.read(tmp_path / "a.gguf", config)


def test_another_architecture_is_refused(file: Path, theirs: Any, tmp_path: Path) -> None:
    data = file.read_bytes()
    assert data.count(b"\x05\0\0\0\0\0\0\0llama") == 1
    (tmp_path / "q.gguf").write_bytes(data.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0qwen2"))
    with pytest.raises(ValueError, match="architecture llama, not qwen2"):
        gguf_q4.read(tmp_path / "q.gguf", theirs.config)


@pytest.mark.slow
def test_smollm2_straight_from_the_catalogs_file() -> None:
    """It earns its minute: 210 real matrices, grouped-query heads of three, and a tied embedding in Q8_0."""
    theirs = load("smollm2-135m-instruct")
    model = load("smollm2-135m-instruct", quant="q4_1").model
    layers = quantised(model)
    assert len(layers) == 210 and all(layer.fixed is None for layer in layers.values())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, theirs.model.lm_head.weight)
    for name, layer in layers.items():
        torch.testing.assert_close(layer.dequantised(), theirs.model.get_submodule(name).weight, rtol=0, atol=1e-6)
    text = "The lighthouse keeper counted the invoices from March while everyone slept."
    ids = theirs.tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs.model(ids).logits, rtol=0, atol=1e-4)
