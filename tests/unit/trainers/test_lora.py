"""LoRA's defining properties: the base stays, the update has its rank and its scale, B starts at zero."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from core.models.load import load
from core.models.save import save_merged
from trainers.method import TrainContext
from trainers.registry import METHODS

CONTEXT = TrainContext(learning_rate=1e-3, seed=0, activation_checkpointing=False, mean=float)


def _attach(**settings: Any) -> Any:
    torch.manual_seed(0)
    method = METHODS["lora"]
    return method.attach(load("tiny-llama").model, method.config(**settings), CONTEXT)


def test_starts_as_the_base_model() -> None:
    ids = torch.tensor([[5, 9, 11, 30]])
    with torch.no_grad():
        expected = load("tiny-llama").model(input_ids=ids).logits
        assert torch.equal(_attach().model.eval()(input_ids=ids).logits, expected)


def test_the_base_stays_bitwise_and_the_update_has_at_most_its_rank(train: Any) -> None:
    result = train({"name": "lora", "rank": 3}, max_steps=5, learning_rate=1e-2)
    tuned = load("tiny-llama", adapter=result.output / "artifact").model
    base = dict(load("tiny-llama").model.named_parameters())
    updates = 0
    for name, module in tuned.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            assert torch.equal(module.base_layer.weight, base[f"{name}.weight"])
            delta = module.get_delta_weight("default").detach()
            assert int(torch.linalg.matrix_rank(delta.double(), rtol=1e-5)) == 3
            updates += 1
    assert updates == 14, "seven linear layers in each of two blocks"


@pytest.mark.parametrize(("rslora", "scale"), [(False, 16 / 4), (True, 16 / math.sqrt(4))])
def test_the_scale_of_the_update(rslora: bool, scale: float) -> None:
    model = _attach(rank=4, alpha=16.0, rslora=rslora).model
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        b.normal_()
    assert torch.allclose(layer.get_delta_weight("default"), scale * (b @ a), atol=1e-6)


def test_dora_learns_the_magnitude_and_keeps_the_direction_at_the_start() -> None:
    model = _attach(dora=True).model
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    magnitude = layer.lora_magnitude_vector["default"].weight
    assert magnitude.requires_grad
    assert torch.allclose(magnitude, layer.base_layer.weight.norm(dim=1), rtol=1e-5)


def test_lora_plus_gives_b_its_own_rate(train: Any) -> None:
    attached = _attach(lora_plus_ratio=16.0)
    names = {id(p): name for name, p in attached.model.named_parameters()}
    slow, fast = attached.optimizer.param_groups
    assert slow["lr"] == 1e-3
    assert fast["lr"] == pytest.approx(1.6e-2)
    assert all(".lora_B." in names[id(p)] for p in fast["params"])
    assert not any(".lora_B." in names[id(p)] for p in slow["params"])
    # The schedule scales both.
    result = train({"name": "lora", "lora_plus_ratio": 16.0}, max_steps=4, warmup_ratio=0.0)
    groups = result.checkpoint.state["optimizer"]["tree"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([2e-3 / 4, 3.2e-2 / 4])


def test_targets_choose_the_modules(train: Any) -> None:
    result = train({"name": "lora", "targets": ["q_proj", "v_proj"]}, max_steps=1)
    assert {name.split(".")[-4] for name in result.weights} == {"q_proj", "v_proj"}
    config = json.loads((result.output / "artifact" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    assert config["base_model_name_or_path"] == "tiny-llama"


def test_a_target_that_is_not_there_is_told_what_is() -> None:
    with pytest.raises(ValueError, match=r"'query'.*down_proj.*q_proj"):
        _attach(targets=("query",))


@pytest.mark.parametrize("variant", [{}, {"rslora": True}, {"dora": True}, {"targets": ("q_proj", "down_proj")}])
def test_merged_equals_adapter(variant: dict[str, Any], train: Any, tmp_path: Path) -> None:
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in variant.items()}
    result = train({"name": "lora", **settings}, max_steps=4, learning_rate=1e-2)
    tuned = load("tiny-llama", adapter=result.output / "artifact")
    save_merged(tuned.model, tuned.tokenizer, tmp_path / "merged", card={"base": "tiny-llama"})
    merged = load(str(tmp_path / "merged")).model
    ids = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = tuned.model(input_ids=ids).logits, merged(input_ids=ids).logits
        base = load("tiny-llama").model(input_ids=ids).logits
    assert float((one - other).abs().max()) <= 1e-4
    assert float((one - base).abs().max()) > 1e-2


def test_settings_out_of_range_are_refused() -> None:
    bad: list[dict[str, Any]] = [
        {"rank": 0},
        {"alpha": 0.0},
        {"dropout": 1.0},
        {"targets": ()},
        {"targets": ("all-linear", "q_proj")},
        {"lora_plus_ratio": 0.0},
        {"weight_decay": -1.0},
    ]
    for settings in bad:
        with pytest.raises(ValueError, match=next(iter(settings))):
            METHODS["lora"].config(**settings)


def test_a_four_bit_base_without_bitsandbytes_says_what_to_install(train: Any) -> None:
    pytest.importorskip("core.models.load")
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is not None:
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(ValueError, match="bnb"):
        train({"name": "lora", "base": "bnb-nf4"}, max_steps=1)
