"""Every error has one shape and the right status, says what to do, and shows nothing of the inside."""

from __future__ import annotations

import errno
import json
import sqlite3
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service.api import errors
from service.api.deps import public
from service.settings import Settings

SHAPE = {"message", "type", "param", "code"}


def checked(answer: httpx.Response, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"} and set(answer.json()["error"]) == SHAPE
    error: dict[str, Any] = answer.json()["error"]
    assert error["code"] == code and error["param"] == param, error
    assert len(error["message"]) > 10
    return error


async def test_a_route_that_does_not_exist(client: httpx.AsyncClient) -> None:
    checked(await client.get("/v1/nothing"), 404, "not_found")
    checked(await client.get("/"), 404, "not_found")


async def test_a_method_that_is_not_allowed(client: httpx.AsyncClient) -> None:
    answer = await client.put("/v1/models")
    checked(answer, 405, "method_not_allowed")
    assert "GET" in answer.headers["Allow"]


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"{", "invalid_json", None),
        (b"", "missing_required_parameter", None),
        (b"[]", "invalid_value", None),
        (b"null", "invalid_value", None),
        (b"{}", "missing_required_parameter", "model"),
        (b'{"model": "m"}', "missing_required_parameter", "messages"),
        (b'{"model": 1, "messages": []}', "invalid_value", "model"),
        (b'{"model": "m", "messages": [{"role": "user"}]}', "missing_required_parameter", "messages.0.content"),
        (b'{"model": "m", "messages": [{"role": "king", "content": "x"}]}', "invalid_value", "messages.0.role"),
        (
            b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": []}',
            "unsupported_parameter",
            "tools",
        ),
        (
            b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
            "invalid_value",
            "temperature",
        ),
        (
            b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": Infinity}',
            "invalid_value",
            "temperature",
        ),
        (
            b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "stream_options": {}}',
            "invalid_value",
            None,
        ),
        (
            b'{"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}',
            "invalid_value",
            "messages.0.content.0.text",
        ),
        (
            b'{"model": "m", "messages": [{"role": "user", "content": [{"type": "text"}]}]}',
            "missing_required_parameter",
            "messages.0.content.0.text",
        ),
        (b'{"model": "m", "messages": [{"role": "user", "content": 5}]}', "invalid_value", "messages.0.content"),
        (b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "stop": 5}', "invalid_value", "stop"),
        (b'{"model": "m\\u0000", "messages": []}', "invalid_value", "model"),
        (b'{"\\ud800": 1}', "unsupported_parameter", "\\ud800"),
        (b'{"model": "m", "model": "n", "\xff": 1}', "invalid_json", None),
        (b"\xff\xfe", "invalid_json", None),
    ],
)
async def test_bad_bodies_are_400_and_name_the_parameter(
    client: httpx.AsyncClient, body: bytes, code: str, param: str | None
) -> None:
    answer = await client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    found = answer.json()["error"]
    assert found["type"] == "invalid_request_error"
    if body == b'{"\\ud800": 1}':
        assert set(found) == SHAPE  # which of its faults is named first does not matter
    elif code == "invalid_json":
        assert found["code"] in ("invalid_json", "invalid_request")
    else:
        assert (found["code"], found["param"]) == (code, param), found


async def test_null_means_not_given(client: httpx.AsyncClient, base: str) -> None:
    body = {
        "model": base,
        "messages": [
            {"role": "assistant", "content": "a", "refusal": None, "tool_calls": None},
            {"role": "user", "content": "x"},
        ],
        "tools": None,
        "stop": None,
        "n": None,
        "temperature": None,
        "response_format": None,
    }
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 200


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "limit=99999", "limit=1.5", "after=" + "x" * 100])
async def test_bad_queries(client: httpx.AsyncClient, query: str) -> None:
    answer = await client.get(f"/v1/fine_tuning/jobs?{query}")
    assert answer.status_code == 400 and answer.json()["error"]["param"] in ("limit", "after")


async def test_what_we_did_not_foresee_is_a_500_that_tells_nothing(app: FastAPI, client: httpx.AsyncClient) -> None:
    @app.get("/boom")
    @public
    def boom() -> None:
        raise RuntimeError("a secret of the inside")

    @app.get("/late")
    @public
    async def late() -> None:
        raise ExceptionGroup("several", [RuntimeError("a secret of the inside")])

    for path in ("/boom", "/late"):
        answer = await client.get(path, headers={"X-Request-Id": "my-id-1"})
        error = checked(answer, 500, "internal_error")
        assert error["type"] == "server_error" and "my-id-1" in error["message"]
        assert "secret" not in answer.text and "Traceback" not in answer.text and ".py" not in answer.text
        assert answer.headers["X-Request-Id"] == "my-id-1"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


async def test_a_request_id_that_is_not_plain_is_replaced(client: httpx.AsyncClient) -> None:
    for sent in ("a" * 65, "a b", "<script>", ""):
        answer = await client.get("/healthz", headers={"X-Request-Id": sent})
        assert answer.headers["X-Request-Id"].startswith("req_")


async def test_a_full_disk_is_told_and_not_a_500(app: FastAPI, client: httpx.AsyncClient) -> None:
    @app.get("/full")
    @public
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    checked(await client.get("/full"), 507, "disk_full")


async def test_a_locked_database_is_a_503_that_says_when(
    app: FastAPI, client: httpx.AsyncClient, settings: Settings, base: str
) -> None:
    holder = sqlite3.connect(settings.home / "gradhelm.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    try:
        answer = await client.post("/v1/keys", json={"name": "x", "scopes": ["read"]})
        checked(answer, 503, "database_unavailable")
        assert int(answer.headers["Retry-After"]) >= 1
        assert (await client.get("/v1/fine_tuning/jobs")).status_code == 200, "reading goes on"
    finally:
        holder.execute("ROLLBACK")
        holder.close()
    assert (await client.post("/v1/keys", json={"name": "x", "scopes": ["read"]})).status_code == 200


async def test_readiness_needs_the_database(app: FastAPI, client: httpx.AsyncClient) -> None:
    assert (await client.get("/readyz")).json() == {"status": "ready"}
    app.state.draining.begin()
    answer = await client.get("/readyz")
    checked(answer, 503, "server_stopping")
    assert (await client.get("/healthz")).json() == {"status": "ok", "service": "gradhelm"}


def test_half_a_surrogate_pair_can_be_told() -> None:
    made = errors.body(400, "bad \ud800 text", code="x", param="p\udfff")
    assert json.dumps(made, ensure_ascii=False).encode()


async def test_metrics_count_what_happened(client: httpx.AsyncClient, base: str) -> None:
    body = {"model": base, "messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "n": 2}
    await client.post("/v1/chat/completions", json=body)
    await client.post("/v1/chat/completions", json={**body, "messages": [{"role": "user", "content": "y " * 5000}]})
    await client.get("/v1/models", headers={"Authorization": "Bearer gh-" + "x" * 43})
    text = (await client.get("/metrics")).text
    for line in (
        'gradhelm_generations_total{outcome="finished"} 1.0',
        'gradhelm_generations_total{outcome="failed"} 1.0',
        "gradhelm_generated_tokens_total 6.0",
        "gradhelm_generations_in_flight 0.0",
        'gradhelm_auth_failures_total{reason="key"} 1.0',
        'gradhelm_jobs{status="running"} 0.0',
        'gradhelm_http_requests_total{method="POST",route="/v1/chat/completions",status="400"} 1.0',
    ):
        assert line in text, line


@pytest.mark.parametrize("prompt", [5, {}, "a\x00", ["a", "b"], []])
async def test_a_prompt_is_named_without_its_types(client: httpx.AsyncClient, prompt: Any) -> None:
    checked(await client.post("/v1/completions", json={"model": "m", "prompt": prompt}), 400, "invalid_value", "prompt")
