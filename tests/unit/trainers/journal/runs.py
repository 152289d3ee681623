"""Runs of the real optimizer over a few tensors that write their journal, and go on from it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainers.journal import Header, Writer, read
from trainers.journal.recorder import Recorder
from trainers.journal.replay import describe, replay
from trainers.journal.tensors import digest
from trainers.optim.qzo import Qzo

STEPS = 32
NAN_AT = 7
"""The loss of this step is no number."""


def start() -> dict[str, Tensor]:
    """Scales of both signs and of zero, in two tensors, and a matrix of weights."""
    generator = torch.Generator().manual_seed(1)
    made = {
        "a.scales": torch.rand(5, 3, generator=generator) * 0.01,
        "b.scales": torch.randn(70, generator=generator) * 0.01,
        "c.weight": torch.randn(9, 4, generator=generator),
    }
    made["b.scales"][::10] = 0
    return {name: torch.nn.Parameter(tensor, requires_grad=False) for name, tensor in made.items()}


def optimizer_over(tensors: dict[str, Tensor], **settings: Any) -> Qzo:
    scales, weights = [tensors["a.scales"], tensors["b.scales"]], [tensors["c.weight"]]
    groups = [{"params": scales, "scales": True}, {"params": weights, "weight_decay": 0.1}]
    return Qzo(groups, seed=(1 << 63) + 5, **settings)


class Run:
    """A run that writes its journal; it can be stopped after any step, and gone on with from the journal alone."""

    def __init__(self, path: Path, **settings: Any) -> None:
        self.path, self.settings = path, settings
        self.tensors = start()
        self.optimizer = optimizer_over(self.tensors, **settings)
        self.hashes = [digest(self.tensors)]
        header = self.header()
        if path.exists():
            self.writer = Writer.reopen(path, header)
            replay(read(path), self.optimizer, self.tensors)
        else:
            self.writer = Writer.create(path, header)
        self.optimizer.on_step = Recorder(self.writer)

    def header(self) -> Header:
        about = {"model": "three tensors"}
        quantiser = {"scheme": "none"}
        return describe(
            self.optimizer, self.tensors, base="sha256:0", quantiser=quantiser, kernels="reference", about=about
        )

    def go(self, until: int = STEPS) -> Run:
        while (step := self.optimizer.steps + 1) <= until:
            for group in self.optimizer.param_groups:
                group["lr"] = 0.01 / step
            self.optimizer.step(lambda: self.loss(step))
            self.hashes.append(digest(self.tensors))
        return self

    def loss(self, step: int) -> float:
        """Of the rows of a step, which a stop does not change."""
        if step == NAN_AT:
            return math.nan
        total = sum(float((tensor.double() * (index + step % 3 + 1)).sum()) for index, tensor in self.indexed())
        return math.sin(total) + total**2

    def indexed(self) -> Any:
        return enumerate(self.tensors.values())

    def seal(self) -> Run:
        self.writer.seal(digest(self.tensors))
        return self
