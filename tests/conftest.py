"""Shared set-up: quiet, deterministic threads before torch is imported, and a data folder of the session's own."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRADHELM_HOME"] = tempfile.mkdtemp(prefix="gradhelm-tests-")


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """Directory of the seeded two-layer Llama of the catalog."""
    from core.models.catalog import pull

    return pull("tiny-llama")
