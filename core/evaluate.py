"""How well a model predicts text: perplexity, and classification by the likelihood of label texts.

Every evaluation gives a `Report`, so that tables and comparisons need to know one shape. Sums are float64 and weighted
by token, so results do not depend on the batch size beyond rounding.
Not covered: generative scores (exact match, refusals).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from core.data.batch import Batch, collate
from core.data.example import IGNORED, Example


@dataclass(frozen=True, slots=True)
class Report:
    """What one evaluation found."""

    name: str
    """Which evaluation."""
    value: float
    """The one number that it is about."""
    items: int
    """What the number is a mean over: tokens or questions."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Further numbers, as JSON."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt with the texts that may follow it."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    options: Sequence[Sequence[int]]
    """Token ids of each label's text, at least one token each."""
    answer: int
    """Index of the right option."""


def perplexity(model: nn.Module, batches: Iterable[Batch]) -> Report:
    """Measure how surprised a model is by the labelled tokens.

    Args:
        model: A causal language model in eval mode.
        batches: Labels say which tokens count.

    Returns:
        "perplexity": exp of the mean loss per labelled token; details: `loss` in nats, `accuracy` of the top token.

    Raises:
        ValueError: No labelled token.
    """
    total, hits, count = 0.0, 0, 0
    for batch in batches:
        logprobs, best, targets = _predictions(model, batch)
        total -= float(logprobs.sum(dtype=torch.float64))
        hits += int((best == targets).sum())
        count += targets.numel()
    if count == 0:
        raise ValueError("no token is labelled, so there is nothing to measure")
    loss = total / count
    value = math.exp(loss) if loss < 700 else math.inf
    return Report("perplexity", value, count, {"loss": loss, "accuracy": hits / count})


def classify(
    model: nn.Module, questions: Sequence[Question], *, pad_id: int, batch_size: int = 8, normalise: bool = False
) -> Report:
    """Let a model choose, per question, the option that it finds likeliest after the prompt.

    Args:
        model: A causal language model in eval mode.
        questions: At least one.
        pad_id: Token id for the padding.
        batch_size: Options in one forward.
        normalise: Compare the mean log-probability per token instead of the sum: fair to long labels.

    Returns:
        "accuracy"; details: `choices`, the index chosen for each question (the first on a tie), and `margin`, the mean
        lead of the right option's score over the best wrong one, in nats.

    Raises:
        ValueError: No question, fewer than two options, an empty prompt or option, or an answer out of range.
    """
    if not questions:
        raise ValueError("there is no question to answer")
    for number, q in enumerate(questions):
        if len(q.options) < 2 or not q.prompt or not all(q.options) or not 0 <= q.answer < len(q.options):
            raise ValueError(
                f"question {number}: give a prompt, two or more options with tokens, and the answer's index"
            )
    pairs = [(q.prompt, option) for q in questions for option in q.options]
    scores = iter(list(_scores(model, pairs, pad_id, batch_size)))
    choices, margin = [], 0.0
    for q in questions:
        own = [next(scores) / (len(option) if normalise else 1) for option in q.options]
        choices.append(max(range(len(own)), key=own.__getitem__))
        margin += own[q.answer] - max(score for index, score in enumerate(own) if index != q.answer)
    right = sum(choice == q.answer for choice, q in zip(choices, questions, strict=True))
    return Report(
        "accuracy", right / len(questions), len(questions), {"choices": choices, "margin": margin / len(questions)}
    )


def _scores(
    model: nn.Module, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int, batch_size: int
) -> Iterator[float]:
    """Sum the log-probabilities of each option behind its prompt."""
    for start in range(0, len(pairs), batch_size):
        part = pairs[start : start + batch_size]
        examples = [Example(0, [*p, *option], [IGNORED] * len(p) + list(option)) for p, option in part]
        logprobs, _, _ = _predictions(model, collate(examples, pad_id=pad_id))
        for own in torch.split(logprobs.double(), [len(option) for _, option in part]):
            yield float(own.sum())


def _predictions(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Give, for every labelled token in row order, its log-probability (float32), the likeliest token, and itself."""
    batch = batch.to(next(model.parameters()).device)
    with torch.no_grad():
        logits = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).logits[:, :-1]  # (B, T-1, V): the model at t predicts t + 1
    labels = batch.labels[:, 1:]
    counted = labels != IGNORED
    targets, chosen = labels[counted], logits[counted].float()  # (N,), (N, V)
    logprobs = chosen.gather(1, targets[:, None])[:, 0] - chosen.logsumexp(-1)
    return logprobs.cpu(), chosen.argmax(-1).cpu(), targets.cpu()
