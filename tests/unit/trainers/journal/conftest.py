"""Journals are written by the hundred here, and nothing of that has to outlive a power cut."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncs do nothing; tests of syncing count them, and processes of their own have real ones."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
