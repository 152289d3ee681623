"""A body of a mebibyte costs no more than its length, whatever is wrong with it; counted, not timed."""

from __future__ import annotations

import gc
import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
from pydantic import ValidationError

from service.api import errors, shape
from service.api.schemas.generation import ChatRequest
from service.api.schemas.resources import CreateJob, FitVector
from service.api.shape import MAX_ITEMS, MAX_KEYS, BoundedRoute, judge

CHAT, JOBS = "/v1/chat/completions", "/v1/fine_tuning/jobs"
JOB = {"model": "m", "training_file": "f"}
PART = {"type": "text", "text": "x"}


def names(count: int) -> dict[str, int]:
    return {f"a{i}": 1 for i in range(count)}


def chat(*contents: Any, **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": content} for content in contents], **more}


@pytest.mark.parametrize(
    ("route", "body"),
    [
        (CHAT, chat(*[[{}] * 250] * 1000)),
        (CHAT, chat("x", **names(95_000))),
        (CHAT, chat("x", steering={"vectors": [{"id": "v", **names(50_000)}]})),
        (CHAT, {"model": "m", "messages": [[]] * 200_000}),
        (JOBS, {**JOB, "hyperparameters": {"a": [[]] * 340_000}}),
        (JOBS, {**JOB, "metadata": {f"k{i}": "v" for i in range(60_000)}}),
    ],
    ids=["parts", "names", "names-inside", "messages", "values", "metadata"],
)
async def test_what_no_request_looks_like_is_refused_before_it_is_validated(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, route: str, body: Any
) -> None:
    def never(*_arguments: object) -> None:
        raise AssertionError("it was validated")

    data = json.dumps(body, separators=(",", ":")).encode()
    assert len(data) < 1 << 20
    monkeypatch.setattr(errors, "path_of", never)
    answer = await client.post(route, content=data, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "body_too_complex", answer.text[:300]


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (ChatRequest, {"model": "m", "messages": [{}] * 40_000}),
        (ChatRequest, {"model": "m", "messages": [{"role": "user", "content": [{}] * 256}] * 180}),
        (ChatRequest, chat("x", steering={"vectors": [{"id": 1, "layers": ["x"] * 500}] * 90})),
        (ChatRequest, chat("x", stop=[1] * 49_000, **names(120))),
        (CreateJob, {**JOB, "metadata": {f"k{i}": [[]] * 380 for i in range(MAX_KEYS)}, **names(100)}),
        (CreateJob, {**JOB, "hyperparameters": {f"k{i}": [float("inf")] * 380 for i in range(MAX_KEYS)}}),
        (FitVector, {"model": "m", "training_file": "f", "name": "n", "layers": ["x"] * 49_000}),
    ],
)
def test_what_passes_has_few_faults_to_name(model: Any, body: Any) -> None:
    assert judge(body) <= MAX_ITEMS
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    assert caught.value.error_count() <= 3 * MAX_KEYS


def test_the_count_stops_where_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape, "MAX_ITEMS", 6)
    assert judge({"a": [1, {"b": None}], "c": "x"}) == 5
    assert judge("text") == judge([]) == 0
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(errors.APIError, match="more than 6 values"):
        judge(deep)


def test_the_longest_honest_chats_pass() -> None:
    for body in (chat(*[[PART]] * 4096), chat(*[[PART] * 256] * 16)):
        assert judge(body) <= MAX_ITEMS
        ChatRequest.model_validate(body)
    with pytest.raises(ValidationError, match="4096 parts"):
        ChatRequest.model_validate(chat(*[[PART] * 256] * 17))


def test_the_fault_to_tell_is_looked_for_among_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Any] = []
    path_of = errors.path_of
    monkeypatch.setattr(errors, "path_of", lambda *place: looked.append(place) or path_of(*place))
    fault = {"type": "int_type", "loc": ("body", "a"), "msg": "should be a number"}
    answer = errors._validation_error(None, RequestValidationError([fault] * 5000, body={"a": "x"}))  # type: ignore[arg-type]
    assert answer.status_code == 400 and len(looked) <= 60


async def test_the_collector_of_garbage_rests_while_a_body_is_parsed_and_no_longer(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    rested: list[bool] = []
    monkeypatch.setattr(shape, "judge", lambda _content: rested.append(not gc.isenabled()))
    for content in (b"{}", b"{"):
        await client.post(CHAT, content=content, headers={"Content-Type": "application/json"})
        assert gc.isenabled()
    assert rested == [True, True]


async def test_a_body_that_is_no_json_is_told_as_before(client: httpx.AsyncClient) -> None:
    headers = {"Content-Type": "application/json"}
    for content in (b"{", b"\xff", b"[" * 500_000, b'{"model": ' + b"1" * 5000 + b"}"):
        answer = await client.post(CHAT, content=content, headers=headers)
        assert answer.status_code == 400, answer.text


def test_every_route_with_a_body_looks_at_it_first(app: FastAPI) -> None:
    routes = [context.original_route for context in iter_route_contexts(app.routes)]
    found = [route for route in routes if getattr(route, "body_field", None) is not None]
    assert len(found) >= 6
    assert all(isinstance(route, BoundedRoute) for route in found)
