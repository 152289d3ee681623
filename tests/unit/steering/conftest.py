"""Tiny models of three families, and vectors made up for them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from core.models.load import Loaded, load
from steering.vector import SteeringVector

FAMILIES = ("tiny-llama", "tiny-qwen3", "tiny-gemma3")


@pytest.fixture(scope="session")
def models() -> Callable[[str], Loaded]:
    """Load a catalog model once for the session; tests leave it as they found it."""
    cache: dict[str, Loaded] = {}

    def get(name: str = "tiny-llama") -> Loaded:
        if name not in cache:
            cache[name] = load(name)
        return cache[name]

    return get


@pytest.fixture(params=FAMILIES)
def loaded(request: pytest.FixtureRequest, models: Callable[[str], Loaded]) -> Loaded:
    return models(request.param)


@pytest.fixture(scope="session")
def make_vector() -> Callable[..., SteeringVector]:
    """Make a random vector that fits a model."""

    def make(loaded: Loaded, seed: int = 0, *, site: str = "block", layers: tuple[int, ...] = (0, 1)) -> SteeringVector:
        generator = torch.Generator().manual_seed(seed)
        width = loaded.model.config.hidden_size
        return SteeringVector(
            directions={layer: torch.randn(width, generator=generator) for layer in layers},
            site=site,
            fingerprint=loaded.fingerprint,
            base=str(loaded.ref),
            method="random",
            data_hash="sha256:0",
        )

    return make
