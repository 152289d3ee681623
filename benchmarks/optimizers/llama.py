"""A Llama of 4.2 M parameters, trained from nothing by one optimizer: a run of the pre-training study.

Weights, state and arithmetic are float32, so that the study gives the same on CPUs with and without bfloat16 units;
FRUGAL's published scripts train under bfloat16 autocast. Like them, without clipping.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.optimizers.runs import TUNING_SEED, Result, Run
from benchmarks.optimizers.text import IGNORED, Corpus, windows
from benchmarks.optimizers.training import Optimizers, train


@dataclass(frozen=True)
class Size:
    """Model, batches and steps. Tied embeddings; width 256 has 4 heads of 64."""

    width: int = 256
    layers: int = 4
    mlp: int = 688
    vocabulary: int = 4096
    length: int = 128
    """Tokens of a row."""
    batch: int = 8
    """Rows of a step."""
    steps: int = 400
    gap: int = 50
    """Steps between refreshes of a subspace (T)."""
    dev: int = 2048
    """Tokens of an article, at most, that rates are chosen on; test is scored whole."""

    @property
    def rank(self) -> int:
        """A quarter of the width: what density .25 is for methods that have a rank."""
        return self.width // 4


def model(size: Size, vocabulary: int, seed: int) -> nn.Module:
    """A fresh model, drawn from the seed alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    made: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=size.width,
            intermediate_size=size.mlp,
            num_hidden_layers=size.layers,
            num_attention_heads=max(1, size.width // 64),
            max_position_embeddings=size.length,
            tie_word_embeddings=True,
            use_cache=False,
        )
    )
    return made


def nats(model: nn.Module, article: list[int], size: Size) -> tuple[float, int]:
    """Summed loss of an article and how many tokens it is over; context starts anew every ``size.length`` tokens."""
    inputs, targets = windows(article, size.length)
    total = 0.0
    with torch.inference_mode():
        for start in range(0, len(inputs), 2 * size.batch):
            logits = model(input_ids=inputs[start : start + 2 * size.batch]).logits
            wanted = targets[start : start + 2 * size.batch]
            total += F.cross_entropy(
                logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum"
            ).item()
    return total, len(article) - 1


def run(what: Run, build: Callable[[nn.Module], Optimizers], corpus: Corpus, size: Size) -> Result:
    """One run: train, then score dev (tuning seed) or test (every other seed)."""
    began = time.perf_counter()
    trained_model = model(size, corpus.vocabulary, what.seed)

    def loss(rows: Tensor) -> Tensor:
        logits = trained_model(input_ids=rows[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    batches = corpus.batches(what.seed, size.batch)
    trained = train(trained_model, build, loss, batches, steps=size.steps, warmup=size.steps // 10)
    scored: list[tuple[float, int]] = []
    if not trained.diverged:
        trained_model.eval()
        part = [article[: size.dev] for article in corpus.dev] if what.seed == TUNING_SEED else corpus.test
        scored = [nats(trained_model, article, size) for article in part]
    units, tokens = [n for n, _ in scored], [t for _, t in scored]
    finite = bool(units) and math.isfinite(sum(units))
    return Result(
        loss=sum(units) / sum(tokens) if finite else math.inf,
        units=tuple(units) if finite else (),
        tokens=tuple(tokens) if finite else (),
        state_bytes=trained.state_bytes,
        seconds=time.perf_counter() - began,
        more={
            "held_mib": trained.held_bytes / 2**20,
            "train_loss": trained.last_loss if math.isfinite(trained.last_loss) else None,
            "step_ms": 1000 * median(trained.step_seconds),
            "optimizer_ms": 1000 * median(trained.optimizer_seconds),
        },
    )
