"""Every route is guarded, whatever its path and whoever added it."""

from __future__ import annotations

import re

import httpx
import pytest
from fastapi import APIRouter, FastAPI

from service.api.deps import endpoints, scope_of
from service.security import keys
from service.security.keys import SCOPES
from tests.api.fixtures import HOST

ALLOWED_WITHOUT_KEY = {"/healthz", "/readyz"}
OTHERS = {"read": "generate", "jobs": "read", "generate": "jobs", "admin": "jobs"}
FILLED = re.compile(r"\{[^}]+\}")


def routes(app: FastAPI) -> list[tuple[str, str, str | None]]:
    found = []
    for methods, path, endpoint in endpoints(app):
        for method in methods - {"HEAD"}:
            found.append((method, FILLED.sub("some-id", path), scope_of(endpoint)))
    return found


async def test_each_route_refuses_no_key_a_wrong_key_and_the_wrong_scope(app: FastAPI) -> None:
    wrong = {scope: keys.create(app.state.db, "t", [OTHERS[scope]])[1] for scope in SCOPES}
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url=f"http://{HOST}") as client:
        for method, path, scope in routes(app):
            bare = await client.request(method, path)
            if path in ALLOWED_WITHOUT_KEY:
                assert bare.status_code == 200 and scope is None, path
                continue
            assert scope in SCOPES, f"{method} {path} says nothing about its scope"
            assert bare.status_code == 401, f"{method} {path} answers {bare.status_code} without a key"
            assert bare.headers["WWW-Authenticate"] == "Bearer"
            forged = await client.request(method, path, headers={"Authorization": "Bearer gh-" + "x" * 43})
            assert forged.status_code == 401, f"{method} {path} answers {forged.status_code} to a forged key"
            for header in ("Basic Z2g6Z2g=", "Bearer", "Bearer ", f"bearer{wrong[scope]}", wrong[scope]):
                other = await client.request(method, path, headers={"Authorization": header})
                assert other.status_code == 401, f"{method} {path} takes {header!r}"
            narrow = await client.request(method, path, headers={"Authorization": f"Bearer {wrong[scope]}"})
            assert narrow.status_code == 403, f"{method} {path} answers {narrow.status_code} to another scope"
            assert narrow.json()["error"]["code"] == "insufficient_scope"


def test_the_allow_list_is_exactly_the_two_probes(app: FastAPI) -> None:
    assert {path for _, path, scope in routes(app) if scope is None} == ALLOWED_WITHOUT_KEY
    assert len(routes(app)) > 30


async def test_a_route_that_forgets_to_say_anything_needs_admin(app: FastAPI) -> None:
    late = APIRouter()

    @late.get("/forgotten")
    def forgotten() -> str:
        return "secret"

    @app.post("/direct")
    def direct() -> str:
        return "secret"

    app.include_router(late)
    reader = keys.create(app.state.db, "t", ["read", "jobs", "generate"])[1]
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url=f"http://{HOST}") as client:
        for method, path in (("GET", "/forgotten"), ("POST", "/direct")):
            assert (await client.request(method, path)).status_code == 401
            narrow = await client.request(method, path, headers={"Authorization": f"Bearer {reader}"})
            assert narrow.status_code == 403


@pytest.mark.parametrize("path", ["/healthz/", "//healthz", "/HEALTHZ", "/docs", "/redoc", "/v1"])
async def test_spellings_of_a_public_path_open_nothing(app: FastAPI, path: str) -> None:
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url=f"http://{HOST}") as client:
        assert (await client.get(path)).status_code in (401, 404)


async def test_a_wrong_key_in_the_body_or_query_is_no_key(app: FastAPI, key: str) -> None:
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url=f"http://{HOST}") as client:
        assert (await client.get(f"/v1/models?api_key={key}&access_token={key}")).status_code == 401
        assert (await client.get("/v1/models", headers={"Cookie": f"Authorization=Bearer {key}"})).status_code == 401
