"""Full fine-tuning is AdamW on every weight: a loop written out by hand gives the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from core.data.stream import Stream
from core.models.load import load
from trainers.dataset import read_examples
from trainers.registry import METHODS

DATA = Path(__file__).parents[3] / "configs" / "debug" / "data" / "harbour.jsonl"


def _by_hand(*, steps: int, rate: float, decay: float, clip: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Row by row, logits of every position, the AdamW update spelled out; nothing of the loop is used."""
    loaded = load("tiny-llama")
    model = loaded.model.to(dtype)
    names = dict(model.named_parameters())
    rows = read_examples(DATA, loaded.tokenizer, max_length=128, param="train_file")
    stream = Stream(rows, batch_size=8, seed=0)
    mean = {name: torch.zeros_like(p) for name, p in names.items()}
    square = {name: torch.zeros_like(p) for name, p in names.items()}
    for step in range(1, steps + 1):
        batch = [row for part in next(stream) for row in part]
        losses = []
        for row in batch:
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0]
            for position in range(1, len(row.input_ids)):
                if row.labels[position] != -100:
                    losses.append(F.cross_entropy(logits[position - 1], torch.tensor(row.labels[position])))
        model.zero_grad()
        torch.stack(losses).mean().backward()
        gradients = {name: p.grad for name, p in names.items() if p.grad is not None}
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
        share = min(1.0, clip / (norm + 1e-6))
        now = rate * (1 - (step - 1) / steps)
        with torch.no_grad():
            for name, p in names.items():
                g = gradients[name] * share
                mean[name] = 0.9 * mean[name] + 0.1 * g
                square[name] = 0.999 * square[name] + 0.001 * g**2
                if p.dim() >= 2:
                    p -= now * decay * p
                p -= now * (mean[name] / (1 - 0.9**step)) / ((square[name] / (1 - 0.999**step)).sqrt() + 1e-8)
    return {f"model.{name}": p.detach() for name, p in names.items()}


def test_equals_a_loop_by_hand(train: Any) -> None:
    result = train(
        {"name": "full", "weight_decay": 0.1},
        batch_size=2,
        accumulation=4,
        max_steps=5,
        learning_rate=1e-3,
        warmup_ratio=0.0,
        clip_norm=0.5,
    )
    expected = _by_hand(steps=5, rate=1e-3, decay=0.1, clip=0.5, dtype=torch.float64)
    start = {f"model.{name}": p.detach() for name, p in load("tiny-llama").model.named_parameters()}
    assert result.weights.keys() == expected.keys()
    for name, wanted in expected.items():
        moved = (wanted - start[name]).norm()
        assert moved > 0
        # Adam divides small gradients by themselves, so float32 noise in them shows; it must stay noise.
        assert (result.weights[name].double() - wanted).norm() <= 2e-3 * moved, name


def test_every_weight_moves_and_is_saved(train: Any) -> None:
    result = train("full", max_steps=1)
    start = dict(load("tiny-llama").model.named_parameters())
    assert {name.removeprefix("model.") for name in result.weights} == start.keys()
    assert all(not torch.equal(result.weights[f"model.{name}"], value) for name, value in start.items())


def test_weight_decay_spares_norms(train: Any, tmp_path: Path) -> None:
    plain, decayed = (
        train({"name": "full", "weight_decay": decay}, output_dir=str(tmp_path / str(decay)), max_steps=1)
        for decay in (0.0, 0.5)
    )
    for name, value in plain.weights.items():
        assert torch.equal(decayed.weights[name], value) == (value.dim() < 2), name


def test_settings_out_of_range_are_refused() -> None:
    for settings in ({"beta1": 1.0}, {"beta2": -0.1}, {"epsilon": 0.0}, {"weight_decay": -1.0}):
        try:
            METHODS["full"].config(**settings)
        except ValueError as error:
            assert next(iter(settings)) in str(error)
        else:
            raise AssertionError(settings)
