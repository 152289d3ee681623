"""A browser cannot be used against us: every unsafe method, from every foreign origin and under every foreign name."""

from __future__ import annotations

import itertools

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from service.api.deps import endpoints
from service.security.hosts import HostPolicy, host_name
from tests.api.fixtures import HOST

UNSAFE = ("POST", "PUT", "PATCH", "DELETE", "TRACE", "CONNECT", "PROPFIND", "delete", "MADEUP")
FOREIGN_HOSTS = (
    "evil.example",
    "evil.example:8000",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "127.0.0.1@evil.example",
    "evil.example#127.0.0.1",
    "evil.example?127.0.0.1",
    "127.0.0.1, evil.example",
    "0.0.0.0:8000",
    "127.0.0.2",
    "2130706433",
    "[::2]",
    "[::1",
    "localhost:99999999",
    "localhost:x",
    "",
)
FOREIGN_ORIGINS = (
    "https://evil.example",
    "http://evil.example:8000",
    "null",
    "http://localhost:3000",
    "https://127.0.0.1:8000",
    f"http://{HOST}.evil.example",
    "http://127.0.0.1",
    "file://",
    "",
)


async def call(app: FastAPI, method: str, path: str, headers: dict[str, str]) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url=f"http://{HOST}") as client:
        return await client.request(method, path, headers=headers)


def paths(app: FastAPI) -> list[str]:
    return sorted({path.replace("{", "").replace("}", "").replace(":path", "") for _, path, _ in endpoints(app)})


async def test_a_foreign_host_is_refused_on_every_route_and_method(app: FastAPI, key: str) -> None:
    good = {"Authorization": f"Bearer {key}"}
    for path in paths(app):
        for method in ("GET", *UNSAFE[:4]):
            answer = await call(app, method, path, {**good, "Host": "evil.example"})
            assert answer.status_code == 403, f"{method} {path}"
            assert answer.json()["error"]["code"] == "forbidden_origin"


async def test_a_foreign_origin_is_refused_on_every_unsafe_method(app: FastAPI, key: str) -> None:
    good = {"Authorization": f"Bearer {key}"}
    for path in paths(app):
        for method in UNSAFE:
            answer = await call(app, method, path, {**good, "Origin": "https://evil.example"})
            assert answer.status_code == 403, f"{method} {path}"


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
async def test_hosts_that_are_not_ours(app: FastAPI, key: str, host: str) -> None:
    answer = await call(app, "GET", "/v1/models", {"Authorization": f"Bearer {key}", "Host": host})
    assert answer.status_code == 403


@pytest.mark.parametrize("origin", FOREIGN_ORIGINS)
async def test_origins_that_are_not_ours(app: FastAPI, key: str, origin: str) -> None:
    good = {"Authorization": f"Bearer {key}"}
    answer = await call(app, "DELETE", "/v1/files/file-x", {**good, "Origin": origin})
    assert answer.status_code == 403
    seen = await call(app, "GET", "/v1/models", {**good, "Origin": origin})
    assert "access-control-allow-origin" not in seen.headers, "the browser shows the answer to nobody"


async def test_no_origin_with_a_cookie_or_from_another_site(app: FastAPI, key: str) -> None:
    good = {"Authorization": f"Bearer {key}"}
    route = "/v1/files/file-x"
    assert (await call(app, "DELETE", route, {**good, "Cookie": "a=b"})).status_code == 403
    for site in ("cross-site", "same-site", "what"):
        assert (await call(app, "DELETE", route, {**good, "Sec-Fetch-Site": site})).status_code == 403
    assert (await call(app, "DELETE", route, {**good, "Sec-Fetch-Site": "none"})).status_code == 404


async def test_our_own_page_and_no_browser_at_all_may(app: FastAPI, key: str) -> None:
    good = {"Authorization": f"Bearer {key}"}
    for extra in ({}, {"Origin": f"http://{HOST}"}, {"Host": "localhost:8000", "Origin": "http://localhost:8000"}):
        answer = await call(app, "DELETE", "/v1/files/file-x", {**good, **extra})
        assert answer.status_code == 404, extra


async def test_a_preflight_gets_no_permission(app: FastAPI) -> None:
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "DELETE"}
    answer = await call(app, "OPTIONS", "/v1/files/file-x", headers)
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_answers_carry_what_browsers_need_to_be_told(app: FastAPI, key: str) -> None:
    for path, status in (("/healthz", 200), ("/v1/models", 401), ("/nowhere", 404)):
        answer = await call(app, "GET", path, {})
        assert answer.status_code == status
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Content-Security-Policy"] == "default-src 'none'; frame-ancestors 'none'"
        assert answer.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("localhost", "localhost"),
        ("LOCALHOST:80", "localhost"),
        ("localhost.", "localhost"),
        ("127.0.0.1:8000", "127.0.0.1"),
        ("[::1]:8000", "::1"),
        ("gpu.example.org", "gpu.example.org"),
        ("a b", None),
        ("a/b", None),
        ("a\\b", None),
        ("u@a", None),
        ("[::1", None),
        ("a:b", None),
    ],
)
def test_a_host_header_is_read_in_one_way(header: str, name: str | None) -> None:
    assert host_name(header) == name


@pytest.mark.parametrize("bind", ["0.0.0.0", "::", ""])
def test_listening_everywhere_opens_no_name(bind: str) -> None:
    policy = HostPolicy(bind, ["gpu.example.org"], ["https://console.example.org/"])
    assert policy.hosts == {"localhost", "127.0.0.1", "::1", "gpu.example.org"}
    headers = {"host": ["gpu.example.org"], "origin": ["https://console.example.org"]}
    assert policy.refusal("POST", "http", headers) is None
    assert policy.refusal("POST", "http", {**headers, "host": ["gpu.example.org", "localhost"]}) is not None
    assert policy.refusal("GET", "http", {}) is not None


@given(st.text(max_size=60), st.sampled_from(["GET", "POST", "DELETE"]))
def test_no_text_but_our_names_is_a_host_of_ours(text: str, method: str) -> None:
    policy = HostPolicy("127.0.0.1", [], [])
    if policy.refusal(method, "http", {"host": [text]}) is None:
        name = text.lower().rpartition(":")[0] if text.count(":") == 1 else text.lower()
        assert name.rstrip(".").strip("[]") in {"localhost", "127.0.0.1", "::1", ""} or name.startswith("[::1]")


def test_every_pair_of_foreign_host_and_origin_is_refused() -> None:
    policy = HostPolicy("127.0.0.1", [], [])
    for host, origin, method in itertools.product(FOREIGN_HOSTS, FOREIGN_ORIGINS, UNSAFE):
        assert policy.refusal(method, "http", {"host": [host], "origin": [origin]}) is not None
