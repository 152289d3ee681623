"""What is planned against what a real run holds, for the parts that can be counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from core.models.load import load
from trainers.memory import plan
from trainers.method import TrainContext
from trainers.registry import METHODS

CONTEXT = TrainContext(learning_rate=1e-3, seed=0, activation_checkpointing=False, mean=float)


@pytest.mark.parametrize(
    "method",
    [
        {"name": "full"},
        {"name": "lora"},
        {"name": "lora", "dora": True},
        {"name": "lora", "targets": ["q_proj"]},
        {"name": "frugal"},
        {"name": "frugal", "density": 0.0},
        {"name": "frugal", "split": "rows", "moments": "int8"},
        {"name": "frugal", "split": "randk", "embeddings": "frozen"},
        {"name": "frugal", "split": "svd", "signed": ["k_proj", "mlp"]},
        {"name": "frugal", "split": "block", "norms": "projected", "head": "projected"},
        {"name": "galore"},
        {"name": "dct_adamw"},
        {"name": "dct_adamw", "rank": 8, "feedback": "4bit", "ages": True, "basis": "learned"},
        {"name": "trion", "density": 0.25},
        {"name": "muon"},
    ],
    ids=str,
)
def test_weights_gradients_and_optimizer_are_counted_exactly(method: dict[str, Any], make_run: Any) -> None:
    run = make_run(method)
    planned = plan(run)
    model, optimizer, _ = run.method.attach(load("tiny-llama").model, run.settings, CONTEXT)
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    optimizer.step()

    def size(tensors: Any) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    state = [v for values in optimizer.state.values() for v in values.values() if torch.is_tensor(v)]
    assert planned.weights == pytest.approx(size(model.parameters()), rel=0.01)
    assert planned.gradients == pytest.approx(size(gradients), rel=0.01)
    assert planned.optimizer == pytest.approx(size(state), rel=0.01)
    assert planned.trained_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_activation_checkpointing_and_shorter_rows_take_less(make_run: Any) -> None:
    plain = plan(make_run("full"))
    assert plan(make_run("full", activation_checkpointing=True)).activations < plain.activations
    halved = plan(make_run("full", max_length=64))
    assert (2 * halved.activations, 2 * halved.logits) == (plain.activations, plain.logits)
    parts = (plain.weights, plain.gradients, plain.optimizer, plain.activations, plain.logits, plain.runtime)
    assert plain.total == sum(parts)


def test_a_four_bit_base_is_planned_as_one(make_run: Any) -> None:
    plain, four = plan(make_run("lora")), plan(make_run({"name": "lora", "base": "bnb-nf4"}))
    linear = [m.weight.numel() for m in load("tiny-llama").model.model.modules() if isinstance(m, torch.nn.Linear)]
    tables = 4 * (16 + 256 + 1)
    saved = sum(weights * (4 - 4.127 / 8) - tables for weights in linear)
    assert plain.weights - four.weights == pytest.approx(saved, rel=0.001)


@pytest.mark.parametrize(("restore", "copies"), [("copy", 1), ("additive", 0)])
def test_without_gradients_the_copy_is_counted(restore: str, copies: int, make_run: Any) -> None:
    run = make_run({"name": "mezo", "restore": restore})
    planned = plan(run)
    loaded = load("tiny-llama")
    model, optimizer, _ = run.method.attach(loaded.model, run.settings, CONTEXT)
    optimizer.step(lambda: model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    state = [v for values in optimizer.state.values() for v in values.values() if torch.is_tensor(v)]
    assert planned.weights == weights
    assert planned.gradients == 0
    assert planned.optimizer == copies * weights + sum(v.numel() * v.element_size() for v in state)
    assert planned.trained_parameters == planned.all_parameters
    saved = optimizer._walk()._saved
    assert sum(v.numel() * v.element_size() for v in saved) == copies * weights


def test_every_method_can_be_planned(make_run: Any) -> None:
    for name in METHODS:
        assert plan(make_run(name)).total > 0
