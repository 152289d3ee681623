"""Which columns a token sees, compared with the definition."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from service.engines.masks import Masks


def seen(mask: Any, row: int, token: int) -> list[int]:
    return torch.nonzero(mask[row, 0, token] == 0).flatten().tolist()


@pytest.mark.parametrize("window", [1, 3])
def test_a_window_of_n_is_the_token_and_the_n_minus_one_before_it(window: int) -> None:
    positions = torch.tensor([[4, 5], [0, 1]])
    kinds = ["sliding_attention", "full_attention"]
    config: dict[str, Any] = {"sliding_window": window, "layer_types": kinds}
    per_kind: Any = Masks(SimpleNamespace(model_type="gemma3_text", **config), torch.float32).build(positions, 8)
    one = Masks(SimpleNamespace(model_type="mistral", **config), torch.float32).build(positions, 8)
    for row in (0, 1):
        for token in (0, 1):
            at = int(positions[row, token])
            assert seen(per_kind["full_attention"], row, token) == list(range(at + 1))
            near = list(range(max(0, at - window + 1), at + 1))
            assert seen(per_kind["sliding_attention"], row, token) == near
            assert seen(one, row, token) == near


def test_the_window_is_that_of_transformers() -> None:
    from transformers.masking_utils import sliding_window_overlay

    inside = sliding_window_overlay(3)
    mask: Any = Masks(SimpleNamespace(model_type="mistral", sliding_window=3), torch.float32).build(
        torch.arange(9).unsqueeze(0), 9
    )
    for at in range(9):
        assert seen(mask, 0, at) == [c for c in range(at + 1) if inside(0, 0, at, c)]
