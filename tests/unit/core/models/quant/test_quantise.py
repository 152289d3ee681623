"""int4 and NF4 against loops in float64, and what a conversion of a model touches."""

from __future__ import annotations

from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from core.models.load import load
from core.models.quant.convert import dequantise_model, linears, quantise_model, quantised
from core.models.quant.packing import unpack
from core.models.quant.quantise import NF4, quantise
from tests.oracles import quantised as oracle

IDS = torch.tensor([[5, 17, 300, 42, 1000, 3, 77]])


def _weight(outputs: int, inputs: int) -> torch.Tensor:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(3)) * 0.05
    weight[1, :32] = 0
    return weight


def _codes(made: Any) -> Any:
    return unpack(made.codes, made.in_features).numpy()


@pytest.mark.parametrize(("inputs", "group"), [(64, 32), (100, 32), (576, 64), (300, 128), (45, 64)])
def test_int4_is_the_nearest_code_of_its_grid(inputs: int, group: int) -> None:
    weight = _weight(6, inputs)
    made = quantise(weight, "int4", group)
    codes, scales, slack = oracle.int4(weight.double().numpy(), group)
    np.testing.assert_allclose(made.scales.numpy(), scales, rtol=2e-7)
    clear = slack > 1e-5  # nearer to a tie the rounding of float32 decides: at +-7.5, the largest of each group
    assert clear.mean() > 0.96 - 1 / group and np.array_equal(_codes(made)[clear], codes[clear])
    error = (made.dequantised() - weight).abs().numpy()
    assert (error <= scales.repeat(group, axis=1)[:, :inputs] / 2 * (1 + 1e-5)).all()
    assert codes.min() <= 1 and codes.max() == 15


@pytest.mark.parametrize(("scheme", "inputs"), [("int4", 100), ("nf4", 128)])
def test_some_rows_at_a_time_give_the_same_bits(scheme: str, inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = _weight(7, inputs)
    whole = quantise(weight, scheme)
    monkeypatch.setattr("core.models.quant.quantise.TILE", 3 * inputs)
    pieces = quantise(weight, scheme)
    assert all(torch.equal(tensor, pieces.state_dict()[name]) for name, tensor in whole.state_dict().items())
    weight[6, 5] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        quantise(weight, scheme)


def test_int4_rounds_ties_to_even_and_stays_within_its_codes() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :6] = torch.tensor([7.5, -7.5, 0.5, 1.5, -0.5, -1.5])
    assert _codes(quantise(weight, "int4", 32))[0, :7].tolist() == [15, 0, 8, 10, 8, 6, 8]


@pytest.mark.parametrize("inputs", [64, 100, 576])
def test_nf4_is_the_nearest_of_the_published_levels(inputs: int) -> None:
    weight = _weight(6, inputs)
    made = quantise(weight, "nf4")
    codes, scales, slack = oracle.nearest(weight.double().numpy(), 64, np.array(NF4))
    np.testing.assert_array_equal(made.scales.numpy(), scales.astype(np.float32))
    clear = slack > 1e-6
    assert clear.mean() > 0.99 and np.array_equal(_codes(made)[clear], codes[clear])


def test_the_levels_are_quantiles_of_the_normal_distribution() -> None:
    """The construction of QLoRA's appendix: 8 levels above 0, 7 below it, both ends at 1."""
    inverse, offset = NormalDist().inv_cdf, 0.9677083
    above = [inverse(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-inverse(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    levels = np.array(sorted([*above, 0.0, *below])) / max(above)
    np.testing.assert_allclose(NF4, levels, atol=1e-6)


def test_a_group_of_zeros_stays_zero_whatever_its_scale() -> None:
    for scheme, group in (("int4", 32), ("nf4", 64)):
        weight = _weight(4, 128)
        weight[1, :64] = 0
        made = quantise(weight, scheme, group)
        assert made.fixed is not None and made.fixed.any(1).tolist() == [False, True, False, False]
        assert not made.dequantised()[1, :64].any()
        with torch.no_grad():
            made.scales.add_(1.0)
        assert not made.dequantised()[1, :64].any() and torch.isfinite(made.dequantised()).all()


def test_tiny_and_huge_values_quantise_without_nan() -> None:
    for size in (1e-44, 1e-38, 1e37):
        made = quantise(torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * size, "int4")
        assert torch.isfinite(made.dequantised()).all() and torch.isfinite(made.scales).all()


@pytest.mark.parametrize(
    ("scheme", "group", "says"), [("int3", 64, "int4 or nf4"), ("int4", 48, "32, 64 or 128"), ("nf4", 32, "give 64")]
)
def test_what_there_is_not_is_refused(scheme: str, group: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        quantise(torch.ones(2, 64), scheme, group)
    with pytest.raises(ValueError, match=says):
        quantise_model(nn.Linear(2, 2), scheme, group)


def test_a_matrix_that_is_not_finite_is_refused_by_name(tiny_llama: Path) -> None:
    model = load(str(tiny_llama)).model
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: .*not finite"):
        quantise_model(model, "int4")


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen3", "tiny-gemma3"])
@pytest.mark.parametrize("scheme", ["int4", "nf4"])
def test_a_model_keeps_embeddings_head_and_norms_and_computes_with_the_rest(name: str, scheme: str) -> None:
    model, exact = load(name).model, load(name).model
    wanted = [path for path, module in exact.named_modules() if type(module) is nn.Linear and path != "lm_head"]
    made = quantise_model(model, scheme)
    assert list(made) == wanted and len(wanted) == 14
    assert list(quantised(model)) == wanted and all(layer.scheme == scheme for layer in made.values())
    kept = {key: value for key, value in exact.state_dict().items() if key.removesuffix(".weight") not in made}
    assert all(torch.equal(model.state_dict()[key], value) for key, value in kept.items())
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    assert (ends[0].weight is ends[1].weight) == exact.config.tie_word_embeddings
    with torch.no_grad():
        logits = model(IDS).logits
        for path, layer in made.items():
            exact.get_submodule(path).weight.copy_(layer.dequantised())
        torch.testing.assert_close(logits, exact(IDS).logits, rtol=0, atol=2e-5)
        dequantise_model(model)
        assert not quantised(model) and torch.equal(model(IDS).logits, exact(IDS).logits)


def test_first_order_steps_on_the_scales_lower_the_loss_and_move_nothing_else() -> None:
    model = load("tiny-llama").model.requires_grad_(False)
    made = quantise_model(model, "int4", 32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.endswith("scales")}
    scales = [layer.scales.requires_grad_() for layer in made.values()]
    assert [p.shape for p in model.parameters() if p.requires_grad] == [p.shape for p in scales]
    optimizer = torch.optim.SGD(scales, lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_models_that_cannot_be_quantised_are_refused() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    adapted = get_peft_model(load("tiny-llama").model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="carries an adapter"):
        linears(adapted)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64))
    with pytest.raises(ValueError, match="no linear layers"):
        quantise_model(gpt2, "int4")
    done = load("tiny-llama").model
    quantise_model(done, "int4")
    with pytest.raises(ValueError, match="no linear layers left"):
        quantise_model(done, "int4")
