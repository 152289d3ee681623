"""MeZO in the loop: what it reports, what a loss that is no number does, and what decays."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from core.models.load import load
from trainers.batch import collator
from trainers.dataset import read_examples
from trainers.loss import TokenLoss
from trainers.method import TrainContext
from trainers.registry import METHODS

DATA = Path(__file__).parents[3] / "configs" / "debug" / "data" / "harbour.jsonl"
CONTEXT = TrainContext(learning_rate=1e-3, seed=3, activation_checkpointing=False, mean=float)


def test_a_step_reports_both_losses_the_derivative_and_what_was_cut(train: Any) -> None:
    result = train({"name": "mezo", "clip": 0.9}, max_steps=4)
    for event in result.of_kind("metric"):
        plus, minus = event["loss_plus"], event["loss_minus"]
        assert event["train_loss"] == pytest.approx((plus + minus) / 2, rel=1e-9)
        assert plus != minus
        assert (event["derivative"] > 0) == (plus > minus)
        assert event["skipped"] == 0
        assert "grad_norm" not in event
    # The first derivative is its own mean, and cut to 0.9 of it.
    assert result.of_kind("metric")[0]["clipped_share"] == 1


@pytest.mark.parametrize("both", [False, True])
def test_a_loss_that_is_no_number_costs_its_step_alone(both: bool, train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainers import loss as module

    calls = 0
    real = module.TokenLoss.forward

    def forward(self: Any, labels: torch.Tensor, **inputs: torch.Tensor) -> Any:
        nonlocal calls
        calls += 1
        value, hits = real(self, labels, **inputs)
        # The third step's first loss, and its second.
        return value * math.nan if calls == 5 or (both and calls == 6) else value, hits

    monkeypatch.setattr(module.TokenLoss, "forward", forward)
    result = train("mezo", max_steps=4, save_every=1, keep_checkpoints=9, batch_size=4)
    events = result.of_kind("metric")
    assert [event["skipped"] for event in events] == [0, 0, 1, 1]
    assert ["train_loss" in event for event in events] == [True, True, not both, True]
    assert "derivative" not in events[2]
    weights = [_weights(result.output, step) for step in (1, 2, 3, 4)]
    assert [bool((one != two).any()) for one, two in pairwise(weights)] == [True, False, True]


def _weights(output: Path, step: int) -> torch.Tensor:
    from core import checkpoint

    tensors = checkpoint.load(output / "checkpoints" / f"step-{step:08d}").tensors
    return torch.cat([v.flatten() for k, v in sorted(tensors.items()) if k.startswith("model.")])


def test_a_model_that_is_broken_ends_the_run(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainers import loss as module

    real = module.TokenLoss.forward
    monkeypatch.setattr(
        module.TokenLoss,
        "forward",
        lambda self, labels, **inputs: (real(self, labels, **inputs)[0] * math.nan, torch.tensor(0)),
    )
    with pytest.raises(ValueError, match="5 steps in a row had no finite loss: lower learning_rate"):
        train({"name": "mezo", "patience": 5}, max_steps=30)


def test_biases_and_norms_are_spared_the_decay(tiny_llama: Path) -> None:
    method = METHODS["mezo"]
    attached = method.attach(load("tiny-llama").model, method.config(weight_decay=0.1), CONTEXT)
    for group in attached.optimizer.param_groups:
        for p in group["params"]:
            assert group["weight_decay"] == (0.1 if p.dim() >= 2 else 0.0)
    held = {p for group in attached.optimizer.param_groups for p in group["params"]}
    assert held == set(attached.model.parameters())


def test_the_loss_without_gradients_is_summed_in_float64(tiny_llama: Path) -> None:
    loaded = load("tiny-llama")
    token_loss = TokenLoss(loaded.model)
    batch = _batch(loaded.tokenizer)
    with torch.no_grad():
        value, _ = token_loss(**batch)
        logits = loaded.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        each = torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="none")
    assert value.dtype == torch.float64
    assert float(value) == pytest.approx(float(each.double().sum()), rel=1e-9)
    assert token_loss(**batch)[0].dtype == torch.float32


def _batch(tokenizer: Any) -> dict[str, torch.Tensor]:
    rows = read_examples(DATA, tokenizer, max_length=128, param="train_file")[:4]
    batch: dict[str, torch.Tensor] = collator(pad_id=0, device=torch.device("cpu"))(rows)
    return batch
