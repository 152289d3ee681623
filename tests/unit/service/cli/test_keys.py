"""Keys are made and ended on the database itself, without a server."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.service.cli.conftest import Run


def test_a_key_is_shown_once_and_listed_without_its_secret(run: Run) -> None:
    assert "keys create" in run("keys", "list").err
    made = run("keys", "create", "--name", "site", "--scope", "generate", "--scope", "read", "--days", 2)
    secret = made.out.strip()
    assert secret.startswith("gh-")
    assert "not shown again" in made.err
    rows = run("keys", "list", "--json").json
    assert [(row["name"], row["scopes"]) for row in rows] == [("site", ["generate", "read"])]
    assert rows[0]["expires_at"] - rows[0]["created_at"] == 2 * 86_400
    assert secret not in run("keys", "list").out
    assert "site" in run("keys", "list").out


def test_a_revoked_key_is_over(run: Run) -> None:
    made = run("keys", "create", "--json").json
    assert made["scopes"] == ["generate", "jobs", "read"]
    assert run("keys", "revoke", made["id"], "--json").json == {"id": made["id"], "revoked": True}
    again = run("keys", "revoke", made["id"])
    assert (again.code, "keys list" in again.err) == (1, True)
    assert run("keys", "list", "--json").json[0]["revoked_at"] is not None


def test_an_unknown_scope_is_wrong_usage(run: Run) -> None:
    result = run("keys", "create", "--scope", "everything")
    assert result.code == 2
    assert "read, jobs, generate, admin" in result.err


def test_a_folder_that_cannot_be_used_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADHELM_HOME", "/dev/null/home")
    result = run("keys", "create")
    assert result.code == 1
    assert "GRADHELM_HOME" in result.err


def test_a_look_makes_no_database(run: Run, tmp_path: Path) -> None:
    listed = run("keys", "list")
    assert listed.code == 0 and str(tmp_path / "home") in listed.err
    assert run("keys", "list", "--json").json == []
    revoked = run("keys", "revoke", "key_x")
    assert revoked.code == 1 and str(tmp_path / "home") in revoked.err
    assert not (tmp_path / "home").exists()
