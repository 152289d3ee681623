"""Wrong names over HTTP are answered with the nearest right one and the list, to those who may see it."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from core.models.catalog import CATALOG
from service.api import methods
from service.db.engine import write
from service.db.tables import Model
from service.security import keys
from tests.api.test_jobs import create

TUNED = "ft:tiny-llama:local:tickets:abcd1234"


def said(answer: httpx.Response, status: int, code: str) -> str:
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code), error
    return str(error["message"])


@pytest.fixture
def tuned(app: FastAPI) -> str:
    row = Model(id=TUNED, kind="adapter", base="tiny-llama", path="/gone", key_id="k", created_at=1, manifest={})
    with write(app.state.db) as session:
        session.add(row)
    return TUNED


@pytest.mark.parametrize(
    ("method", "code", "meant"),
    [
        ({"type": "lroa"}, "unknown_method", "lora"),
        ({"type": "LoRA"}, "unknown_method", "lora"),
        ({"type": "supervise"}, "unknown_method", "supervised"),
        ({"type": "lora", "lora": {"hyperparameters": {"rnk": 4}}}, "unknown_hyperparameter", "rank"),
        ({"type": "full", "full": {"hyperparameters": {"epochs": 4}}}, "unknown_hyperparameter", "n_epochs"),
        ({"type": "full", "full": {"hyperparameters": {"max-lenght": 4}}}, "unknown_hyperparameter", "max_length"),
    ],
)
async def test_methods_and_hyperparameters(
    client: httpx.AsyncClient, base: str, method: dict[str, Any], code: str, meant: str
) -> None:
    message = said(await create(client, base, method=method), 400, code)
    rest = "docs/configuration.md lists all" if code == "unknown_hyperparameter" else "These exist: "
    assert f"; did you mean {meant}? {rest}" in message and len(message) < 300


async def test_a_package_that_the_server_lacks_is_told_at_once(
    client: httpx.AsyncClient, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "find_spec", lambda name: None)
    method = {"type": "lora", "lora": {"hyperparameters": {"base": "bnb-nf4"}}}
    answer = await create(client, base, method=method)
    assert "pip install -c constraints.txt -e '.[bnb]'" in said(answer, 400, "extra_not_installed")
    assert answer.json()["error"]["param"] == "method.lora.hyperparameters.base"


async def test_a_name_that_is_near_nothing_gets_the_list_alone(client: httpx.AsyncClient, base: str) -> None:
    message = said(await create(client, base, method={"type": "zzz"}), 400, "unknown_method")
    assert "; these exist: full, lora" in message and "mean " not in message.replace("which means", "")


async def test_steering_methods(client: httpx.AsyncClient, base: str) -> None:
    body = {"model": base, "training_file": "file-none", "method": "mean_diference"}
    answer = await client.post("/v1/steering/vectors", json=body)
    assert "did you mean mean_difference? These exist: mean_difference" in said(answer, 400, "invalid_value")


async def ask(client: httpx.AsyncClient, model: str, **more: Any) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": "x"}]}
    return said(await client.post("/v1/chat/completions", json=body, **more), 404, "model_not_found")


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("tiny-lama", "tiny-llama"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m-instruct"),
        ("ft:tiny-llama:local:tikets:abcd1234", TUNED),
    ],
)
async def test_models(client: httpx.AsyncClient, base: str, tuned: str, wrong: str, meant: str) -> None:
    message = await ask(client, wrong)
    assert f"Did you mean {meant}? These exist: " in message
    assert tuned in message and "gradhelm models pull NAME" in message
    job = await create(client, wrong)
    assert f"Did you mean {meant}? " in said(job, 404, "model_not_found")
    got = await client.get(f"/v1/models/{wrong}")
    assert f"Did you mean {meant}? " in said(got, 404, "model_not_found")


async def test_a_catalog_model_that_is_not_here_is_not_suggested_to_itself(client: httpx.AsyncClient) -> None:
    message = await ask(client, "smollm2-135m-instruct")
    assert "`gradhelm models pull smollm2-135m-instruct`" in message and "id you mean" not in message


async def test_a_key_that_may_not_list_learns_of_the_catalog_only(
    app: FastAPI, client: httpx.AsyncClient, base: str, tuned: str
) -> None:
    _, key = keys.create(app.state.db, "site", ["generate"])
    headers = {"Authorization": f"Bearer {key}"}
    message = await ask(client, "ft:tiny-llama:local:tikets:abcd1234", headers=headers)
    assert tuned not in message and all(name in message for name in CATALOG)
    assert "Did you mean tiny-llama? " in await ask(client, "tiny-lama", headers=headers)


@pytest.mark.parametrize(
    ("more", "param", "meant"),
    [
        ({"temprature": 1}, "temprature", "temperature"),
        ({"steering": {"vectors": [{"id": "v", "strenght": 1.5}]}}, "steering.vectors.0.strenght", "strength"),
        ({"steering": {"vectors": [{"id": "v"}], "preserve_norms": True}}, "steering.preserve_norms", "preserve_norm"),
        ({"stream": True, "stream_options": {"include_use": True}}, "stream_options.include_use", "include_usage"),
    ],
)
async def test_fields_of_a_body(
    client: httpx.AsyncClient, base: str, more: dict[str, Any], param: str, meant: str
) -> None:
    body = {"model": base, "messages": [{"role": "user", "content": "x"}], **more}
    answer = await client.post("/v1/chat/completions", json=body)
    message = said(answer, 400, "unsupported_parameter")
    assert answer.json()["error"]["param"] == param
    assert message.endswith(f"Did you mean {meant}?")


async def test_a_field_that_is_near_nothing_gets_no_suggestion(client: httpx.AsyncClient, base: str) -> None:
    body = {"model": base, "messages": [{"role": "user", "content": "x"}], "tools": []}
    message = said(await client.post("/v1/chat/completions", json=body), 400, "unsupported_parameter")
    assert "Did you mean" not in message


async def test_a_route_without_v1(client: httpx.AsyncClient) -> None:
    assert "There is /v1/models: the base URL of a client ends in /v1." in said(
        await client.get("/models"), 404, "not_found"
    )
    assert "/v1" not in said(await client.get("/nothing"), 404, "not_found")
    assert "ends in /v1" not in said(await client.get("/v1/nothing"), 404, "not_found")
