"""The job's side of FRUGAL: which parameter gets which treatment, and what is refused before a run begins."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from core.models.load import load
from trainers.method import TrainContext
from trainers.registry import METHODS

CONTEXT = TrainContext(learning_rate=1e-3, seed=3, activation_checkpointing=False, mean=float)


def _groups(**settings: Any) -> tuple[Any, dict[str, dict[str, Any]]]:
    method = METHODS["frugal"]
    attached = method.attach(load("tiny-llama").model, method.config(**settings), CONTEXT)
    return attached, {name: group for group in attached.optimizer.param_groups for name in group["names"]}


def test_settings_reach_the_optimizer(tiny_llama: object) -> None:
    attached, groups = _groups(density=0.5, split="rows", beta2=0.9, epsilon=1e-6, weight_decay=0.1, free_lr_scale=0.2)
    assert groups.keys() == dict(attached.model.named_parameters()).keys()
    for name, group in groups.items():
        assert group["role"] == ("projected" if name.endswith("_proj.weight") else "full")
        assert group["weight_decay"] == (0.0 if "norm" in name else 0.1)
        wanted = {"lr": 1e-3, "seed": 3, "density": 0.5, "split": "rows", "betas": (0.9, 0.9), "eps": 1e-6}
        assert {key: group[key] for key in wanted} == wanted
        assert group["free_lr_scale"] == 0.2


def test_the_glue_recipe_has_state_in_few_places(tiny_llama: object) -> None:
    """Columns of query and value; the sign for every other layer; embeddings frozen, norms trained."""
    attached, groups = _groups(
        targets=("q_proj", "v_proj"), signed=("k_proj", "o_proj", "mlp"), embeddings="frozen", density=0.25
    )
    frozen = {name for name, p in attached.model.named_parameters() if not p.requires_grad}
    assert frozen
    assert all("embed" in name for name in frozen)
    assert not frozen & groups.keys()
    before = {name: p.detach().clone() for name, p in attached.model.named_parameters()}
    attached.model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    attached.optimizer.step()
    for name, p in attached.model.named_parameters():
        state = attached.optimizer.state.get(p, {})
        assert torch.equal(p, before[name]) == (name in frozen), name
        kept = any(part in name for part in ("q_proj", "v_proj", "norm", "lm_head"))
        assert ("exp_avg" in state) == kept, name


def test_whole_matrices_and_norms_can_take_turns(tiny_llama: object) -> None:
    _, groups = _groups(split="block", norms="projected", head="projected", embeddings="projected")
    assert {group["role"] for group in groups.values()} == {"projected"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta1": 1.0}, "beta1"),
        ({"density": 2.0}, "density"),
        ({"norms": "projected"}, "only split: block"),
        ({"split": "svd", "select": "top"}, "select"),
        ({"density_end": 0.1}, "go together"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        METHODS["frugal"].config(**settings)


def test_a_layer_that_is_not_there_is_named(tiny_llama: object) -> None:
    with pytest.raises(ValueError, match="linear layers"):
        _groups(targets=("nonsense",))


def test_settings_without_effect_warn() -> None:
    config = METHODS["frugal"].config
    assert config().warnings() == []
    for settings in ({"side": "left"}, {"order": "mirror"}, {"block_columns": 8}, {"momentum": 0.5}):
        assert next(iter(settings)) in config(**settings).warnings()[0]
    assert config(split="svd", side="left").warnings() == []
    for settings, idle in (
        ({"full": "lion", "epsilon": 1e-6}, ["epsilon"]),
        ({"full": "sgdm", "beta1": 0.5, "epsilon": 1e-6}, ["beta1", "epsilon"]),
        ({"free": "none", "free_lr_scale": 0.5}, ["free_lr_scale"]),
        ({"density": 0.0, "split": "rows", "moments": "int8"}, ["split", "moments"]),
        ({"density": 1.0, "update_gap": 5, "free": "sgd"}, ["free", "update_gap"]),
        ({"targets": ("q_proj", "mlp"), "signed": ("q_proj",)}, ["q_proj"]),
        ({"density": 0.0, "density_end": 0.5, "decay_steps": 9, "split": "rows"}, []),
        ({"density": 1.0, "signed": ("mlp",), "free": "sgd"}, []),
        ({"full": "lion", "beta1": 0.5}, []),
    ):
        warned = config(**settings).warnings()  # type: ignore[arg-type]
        assert [line.split()[0] for line in warned] == idle, settings
