"""bitsandbytes' own layers, taken over: the matrices it would compute with, and scales that can be tuned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from core.models.load import load
from core.models.quant.checkpoints import read
from core.models.quant.convert import quantise_model, quantised
from core.models.quant.quantise import NF4

pytestmark = pytest.mark.bnb

IDS = torch.tensor([[5, 17, 300, 42, 1000, 3, 77]])


def _matrices(model: Any) -> dict[str, torch.Tensor]:
    import bitsandbytes

    return {
        name: bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        for name, module in model.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    }


def test_layers_of_a_loaded_base_keep_their_matrices_and_get_scales_of_32_bits() -> None:
    from core.models.quant import bnb

    model = load("tiny-llama", quant="bnb-nf4").model
    wanted = _matrices(model)
    with torch.no_grad():
        logits = model(IDS).logits
    made = bnb.convert(model)
    assert made.keys() == wanted.keys() and len(made) == 14 and quantised(model).keys() == made.keys()
    for name, one in made.items():
        # Expanding the second quantisation takes one rounding more or less than the library's kernel.
        torch.testing.assert_close(one.dequantised(), wanted[name], rtol=3e-7, atol=0)
        assert one.scales.dtype == torch.float32 and one.table.tolist() == list(NF4)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, logits, rtol=0, atol=2e-5)
    before = made["model.layers.0.mlp.up_proj"].dequantised()
    with torch.no_grad():
        made["model.layers.0.mlp.up_proj"].scales.mul_(1 + 2**-16)  # 256 times finer than bfloat16
    assert (made["model.layers.0.mlp.up_proj"].dequantised() != before).float().mean() > 0.8


def test_without_double_quantisation_it_is_our_own_nf4() -> None:
    import bitsandbytes

    from core.models.quant import bnb

    exact = load("tiny-llama").model
    holder = torch.nn.Module()
    linear = exact.model.layers[0].mlp.up_proj
    data = bitsandbytes.nn.Params4bit(linear.weight.data.clone(), quant_type="nf4", compress_statistics=False)
    holder.one = bitsandbytes.nn.Linear4bit(64, 128, bias=False, quant_type="nf4")
    holder.one.weight = data
    holder.to("cpu")
    theirs = bnb.convert(holder)["one"]
    ours = quantise_model(exact, "nf4")["model.layers.0.mlp.up_proj"]
    assert torch.equal(theirs.scales, ours.scales)
    assert (theirs.dequantised() != ours.dequantised()).float().mean() < 1e-3  # a value in the middle of two levels


def test_a_layer_that_was_repacked_is_refused() -> None:
    from core.models.quant import bnb

    model = load("tiny-llama", quant="bnb-nf4").model
    model.model.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj: bitsandbytes has repacked the layer"):
        bnb.convert(model)


def test_what_transformers_saves_is_read_back_without_the_library(tmp_path: Path) -> None:
    loaded = load("tiny-llama", quant="bnb-nf4")
    wanted = _matrices(loaded.model)
    loaded.model.save_pretrained(tmp_path / "q")
    layers = quantised(read(tmp_path / "q"))
    assert layers.keys() == wanted.keys()
    for name, one in layers.items():
        torch.testing.assert_close(one.dequantised(), wanted[name], rtol=3e-7, atol=0)
