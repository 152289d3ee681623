"""Sites point at what each family really computes: proven on forwards, not on names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers import models as families

from core.models.load import load
from core.models.sites import FAMILIES, SITES, blocks, final_norm, site_modules

_SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def small(kind: str) -> PretrainedConfig:
    """A small configuration of a family."""
    if kind == "gpt2":
        return families.gpt2.GPT2Config(
            vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
        )
    if kind == "gemma3":
        text = families.gemma3.Gemma3TextConfig(**_SMALL).to_dict()
        vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        vision |= {"image_size": 28, "patch_size": 14}
        return families.gemma3.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    config = families.auto.configuration_auto.CONFIG_MAPPING[kind]
    known = {key: value for key, value in _SMALL.items() if key != "head_dim" or kind not in ("gpt_neox", "phi")}
    return config(**known)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(small(request.param)).eval()


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def capture(model: nn.Module, modules: list[nn.Module]) -> list[torch.Tensor]:
    """The outputs of some modules in one forward."""
    seen: list[torch.Tensor] = []
    handles = [module.register_forward_hook(lambda _m, _i, out: seen.append(first(out))) for module in modules]
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 9, 4, 7, 5]]))
    for handle in handles:
        handle.remove()
    return seen


def test_block_outputs_are_the_hidden_states(model: Any) -> None:
    seen = capture(model, blocks(model))
    with torch.no_grad():
        hidden = model(input_ids=torch.tensor([[3, 9, 4, 7, 5]]), output_hidden_states=True).hidden_states
    assert len(seen) == 3
    for mine, theirs in zip(seen[:-1], hidden[1:-1], strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(final_norm(model)(seen[-1]), hidden[-1])


@pytest.mark.parametrize("site", SITES)
def test_every_site_has_one_module_a_block_with_the_models_width(model: Any, site: str) -> None:
    modules = site_modules(model, site)
    assert len(modules) == 3
    assert [tuple(value.shape) for value in capture(model, modules)] == [(1, 5, 32)] * 3


@pytest.mark.parametrize("site", SITES)
def test_a_change_at_a_site_changes_the_logits(model: Any, site: str) -> None:
    ids = torch.tensor([[3, 9, 4, 7, 5]])

    def shift(_module: nn.Module, _args: Any, output: Any) -> Any:
        # along one axis: a norm behind the site would swallow an equal shift of all
        changed = first(output).clone()
        changed[..., 0] += 1
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    with torch.no_grad():
        before = model(input_ids=ids).logits
        handle = site_modules(model, site)[1].register_forward_hook(shift)
        after = model(input_ids=ids).logits
        handle.remove()
    assert (after - before).abs().max() > 1e-4


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning")
def test_a_peft_model_has_the_sites_of_its_base() -> None:
    from peft import LoraConfig, get_peft_model

    base = load("tiny-llama").model
    plain = {site: site_modules(base, site) for site in SITES}
    norm = final_norm(base)
    wrapped = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert {site: site_modules(wrapped, site) for site in SITES} == plain
    assert final_norm(wrapped) is norm


def test_unknown_sites_and_families_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match="block, attention, mlp"):
        site_modules(load("tiny-llama").model, "residual")
    with pytest.raises(ValueError, match=r"'Linear' is not supported.*llama"):
        blocks(nn.Linear(2, 2))


def test_the_policy_lets_in_what_the_sites_know() -> None:
    from core.models.policy import ARCHITECTURES

    assert set(FAMILIES) == ARCHITECTURES - {"siglip_vision_model"}
