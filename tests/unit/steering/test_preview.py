"""Continuations: transformers' own greedy ones where nothing steers, those of plain hooks where it does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from core.models.load import Loaded
from steering.apply import RowSpec, SteeringError, Term
from steering.preview import preview
from steering.vector import SteeringVector
from tests.unit.steering.runs import run_plain

PROMPTS = ([5, 6, 7, 8, 9], [110, 11, 12])


def test_rows_are_continued_as_alone(loaded: Loaded, make_vector: Callable[..., SteeringVector]) -> None:
    spec = RowSpec((Term(make_vector(loaded), 0.5),))
    plain, steered = preview(loaded, [(PROMPTS[0], None), (PROMPTS[1], spec)], max_tokens=6)
    with torch.no_grad():
        expected = loaded.model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=6, do_sample=False)[0, 5:]
    ends = loaded.model.generation_config.eos_token_id
    assert plain.tokens == [t for t in expected.tolist() if t != ends]
    alone, _ = run_plain(loaded, PROMPTS[1], spec, steps=6)
    assert steered.tokens == alone.tokens[0][: len(steered.tokens)]
    assert plain.text == loaded.tokenizer.decode(plain.tokens)
    assert plain.receipt is None
    assert steered.receipt is not None
    assert steered.receipt.tokens == len(PROMPTS[1]) + len(steered.tokens) - 1


def test_a_row_that_has_ended_is_not_touched_any_more(
    models: Callable[..., Loaded], make_vector: Callable[..., SteeringVector]
) -> None:
    loaded = models()
    spec = RowSpec((Term(make_vector(loaded), 0.5),))
    rows: list[tuple[list[int], RowSpec | None]] = [(PROMPTS[0], spec), (PROMPTS[1], spec)]
    first, second = preview(loaded, rows, max_tokens=6)
    end = next(token for token in first.tokens[1:] if token not in second.tokens)
    short, other = preview(loaded, rows, max_tokens=6, stop=[end])
    assert short.tokens == first.tokens[: first.tokens.index(end)]
    assert short.receipt is not None
    assert short.receipt.tokens == len(PROMPTS[0]) + len(short.tokens)
    assert other == second


def test_what_cannot_be_continued(models: Callable[..., Loaded], make_vector: Callable[..., SteeringVector]) -> None:
    loaded = models()
    for rows, most in (([], 3), ([([], None)], 3), ([([5], None)], 0)):
        with pytest.raises(ValueError, match="at least one"):
            preview(loaded, rows, max_tokens=most)
    spec = RowSpec((Term(make_vector(loaded), 1.0, None, "generated"),))
    with pytest.raises(SteeringError, match="touches nothing"):
        preview(loaded, [([5, 6], spec)], max_tokens=1)
