"""Keys are safe at rest, in comparison and in the log."""

from __future__ import annotations

import io
import json
import logging
import re
import sqlite3
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import structlog
from fastapi import FastAPI

from service import log
from service.app import create_app
from service.db.engine import connect
from service.engines.fake import FakeEngine
from service.security import keys
from service.settings import Settings
from tests.api.fixtures import IdleScheduler


def test_the_admin_key_is_only_its_owners_to_read(settings: Settings, app: FastAPI) -> None:
    path = settings.home / "admin.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    text = path.read_text().strip()
    assert re.fullmatch(r"gh-[A-Za-z0-9_-]{43}", text)
    identity = keys.identify(app.state.db, text)
    assert identity is not None and identity.may("admin") and identity.may("generate")


async def test_a_second_start_keeps_the_key_and_a_lost_database_gets_a_new_one(
    settings: Settings, app: FastAPI, key: str
) -> None:
    again = create_app(settings, engine=FakeEngine(), scheduler=IdleScheduler())
    async with again.router.lifespan_context(again):
        assert (settings.home / "admin.key").read_text().strip() == key
    other = settings.model_copy(update={"database_url": f"sqlite:///{settings.home / 'other.db'}"})
    third = create_app(other, engine=FakeEngine(), scheduler=IdleScheduler())
    async with third.router.lifespan_context(third):
        fresh = (settings.home / "admin.key").read_text().strip()
        assert fresh != key and keys.identify(third.state.db, fresh) is not None
        assert keys.identify(third.state.db, key) is None


async def test_no_key_is_in_the_database_or_its_dump(
    settings: Settings, app: FastAPI, client: httpx.AsyncClient
) -> None:
    made = [(await client.post("/v1/keys", json={"name": f"k{n}", "scopes": ["read"]})).json() for n in range(3)]
    secret = [one["key"] for one in made] + [(settings.home / "admin.key").read_text().strip()]
    with sqlite3.connect(settings.home / "gradhelm.db") as connection:
        dump = "\n".join(connection.iterdump())
    connection.close()
    files = b"".join(path.read_bytes() for path in settings.home.glob("gradhelm.db*"))
    for one in secret:
        assert one not in dump and one[3:20] not in dump
        assert one.encode() not in files
    listed = (await client.get("/v1/keys")).text
    assert not any(one in listed for one in secret)


def test_a_key_is_compared_in_constant_time_after_it_was_found(
    app: FastAPI, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[str, str]] = []
    real = keys.hmac.compare_digest

    def compare(a: str, b: str) -> bool:
        compared.append((a, b))
        return bool(real(a, b))

    monkeypatch.setattr(keys.hmac, "compare_digest", compare)
    assert keys.identify(app.state.db, key) is not None
    assert len(compared) == 1 and compared[0][0] == compared[0][1] and key not in compared[0]


@pytest.mark.parametrize("text", ["", "gh-", "gh-" + "a" * 42, "gh-" + "a" * 44, "gh-" + "é" * 43, "'; --", "\ud800"])
def test_what_is_no_key_is_nobody(app: FastAPI, text: str) -> None:
    assert keys.identify(app.state.db, text) is None


async def test_revoked_and_expired_keys_are_refused(app: FastAPI, client: httpx.AsyncClient) -> None:
    made = (await client.post("/v1/keys", json={"name": "old", "scopes": ["read"], "expires_at": 1})).json()
    assert keys.identify(app.state.db, made["key"]) is None
    good = (await client.post("/v1/keys", json={"name": "new", "scopes": ["read"]})).json()
    headers = {"Authorization": f"Bearer {good['key']}"}
    assert (await client.get("/v1/models", headers=headers)).status_code == 200
    listed = {one["id"]: one for one in (await client.get("/v1/keys")).json()["data"]}
    assert listed[good["id"]]["last_used_at"] >= good["created_at"] and listed[made["id"]]["last_used_at"] is None
    assert (await client.delete(f"/v1/keys/{good['id']}")).json()["deleted"]
    assert (await client.get("/v1/models", headers=headers)).status_code == 401
    assert (await client.delete(f"/v1/keys/{good['id']}")).status_code == 404


@pytest.mark.parametrize("scopes", [[], ["root"], ["read", "root"], "read"])
async def test_unknown_scopes_make_no_key(client: httpx.AsyncClient, scopes: object) -> None:
    answer = await client.post("/v1/keys", json={"name": "x", "scopes": scopes})
    assert answer.status_code == 400 and answer.json()["error"]["param"].startswith("scopes")


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """The log as it is in production, into memory."""
    root, out = logging.getLogger(), io.StringIO()
    handlers, level, config = list(root.handlers), root.level, structlog.get_config()
    monkeypatch.setattr(sys, "stdout", out)
    log.configure("debug")
    yield out
    root.handlers[:], root.level = handlers, level
    structlog.configure(**config)


async def test_keys_and_bodies_are_never_logged(
    lines: io.StringIO, app: FastAPI, key: str, client: httpx.AsyncClient, base: str, settings: Settings
) -> None:
    secret_text = "my-private-words"
    body = {"model": base, "messages": [{"role": "user", "content": secret_text}]}
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    assert (await client.get("/v1/models", headers={"Authorization": "Bearer gh-" + "w" * 43})).status_code == 401
    made = (await client.post("/v1/keys", json={"name": "k", "scopes": ["read"]})).json()["key"]
    structlog.get_logger("x").warning("careless", token=f"Bearer {key}", note=f"{made}")
    logging.getLogger("other").error("careless too: %s", key)
    text = lines.getvalue()
    assert key not in text and made not in text and secret_text not in text and "w" * 43 not in text
    parsed = [json.loads(line) for line in text.splitlines()]
    requests = [one for one in parsed if one["event"] == "request"]
    assert len(requests) == 3 and all(one["request_id"] and one["route"] and one["status"] for one in requests)
    assert [bool(one["key_id"]) for one in requests] == [True, False, True], "who asked, by the key's id"
    assert "gh-***" in text


async def test_the_first_start_says_where_the_key_is_and_not_what_it_is(lines: io.StringIO, tmp_path: Path) -> None:
    app = create_app(Settings(home=tmp_path / "fresh"), engine=FakeEngine(), scheduler=IdleScheduler())
    async with app.router.lifespan_context(app):
        text = (tmp_path / "fresh" / "admin.key").read_text().strip()
    assert str(tmp_path / "fresh" / "admin.key") in lines.getvalue() and text not in lines.getvalue()


async def test_a_lost_admin_key_comes_back_unless_somebody_made_another(lines: io.StringIO, tmp_path: Path) -> None:
    path = tmp_path / "home" / "admin.key"

    async def start() -> tuple[bool, object]:
        app = create_app(Settings(home=path.parent), engine=FakeEngine(), scheduler=IdleScheduler())
        lines.truncate(0)
        async with app.router.lifespan_context(app):
            if path.is_file():
                identity = keys.identify(app.state.db, path.read_text().strip())
                assert identity is not None and identity.may("admin")
        said = [json.loads(line) for line in lines.getvalue().replace("\x00", "").splitlines()]
        return path.is_file(), next(one["admin_key"] for one in said if one["event"] == "started")

    assert await start() == (True, str(path))
    first = path.read_text()
    path.unlink()
    assert await start() == (True, str(path))
    assert path.read_text() != first
    engine = connect(f"sqlite:///{path.parent / 'gradhelm.db'}")
    keys.create(engine, "expired", ["admin"], expires_at=1)
    path.unlink()
    assert await start() == (True, str(path))
    keys.create(engine, "mine", ["admin"])
    path.unlink()
    assert await start() == (False, None)
    engine.dispose()


async def test_a_data_folder_that_others_can_open_is_closed_to_them(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o755)
    home.chmod(0o755)
    app = create_app(Settings(home=home), engine=FakeEngine(), scheduler=IdleScheduler())
    async with app.router.lifespan_context(app):
        assert home.stat().st_mode & 0o777 == 0o700
