"""When a run ends early, what it keeps, and what it reports."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from core import checkpoint
from core.models.load import load
from trainers.errors import RunError

DATA = Path(__file__).parents[3] / "configs" / "debug" / "data"
HELD_OUT = str(DATA / "harbour-held-out.jsonl")


def _kept(output: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (output / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_stops_at_the_first_non_finite_value_and_keeps_the_last_good_checkpoint(
    poison: str, train: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from trainers import loss as module

    calls = 0
    real = module.TokenLoss.forward

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, value: torch.Tensor) -> torch.Tensor:
            return value.clone()

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return gradient * math.inf

    def forward(self: Any, labels: torch.Tensor, **inputs: torch.Tensor) -> Any:
        nonlocal calls
        calls += 1
        value, hits = real(self, labels, **inputs)
        if calls == 6:
            value = value * math.nan if poison == "loss" else Poison.apply(value)
        return value, hits

    monkeypatch.setattr(module.TokenLoss, "forward", forward)
    with pytest.raises(
        RunError, match=r"step 6; the step was not taken, and the checkpoint of step 4 is kept"
    ) as caught:
        train("full", save_every=2, output_dir=str(tmp_path / "run"))
    assert caught.value.code == "non_finite"
    assert "dtype" not in str(caught.value), "the run computes in float32 already, as auto does here"
    path = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert path is not None
    kept = checkpoint.load(path)
    assert kept.step == 4
    assert all(value.isfinite().all() for value in kept.tensors.values())


@pytest.mark.parametrize(("gpu", "hinted"), [(True, True), (False, False)])
def test_advises_float32_only_where_something_else_is_used(
    gpu: bool, hinted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainers.loop import Loop

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: gpu)
    loop: Any = SimpleNamespace(saved_step=0, config=SimpleNamespace(dtype="auto"))
    assert ("or set dtype: float32" in str(Loop._non_finite(loop, "the loss became nan"))) == hinted


@pytest.mark.parametrize(("step", "kept"), [(0, []), (6, [2, 4])])
def test_stops_at_a_non_finite_loss_on_the_held_out_rows(
    step: int, kept: list[int], train: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from trainers import loop as module
    from trainers.evaluation import Score

    real, evaluations = module.evaluate, iter(range(0, 100, 2))

    def evaluate(*args: Any, **settings: Any) -> Score:
        score = real(*args, **settings)
        return score._replace(loss=math.nan) if next(evaluations) == step else score

    monkeypatch.setattr(module, "evaluate", evaluate)
    when = "after step 6.* the checkpoint of step 4 is kept" if step else "before the first step.* none was saved yet"
    with pytest.raises(RunError, match=f"held-out rows is nan {when}") as caught:
        train("full", eval_file=HELD_OUT, eval_every=2, save_every=2, export="best", output_dir=str(tmp_path / "run"))
    assert caught.value.code == "non_finite"
    assert _kept(tmp_path / "run") == kept
    if kept:
        newest = checkpoint.load(tmp_path / "run" / "checkpoints" / "step-00000004")
        assert math.isfinite(newest.state["progress"]["best_loss"])


def test_stops_early_and_exports_the_best(train: Any) -> None:
    # A rate this high makes the held-out rows worse after a few steps.
    result = train(
        "full",
        eval_file=HELD_OUT,
        eval_every=2,
        max_steps=200,
        learning_rate=2e-2,
        schedule="constant",
        early_stopping_patience=3,
    )
    scores = {event["step"]: event["valid_loss"] for event in result.of_kind("metric") if "valid_loss" in event}
    best = min((step for step in scores if step), key=lambda step: scores[step])
    last = max(scores)
    assert last < 200
    assert last == best + 3 * 2
    assert any("stopped early" in event["message"] for event in result.of_kind("message"))
    exported = load(str(result.output / "artifact")).model
    saved = checkpoint.load(result.output / "checkpoints" / f"step-{best:08d}").tensors
    for name, value in exported.named_parameters():
        assert torch.equal(value, saved[f"model.{name}"])


def test_a_gain_below_the_delta_is_no_gain(train: Any) -> None:
    result = train(
        "full", eval_file=HELD_OUT, eval_every=1, early_stopping_patience=1, early_stopping_delta=100.0, max_steps=8
    )
    scores = {event["step"]: event["valid_loss"] for event in result.of_kind("metric") if "valid_loss" in event}
    assert scores[2] < scores[1], "without the delta, this run would go on"
    assert max(scores) == 2
    assert result.checkpoint.state["progress"]["best_step"] == 1


def test_evaluation_draws_no_dropout_and_leaves_the_mode_as_it_was(tiny_llama: Path) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from peft import LoraConfig, get_peft_model

    from trainers.batch import collator
    from trainers.dataset import read_examples
    from trainers.evaluation import evaluate
    from trainers.loss import TokenLoss

    AcceleratorState._reset_state(reset_partial_state=True)
    loaded = load("tiny-llama")
    rows = read_examples(Path(HELD_OUT), loaded.tokenizer, max_length=64, param="eval_file")[:4]
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False)
    loss = TokenLoss(get_peft_model(loaded.model, config)).train()
    collate = collator(pad_id=0, device=torch.device("cpu"))
    with torch.no_grad():
        drawn = {float(loss(**collate(rows))[0]) for _ in range(2)}
    assert len(drawn) == 2, "dropout acts on this model"
    accelerator = Accelerator(cpu=True)
    first, second = (
        evaluate(loss, rows, size=2, collate=collate, accelerator=accelerator, check=lambda: None) for _ in range(2)
    )
    assert first == second
    assert loss.training


def test_keeps_the_newest_checkpoints_and_the_best(train: Any) -> None:
    result = train(
        "full",
        eval_file=HELD_OUT,
        eval_every=4,
        save_every=1,
        keep_checkpoints=2,
        max_steps=16,
        learning_rate=0.05,
        schedule="constant",
    )
    best = result.checkpoint.state["progress"]["best_step"]
    assert best < 15, "the rate is so high that the last evaluation is not the best"
    assert _kept(result.output) == [best, 15, 16]


def test_evaluation_is_weighted_by_token(train: Any) -> None:
    result = train("full", eval_file=HELD_OUT, max_steps=1, batch_size=3, learning_rate=1e-12)
    from trainers.dataset import read_examples

    loaded = load("tiny-llama")
    rows = read_examples(Path(HELD_OUT), loaded.tokenizer, max_length=128, param="eval_file")
    total, hits, count = 0.0, 0, 0
    for row in rows:
        with torch.no_grad():
            logits = loaded.model(input_ids=torch.tensor([row.input_ids])).logits[0]
        for position in range(1, len(row.labels)):
            if row.labels[position] != -100:
                total -= float(logits[position - 1].log_softmax(-1)[row.labels[position]])
                hits += int(logits[position - 1].argmax()) == row.labels[position]
                count += 1
    before = result.of_kind("metric")[0]
    assert before["step"] == 0
    assert before["valid_loss"] == pytest.approx(total / count, rel=1e-5)
    assert before["valid_mean_token_accuracy"] == pytest.approx(hits / count)


def test_clipping_bounds_the_update_and_reports_the_norm_before_it(train: Any, tmp_path: Path) -> None:
    free, clipped = (
        train("full", output_dir=str(tmp_path / str(norm)), max_steps=1, clip_norm=norm) for norm in (0, 0.25)
    )
    norms = [result.of_kind("metric")[0]["grad_norm"] for result in (free, clipped)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)

    def moment(result: Any) -> torch.Tensor:
        tensors = result.checkpoint.tensors
        return torch.cat([v.flatten() for k, v in sorted(tensors.items()) if k.endswith("exp_avg")])

    assert float(moment(free).norm()) == pytest.approx(0.1 * norms[0], rel=1e-5)
    assert float(moment(clipped).norm()) == pytest.approx(0.1 * 0.25, rel=1e-5)


def test_bfloat16_computes_in_it_and_keeps_trained_weights_in_float32(train: Any, tmp_path: Path) -> None:
    for name in ("full", "lora"):
        exact = train(name, output_dir=str(tmp_path / f"{name}-32"), max_steps=3)
        rounded = train(name, output_dir=str(tmp_path / f"{name}-16"), max_steps=3, dtype="bfloat16")
        assert {value.dtype for value in rounded.weights.values()} == {torch.float32}
        assert rounded.losses != exact.losses
        assert rounded.losses == pytest.approx(exact.losses, rel=2e-2)


def test_a_rehearsal_runs_the_longest_rows_and_leaves_no_trace(train: Any, tmp_path: Path) -> None:
    plain, rehearsed = (
        train({"name": "lora", "dropout": 0.2}, output_dir=str(tmp_path / on), max_steps=3, rehearse=on)
        for on in ("off", "on")
    )
    assert any("longest rows" in event["message"] for event in rehearsed.of_kind("message"))
    assert rehearsed.losses == plain.losses
    assert all(torch.equal(value, rehearsed.weights[name]) for name, value in plain.weights.items())


def test_prompt_and_completion_rows_train_too(train: Any, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(f'{{"prompt": "tide {n}: ", "completion": "water {n}"}}\n' for n in range(10)))
    assert len(train("lora", train_file=str(file), max_steps=2).losses) == 2


def test_threads_and_device_are_recorded(train: Any) -> None:
    first = train("lora", max_steps=1).of_kind("message")[0]
    assert first["threads"] == 1
    assert first["device"] == "cpu"
    assert first["dtype"] == "float32"
