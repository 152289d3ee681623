"""Short runs of the debug model, in this process, with a stop wherever a test wants one."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from core import checkpoint
from core.events import EventLog, read
from trainers.config import Run, parse_run
from trainers.report import Reporter
from trainers.signals import StopSignals

DATA = Path(__file__).parents[3] / "configs" / "debug" / "data"


class StopAt(StopSignals):
    """A signal that arrives between two checks: the one with that number finds it."""

    def __init__(self, check: int | None) -> None:
        self.checks = 0
        self.check = check
        super().__init__()

    @property
    def requested(self) -> bool:
        self.checks += 1
        return self.check is not None and self.checks > self.check

    @requested.setter
    def requested(self, value: bool) -> None:
        assert not value


@dataclass
class Result:
    """What a run left behind."""

    code: int
    output: Path
    checks: int

    @property
    def events(self) -> list[dict[str, Any]]:
        return read(self.output / "events.jsonl")[0]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] == kind]

    @property
    def losses(self) -> list[float]:
        return [float(row["train_loss"]) for row in self.metrics]

    @property
    def metrics(self) -> list[dict[str, str]]:
        with (self.output / "metrics.csv").open() as file:
            return list(csv.DictReader(file))

    @property
    def checkpoint(self) -> checkpoint.Checkpoint:
        path = checkpoint.latest(self.output / "checkpoints")
        assert path is not None
        return checkpoint.load(path)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in self.checkpoint.tensors.items() if name.startswith("model.")}


@pytest.fixture
def make_run(tmp_path: Path, tiny_llama: Path) -> Callable[..., Run]:
    """A resolved run of the debug model, eight rows a step, twelve steps, unless told otherwise."""

    def make(method: dict[str, Any] | str, **settings: Any) -> Run:
        base = {
            "model": "tiny-llama",
            "train_file": str(DATA / "harbour.jsonl"),
            "output_dir": str(tmp_path / "run"),
            "method": method,
            "batch_size": 4,
            "max_length": 128,
            "max_steps": 12,
            "learning_rate": 2e-3,
            "threads": 1,
            "save_every": 100,
        }
        return parse_run(base | settings)

    return make


@pytest.fixture
def train(make_run: Callable[..., Run]) -> Callable[..., Result]:
    """Trains in this process; ``stop_at`` is the number of the check that finds a stop signal."""

    def go(method: dict[str, Any] | str, *, stop_at: int | None = None, **settings: Any) -> Result:
        from accelerate.state import AcceleratorState

        from trainers.train import train as run_it

        # Accelerate keeps one state a process, and refuses another precision in it.
        AcceleratorState._reset_state(reset_partial_state=True)
        run = make_run(method, **settings)
        output = Path(run.config.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        stop = StopAt(stop_at)
        with EventLog(output / "events.jsonl") as log:
            code = run_it(run, Reporter(log), stop)
        return Result(code, output, stop.checks)

    return go
