"""A pretrained model fine-tuned by one method: a run of the fine-tuning study."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks.optimizers.plan import Subject
from benchmarks.optimizers.questions import Questions
from benchmarks.optimizers.runs import TUNING_SEED, Result, Run
from benchmarks.optimizers.training import Optimizers, train
from core.data.batch import collate
from core.data.example import Example
from core.models.load import load, load_tokenizer
from trainers.loss import TokenLoss
from trainers.method import TrainContext
from trainers.optim import DctAdamW, Frugal, split_parameters


@dataclass(frozen=True)
class Task:
    """Model, rows and steps."""

    model: str = "smollm2-135m-instruct"
    length: int = 96
    """Tokens of a row, at most; longer ones are cut."""
    batch: int = 4
    """Rows of a step."""
    steps: int = 60
    gap: int = 20
    """Steps between refreshes of FRUGAL's subspaces."""
    density: float = 0.25
    """Share of columns (FRUGAL) or basis vectors (DCT-AdamW) that have state."""
    train: int = 1000
    """Rows to draw batches from."""
    dev: int = 100
    """Rows that learning rates are chosen on."""
    test: int = 100
    """Rows that are reported."""


Build = Callable[[nn.Module, float, int, Task], Optimizers]


@dataclass(frozen=True)
class Arm(Subject):
    """A subject of the study, and how its optimizer is made from (model, rate, seed, task)."""

    build: Build = lambda *_: ()
    source: str = ""
    """Where ``centre`` is from."""


def adamw(model: nn.Module, rate: float, seed: int, task: Task) -> Optimizers:
    """torch's, on every weight."""
    return [torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)]


def frugal(model: nn.Module, rate: float, seed: int, task: Task) -> Optimizers:
    """FRUGAL by columns, a quarter of them, the others' rate a tenth as in its fine-tuning scripts."""
    groups = split_parameters(model)
    return [Frugal(groups, lr=rate, density=task.density, update_gap=task.gap, free_lr_scale=0.1, seed=seed)]


def dct_adamw(model: nn.Module, rate: float, seed: int, task: Task) -> Optimizers:
    """DCT-AdamW, a new subspace every step."""
    return [DctAdamW(split_parameters(model), lr=rate, density=task.density, weight_decay=0.0, seed=seed)]


def lora(model: nn.Module, rate: float, seed: int, task: Task) -> Optimizers:
    """LoRA of rank 8 on every linear layer: the method of this repository, put into the model in place."""
    from trainers.methods.lora import LoraConfig, attach

    torch.manual_seed(seed)
    context = TrainContext(learning_rate=rate, seed=seed, activation_checkpointing=False, mean=lambda value: value)
    return [attach(model, LoraConfig(rank=8, alpha=16.0), context).optimizer]


ARMS = [
    Arm("adamw", 2e-5, claimed=True, build=adamw, source="this repository's default of `full`"),
    Arm("frugal-columns", 1e-4, claimed=True, build=frugal, source="FRUGAL's fine-tuning scripts: 5e-5 to 5e-4"),
    Arm("dct-adamw", 2e-5, claimed=True, build=dct_adamw, source="full AdamW's, none is published"),
    Arm("lora-r8", 4e-4, claimed=True, build=lora, source="this repository's default of `lora`"),
]


def arm(name: str) -> Arm:
    """The arm of that name."""
    return next(each for each in ARMS if each.name == name)


class Peak:
    """Most bytes resident in this process since it was made (Linux)."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def bytes(self) -> int:
        """The high-water mark."""
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def nats(loss: TokenLoss, row: Example) -> float:
    """Summed loss of a row's answer."""
    batch = collate([row], pad_id=0)
    with torch.inference_mode():
        found: Tensor = loss(batch.labels, input_ids=batch.input_ids, attention_mask=batch.attention_mask)[0]
    return found.item()


def score(model: nn.Module, rows: Sequence[Example]) -> tuple[list[float], list[int]]:
    """Summed nats and tokens of each row's answer."""
    model.eval()
    loss = TokenLoss(model)
    try:
        return [nats(loss, row) for row in rows], [row.trained for row in rows]
    finally:
        loss.detach()


def run(what: Run, folder: Path, task: Task) -> Result:
    """One run: train, then score dev (tuning seed) or test (every other seed)."""
    began = time.perf_counter()
    loaded = load(task.model)
    model: nn.Module = loaded.model
    questions = read(folder, task)
    loss = TokenLoss(model)
    tokens = list[int]()

    def mean_loss(rows: list[Example]) -> Tensor:
        batch = collate(rows, pad_id=0)
        tokens.append(batch.tokens)
        total: Tensor = loss(batch.labels, input_ids=batch.input_ids, attention_mask=batch.attention_mask)[0]
        return total / batch.trained

    def build(model: nn.Module) -> Optimizers:
        return arm(what.arm).build(model, what.rate, what.seed, task)

    torch.manual_seed(what.seed)
    peak = Peak()
    batches = questions.batches(what.seed, task.batch)
    trained = train(model, build, mean_loss, batches, steps=task.steps, warmup=task.steps // 10)
    most = peak.bytes()
    loss.detach()
    rows = questions.dev if what.seed == TUNING_SEED else questions.test
    units, scored = ([], []) if trained.diverged else score(model, rows)
    finite = bool(units) and math.isfinite(sum(units))
    return Result(
        loss=sum(units) / sum(scored) if finite else math.inf,
        units=tuple(units) if finite else (),
        tokens=tuple(scored) if finite else (),
        state_bytes=trained.state_bytes,
        seconds=time.perf_counter() - began,
        more={
            "held_mib": trained.held_bytes / 2**20,
            "peak_mib": most / 2**20,
            "real_tokens_per_second": sum(tokens) / sum(trained.step_seconds),
            "step_ms": 1000 * median(trained.step_seconds),
            "optimizer_ms": 1000 * median(trained.optimizer_seconds),
        },
    )


def read(folder: Path, task: Task) -> Questions:
    """The task's rows, encoded for its model."""
    tokenizer = load_tokenizer(task.model)
    return Questions.read(folder, tokenizer, length=task.length, train=task.train, dev=task.dev, test=task.test)


def untrained(folder: Path, task: Task) -> dict[str, float]:
    """Nats per answer token of the model as it is, on dev and test."""
    model, questions = load(task.model).model, read(folder, task)
    found = {}
    for name, rows in (("dev", questions.dev), ("test", questions.test)):
        units, tokens = score(model, rows)
        found[name] = sum(units) / sum(tokens)
    return found
