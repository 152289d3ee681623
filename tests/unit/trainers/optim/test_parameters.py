"""Which parameters are projected and which keep all their state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from core.models.load import load
from trainers.optim import split_parameters


def _roles(model: nn.Module, **settings: bool) -> dict[str, str]:
    groups = split_parameters(model, **settings)  # type: ignore[arg-type]
    listed = [p for group in groups for p in group["params"]]
    assert len(set(listed)) == len(listed)
    assert all(len(group["params"]) == len(group["names"]) for group in groups)
    return {name: group["role"] for group in groups for name in group["names"]}


def test_linear_layers_of_blocks_are_projected_and_nothing_else(tiny_llama: object) -> None:
    model = load("tiny-llama").model
    roles = _roles(model)
    assert roles.keys() == dict(model.named_parameters()).keys()
    wanted = {name for name in roles if name.endswith("_proj.weight")}
    assert len(wanted) == 14
    assert {name for name, role in roles.items() if role == "projected"} == wanted


class Toy(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(10, 4)
        self.attn = nn.ModuleDict({"query": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
        self.mlp = nn.Conv2d(4, 4, 3)
        self.other = nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 10, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight


def test_each_kind_can_be_moved() -> None:
    roles = _roles(Toy(False))
    assert {name for name, role in roles.items() if role == "projected"} == {"attn.query.weight", "mlp.weight"}
    for settings, more in (
        ({"embeddings": True}, {"embed_tokens.weight"}),
        ({"norms": True}, {"attn.norm.weight", "attn.norm.bias"}),
        ({"head": True}, {"lm_head.weight"}),
    ):
        now = _roles(Toy(False), **settings)
        assert {name for name in now if now[name] != roles[name]} == more


def test_a_tied_weight_is_one_and_an_embedding() -> None:
    for head in (False, True):
        roles = _roles(Toy(True), head=head)
        assert "lm_head.weight" not in roles
        assert roles["embed_tokens.weight"] == "full"


def test_frozen_parameters_are_left_out_and_vectors_are_not_decayed() -> None:
    model = Toy(False)
    model.embed_tokens.requires_grad_(False)
    groups = split_parameters(model)
    assert "embed_tokens.weight" not in {name for group in groups for name in group["names"]}
    for group in groups:
        vectors = [p.dim() < 2 for p in group["params"]]
        assert all(vectors) if group.get("weight_decay") == 0.0 else not any(vectors)


def test_a_name_that_nothing_has_lists_what_there_is() -> None:
    with pytest.raises(ValueError, match="linear layers lm_head, other, query"):
        split_parameters(Toy(False), project=("nonsense",))


def test_the_package_imports_torch_alone() -> None:
    import subprocess
    import sys

    code = (
        "import sys, trainers.optim\n"
        "heavy = {'numpy', 'transformers', 'accelerate', 'core', 'yaml'} & sys.modules.keys()\n"
        "import torch; known = {'numpy'} if 'numpy' in sys.modules else set()\n"
        "assert heavy <= known, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert torch.__version__


def test_a_convolution_in_one_dimension_is_no_stack_of_experts() -> None:
    model = nn.ModuleDict({"mlp": nn.Sequential(nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, 3), nn.Linear(6, 6))})
    roles = {name: group["role"] for group in split_parameters(model) for name in group["names"]}
    weights = {name: role for name, role in roles.items() if name.endswith("weight")}
    assert weights == {"mlp.0.weight": "full", "mlp.1.weight": "projected", "mlp.2.weight": "projected"}
