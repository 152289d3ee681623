"""Tokenizers and models of the three tiny families."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from core.models.load import Loaded

FAMILIES = ("tiny-llama", "tiny-qwen3", "tiny-gemma3")


@pytest.fixture(scope="session", params=FAMILIES)
def loaded(request: pytest.FixtureRequest) -> Loaded:
    """One tiny model after the other."""
    from core.models.load import load

    return load(request.param)
