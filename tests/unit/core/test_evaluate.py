"""Perplexity and choices, against sums written out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from core.data.batch import collate, pack
from core.data.example import IGNORED, Example
from core.evaluate import Question, classify, perplexity
from core.models.load import load

ROWS = [
    Example(1, [5, 6, 7, 8, 9, 10], [IGNORED, IGNORED, 7, 8, 9, 10]),
    Example(2, [300, 301], [IGNORED, 301]),
    Example(3, [40, 41, 42, 43], [IGNORED, 41, IGNORED, 43]),
]


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> nn.Module:
    made = load(str(tiny_llama)).model
    assert isinstance(made, nn.Module)
    return made


def logprobs(model: nn.Module, ids: list[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """(T, V) log-probabilities of one unpadded text, normalised in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double().numpy()
    logits = logits - logits.max(-1, keepdims=True)
    made: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return made


def test_perplexity_weights_by_token(model: nn.Module) -> None:
    losses, hits = [], 0
    for row in ROWS:
        table = logprobs(model, row.input_ids)
        for place in range(1, len(row.input_ids)):
            if row.labels[place] != IGNORED:
                losses.append(-table[place - 1, row.labels[place]])
                hits += int(table[place - 1].argmax() == row.labels[place])
    report = perplexity(model, [collate(ROWS[:2], pad_id=0), collate(ROWS[2:], pad_id=0)])
    assert report.items == len(losses) == 7
    assert report.details["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert report.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert report.details["accuracy"] == hits / 7


def test_perplexity_does_not_depend_on_how_rows_are_put_together(model: nn.Module) -> None:
    together = perplexity(model, [collate(ROWS, pad_id=0)])
    alone = perplexity(model, [collate([row], pad_id=0) for row in ROWS])
    packed = perplexity(model, [collate(pack(ROWS, 12), pad_id=0)])
    assert alone.value == pytest.approx(together.value, rel=1e-6)
    assert packed.value == pytest.approx(together.value, rel=1e-6)
    assert packed.items == together.items


def test_perplexity_needs_a_labelled_token(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="labelled"):
        perplexity(model, [collate([Example(1, [5, 6], [IGNORED] * 2)], pad_id=0)])


QUESTIONS = [
    Question([5, 6, 7], [[8], [9, 10, 11]], 0),
    Question([300], [[301, 302], [7], [600, 601, 602, 603]], 2),
    Question([40, 41], [[42, 43], [43, 42]], 1),
]


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_likeliest_option_is_chosen(model: nn.Module, normalise: bool, batch_size: int) -> None:
    choices, margins = [], []
    for question in QUESTIONS:
        scores = []
        for option in question.options:
            table = logprobs(model, [*question.prompt, *option])
            start = len(question.prompt) - 1
            score = sum(table[start + i, token] for i, token in enumerate(option))
            scores.append(score / len(option) if normalise else score)
        choices.append(int(np.argmax(scores)))
        margins.append(scores[question.answer] - max(s for i, s in enumerate(scores) if i != question.answer))
    report = classify(model, QUESTIONS, pad_id=0, batch_size=batch_size, normalise=normalise)
    right = [choice == question.answer for choice, question in zip(choices, QUESTIONS, strict=True)]
    assert report.name == "accuracy"
    assert report.details["choices"] == choices
    assert report.value == sum(right) / 3
    assert report.details["margin"] == pytest.approx(np.mean(margins), rel=1e-5)
    assert report.items == 3


def test_normalising_changes_who_wins_when_lengths_differ(model: nn.Module) -> None:
    # Sums favour short labels: one token of a random model costs about ln 1024, three cost three times that.
    question = Question([5, 6, 7], [[8], [9, 10, 11]], 0)
    plain = classify(model, [question], pad_id=0)
    assert plain.details["choices"] == [0]
    assert plain.details["margin"] > classify(model, [question], pad_id=0, normalise=True).details["margin"]


BAD = [
    ([], "no question"),
    ([Question([5], [[6]], 0)], "two or more options"),
    ([Question([], [[6], [7]], 0)], "a prompt"),
    ([Question([5], [[6], []], 0)], "with tokens"),
    ([Question([5], [[6], [7]], 2)], "answer's index"),
]


@pytest.mark.parametrize(("questions", "words"), BAD)
def test_questions_that_cannot_be_asked(model: nn.Module, questions: list[Question], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        classify(model, questions, pad_id=0)
