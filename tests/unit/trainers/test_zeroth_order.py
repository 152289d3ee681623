"""The loop's contract holds for a method without gradients: two calls of the closure, no backward, exact resume."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from core.events import EventLog
from trainers.errors import STOPPED, SUCCEEDED
from trainers.method import Attached, Method, MethodConfig, TrainContext
from trainers.report import Reporter
from trainers.train import train as run_it


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SpsaConfig(MethodConfig):
    """Settings of ``spsa``."""


class Spsa(torch.optim.Optimizer):
    """Two losses along one random direction a step (simultaneous perturbation)."""

    def __init__(self, parameters: Any, rate: float) -> None:
        super().__init__(parameters, {"lr": rate})

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        group = self.param_groups[0]
        before = [p.clone() for p in group["params"]]
        direction = [torch.randn_like(p) for p in before]
        losses = []
        try:
            for sign in (1, -1):
                for p, start, z in zip(group["params"], before, direction, strict=True):
                    p.copy_(start + sign * 1e-3 * z)
                losses.append(closure())
        finally:
            for p, start in zip(group["params"], before, strict=True):
                p.copy_(start)
        slope = (losses[0] - losses[1]) / 2e-3
        for p, z in zip(group["params"], direction, strict=True):
            p.sub_(group["lr"] * slope * z)
        return (losses[0] + losses[1]) / 2


def _attach(model: Any, config: Any, context: TrainContext) -> Attached:
    model.requires_grad_(True)
    return Attached(model, Spsa(model.parameters(), context.learning_rate))


SPSA = Method(
    name="spsa",
    summary="Two forward passes a step.",
    paper="1992.0000",
    config=SpsaConfig,
    attach=_attach,
    makes="weights",
    learning_rate=1e-5,
    needs_gradients=False,
)


@pytest.fixture
def go(make_run: Any, train: Any) -> Callable[..., tuple[int, Any]]:
    """Trains with the method above, which no run file can name."""
    from accelerate.state import AcceleratorState

    def run(output: Path, stop_at: int | None = None, **settings: Any) -> tuple[int, Any]:
        AcceleratorState._reset_state(reset_partial_state=True)
        plain = make_run("full", output_dir=str(output), learning_rate=1e-5, **settings)
        stop_type = train.__globals__["StopAt"]
        output.mkdir(exist_ok=True)
        with EventLog(output / "events.jsonl") as log:
            stop = stop_type(stop_at)
            code = run_it(dataclasses.replace(plain, method=SPSA, settings=SpsaConfig()), Reporter(log), stop)
        return code, train.__globals__["Result"](code, output, stop.checks)

    return run


def test_two_forward_passes_a_step_no_gradient_and_an_exact_resume(
    go: Callable[..., tuple[int, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainers import loss as module

    graphs: list[bool] = []
    real = module.TokenLoss.forward

    def forward(self: Any, labels: torch.Tensor, **inputs: torch.Tensor) -> Any:
        value, hits = real(self, labels, **inputs)
        graphs.append(value.requires_grad or self.training)
        return value, hits

    monkeypatch.setattr(module.TokenLoss, "forward", forward)
    settings = {"max_steps": 6, "batch_size": 2, "accumulation": 2, "schedule": "constant", "save_every": 2}
    code, straight = go(tmp_path / "straight", **settings)
    assert code == SUCCEEDED
    assert len(graphs) == 6 * 2 * 2, "steps, calls of the closure, micro-batches"
    assert not any(graphs)
    metric = straight.of_kind("metric")[0]
    assert "grad_norm" not in metric
    assert metric["train_loss"] > 6

    # The stop arrives within the second call of the fourth step's closure.
    code, _ = go(tmp_path / "stopped", stop_at=3 * 5 + 4, **settings)
    assert code == STOPPED
    code, resumed = go(tmp_path / "stopped", **settings)
    assert code == SUCCEEDED
    assert all(torch.equal(value, resumed.weights[name]) for name, value in straight.weights.items())
    assert resumed.metrics == straight.metrics
