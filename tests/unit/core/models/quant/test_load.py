"""A 4-bit base through the one door for models: quantised while it is read, or as a GGUF file has it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from core.models.load import load
from core.models.quant import scales, streamed
from core.models.quant.convert import quantise_model, quantised
from core.models.quant.scales import describe
from tests.gguf_file import KINDS, write_gguf

IDS = torch.tensor([[5, 17, 300, 42, 1000, 3, 77]])


def _same(one: Any, other: Any) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]) and tensor.dtype == second[name].dtype, name
    with torch.no_grad():
        assert torch.equal(one(IDS).logits, other(IDS).logits)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen3", "tiny-gemma3"])
@pytest.mark.parametrize(("scheme", "group"), [("int4", 32), ("nf4", 64)])
def test_reading_quantises_as_converting_does_and_never_loads_the_floats(
    name: str, scheme: Any, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = load(name)
    quantise_model(exact.model, scheme, group)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    loaded = load(name, quant=scheme, group=group)
    assert loaded.fingerprint == exact.fingerprint and not loaded.model.training
    assert loaded.model.generation_config.eos_token_id == exact.model.generation_config.eos_token_id
    assert loaded.model.config._attn_implementation == exact.model.config._attn_implementation
    _same(loaded.model, exact.model)


def test_codes_are_the_same_whatever_dtype_the_rest_is_held_in(tmp_path: Path) -> None:
    wide, half = load("tiny-llama", quant="int4"), load("tiny-llama", quant="int4", dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    layers = quantised(half.model)
    assert describe(layers) == describe(quantised(wide.model))
    assert scales.digest(layers) == scales.digest(quantised(wide.model))
    with torch.no_grad():
        assert half.model(IDS).logits.dtype == torch.bfloat16
        difference = (half.model(IDS).logits.float() - wide.model(IDS).logits).norm()
        assert difference < 0.03 * wide.model(IDS).logits.norm()


def test_every_matrix_is_read_into_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    read, places = streamed._read, []

    def watched(file: Path, info: Any, into: Any = None) -> torch.Tensor:
        tensor = read(file, info, into)
        places.append((info.shape, tensor.data_ptr()))
        return tensor

    monkeypatch.setattr(streamed, "_read", watched)
    load("tiny-llama", quant="int4")
    inside = [place for shape, place in places if len(shape) == 2 and shape[0] < 1024]
    assert len(inside) == 14 and len(set(inside)) == 1 and len(places) == 21


def test_files_with_other_or_more_names_take_the_long_way(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(load("tiny-qwen3").directory, folder)
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    for other in (bare, tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}):
        save_file(other, folder / "model.safetensors", metadata={"format": "pt"})
        assert streamed.load(folder, "int4", 64, torch.float32) is None
        _same(load(str(folder), quant="int4").model, load("tiny-qwen3", quant="int4").model)


def test_biases_and_settings_for_generation_come_along(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_llama, folder)
    config = AutoConfig.from_pretrained(tiny_llama)
    config.attention_bias = True
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder)
    quantise_model(model, "int4")
    loaded = load(str(folder), quant="int4").model
    assert len([name for name in loaded.state_dict() if name.endswith("_proj.bias")]) == 8
    assert loaded.generation_config.max_new_tokens == 7
    _same(loaded, model.eval())


def test_a_gguf_file_is_loaded_with_its_own_codes(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(tiny_llama, file, KINDS)
    exact, loaded = load(str(file)), load(str(file), quant="q4_1")
    assert len(quantised(loaded.model)) == 14 and loaded.fingerprint == exact.fingerprint
    assert loaded.tokenizer("a b").input_ids == exact.tokenizer("a b").input_ids
    assert loaded.model.generation_config.eos_token_id == exact.model.generation_config.eos_token_id
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(IDS).logits, exact.model(IDS).logits, rtol=0, atol=1e-4)


def test_it_generates_and_can_be_quantised_without_memory() -> None:
    model = load("tiny-llama", quant="int4").model
    made = model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert made.shape == (1, 11)
    config = AutoConfig.from_pretrained(load("tiny-llama").directory)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
        layers = quantise_model(empty, "int4")
    assert {name: layer.scales.shape for name, layer in layers.items()} == {
        name: layer.scales.shape for name, layer in quantised(model).items()
    }
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_what_cannot_be_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give none, bnb-nf4, int4, nf4, q4_1"):
        load("tiny-llama", quant="int3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="int4 has no groups of 48"):
        load("tiny-llama", quant="int4", group=48)
    with pytest.raises(ValueError, match="adapter cannot be put on a base of int4"):
        load("tiny-llama", quant="int4", adapter=tmp_path)
    for reference in ("tiny-llama", str(tiny_llama)):
        with pytest.raises(ValueError, match=r"no GGUF file, from which alone q4_1 is read"):
            load(reference, quant="q4_1")
    folder = tmp_path / "m"
    shutil.copytree(tiny_llama, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj: .*not finite"):
        load(str(folder), quant="nf4")
