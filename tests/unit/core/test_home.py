"""Where the data folder is."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.home import home


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRADHELM_HOME", str(tmp_path / "here"))
    assert home() == tmp_path / "here"
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("value", [None, ""])
def test_without_it_the_users_home_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str | None) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    if value is None:
        monkeypatch.delenv("GRADHELM_HOME")
    else:
        monkeypatch.setenv("GRADHELM_HOME", value)
    assert home() == tmp_path / ".gradhelm"


def test_relative_and_tilde_paths_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADHELM_HOME", "data")
    assert home() == tmp_path / "data"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GRADHELM_HOME", "~/data")
    assert home() == tmp_path / "data"
