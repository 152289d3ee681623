"""Data folders with the tiny model in them, and figures that are printed at the end."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chaos.server import Server

FIGURES: list[str] = []


@pytest.fixture
def home(tmp_path: Path, tiny_llama: Path) -> Path:
    """A data folder in which ``tiny-llama`` is a usable base."""
    home = tmp_path / "home"
    shutil.copytree(tiny_llama, home / "models" / "tiny-llama")
    return home


@pytest.fixture
def server(home: Path) -> Iterator[Server]:
    """A running server whose runs are stand-ins."""
    with Server(home) as server:
        yield server


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[Server]:
    """One running server for all tests of a file that leave it alive."""
    home = tmp_path_factory.mktemp("shared") / "home"
    shutil.copytree(tiny_llama, home / "models" / "tiny-llama")
    with Server(home, jobs={"log_quota_bytes": 8 << 20}) as server:
        yield server


@pytest.fixture
def figure() -> Callable[[str], None]:
    """Say a number that was measured."""
    return FIGURES.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if FIGURES:
        terminalreporter.section("figures")
        for line in FIGURES:
            terminalreporter.write_line(line)
