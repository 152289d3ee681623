"""Fixtures of the tests that attack the API."""

from __future__ import annotations

from tests.api.fixtures import app, base, client, engine, key, settings

__all__ = ["app", "base", "client", "engine", "key", "settings"]
