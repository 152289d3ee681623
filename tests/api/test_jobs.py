"""Jobs at the API: methods and hyperparameters from the registry, idempotency, listing, and illegal moves."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service.api import methods
from service.jobs.store import JobStore
from tests.api.test_files import upload
from trainers.registry import METHODS


async def create(client: httpx.AsyncClient, base: str, **more: Any) -> httpx.Response:
    data = more.pop("training_file", None) or (await upload(client)).json()["id"]
    headers = more.pop("headers", {})
    body = {"model": base, "training_file": data, **more}
    return await client.post("/v1/fine_tuning/jobs", json=body, headers=headers)


@pytest.mark.parametrize("name", METHODS)
async def test_every_method_of_the_registry_is_a_method_of_the_api(
    client: httpx.AsyncClient, base: str, name: str
) -> None:
    made = await create(client, base, method={"type": name})
    assert made.status_code == 200 and made.json()["method"]["type"] == name
    auto = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    assert made.json()["hyperparameters"] == auto == made.json()["method"][name]["hyperparameters"]


def test_the_schema_of_methods_is_made_from_the_registry() -> None:
    schema = methods.schema()
    assert schema["properties"]["type"]["enum"] == ["supervised", *METHODS]
    rank = schema["properties"]["lora"]["properties"]["hyperparameters"]["properties"]["rank"]
    assert rank["type"] == "integer" and rank["default"] == 16 and "Rank" in rank["description"]
    shared = schema["properties"]["full"]["properties"]["hyperparameters"]["properties"]
    assert {"n_epochs", "max_length", "schedule", "early_stopping_patience"} <= set(shared)
    assert not {"train_file", "output_dir", "model", "seed", "threads", "epochs"} & set(shared)
    assert all(one.get("description") for one in shared.values())


async def test_run_settings_and_method_settings_go_side_by_side(client: httpx.AsyncClient, base: str) -> None:
    asked = {"rank": 4, "dora": True, "max_length": 64, "schedule": "cosine", "n_epochs": 2, "batch_size": None}
    made = await create(client, base, method={"type": "lora", "lora": {"hyperparameters": asked}, "dpo": None})
    assert made.status_code == 200, made.text
    shown = made.json()["method"]["lora"]["hyperparameters"]
    assert shown == {**asked, "batch_size": "auto", "learning_rate_multiplier": "auto"}


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"method": {"type": "dpo"}}, "method.type"),
        ({"method": {"type": "lora", "full": {}}}, "method.full"),
        ({"method": {"type": "lora", "lora": {"rank": 1}}}, "method.lora"),
        ({"method": {"type": "lora", "lora": {"hyperparameters": []}}}, "method.lora.hyperparameters"),
        ({"method": {"type": "lora", "lora": 3}}, "method.lora"),
        ({"method": {}}, "method.type"),
        ({"method": "lora"}, "method"),
        ({"method": {"type": "lora"}, "hyperparameters": {}}, "hyperparameters"),
        ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": True}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": 1.5}}, "hyperparameters.batch_size"),
        ({"hyperparameters": {"learning_rate_multiplier": 0}}, "hyperparameters.learning_rate_multiplier"),
        ({"hyperparameters": {"rank": "x"}}, "hyperparameters.rank"),
        ({"hyperparameters": {"output_dir": "/tmp"}}, "hyperparameters.output_dir"),
        ({"hyperparameters": {"model": "x"}}, "hyperparameters.model"),
        ({"hyperparameters": {"early_stopping_patience": 2}}, "hyperparameters.early_stopping_patience"),
        ({"hyperparameters": {"rank": -1}}, "hyperparameters.rank"),
        ({"hyperparameters": {"max_steps": 10**30}}, "hyperparameters.max_steps"),
        ({"hyperparameters": {"max_steps": 1e30}}, "hyperparameters.max_steps"),
        ({"hyperparameters": {"max_steps": 2**31}}, "hyperparameters.max_steps"),
        (
            {"method": {"type": "lora", "lora": {"hyperparameters": {"alpha": 1.0, "rank": -1}}}},
            "method.lora.hyperparameters.rank",
        ),
        ({"suffix": ""}, "suffix"),
        ({"suffix": "a/b"}, "suffix"),
        ({"suffix": "x" * 65}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        ({"metadata": {"str": 1}}, "metadata.str"),
        ({"integrations": [{"type": "wandb"}]}, "integrations"),
        ({"made_up": 1}, "made_up"),
    ],
)
async def test_what_cannot_be_is_a_400_that_names_it(
    client: httpx.AsyncClient, base: str, more: dict[str, Any], param: str
) -> None:
    answer = await create(client, base, **more)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param, answer.json()
    assert not (await client.get("/v1/fine_tuning/jobs")).json()["data"], "nothing was written"


async def test_files_must_exist_and_be_for_training(client: httpx.AsyncClient, base: str) -> None:
    missing = await create(client, base, training_file="file-none")
    assert missing.status_code == 404 and missing.json()["error"]["param"] == "training_file"
    pairs = (await upload(client, purpose="steering")).json()["id"]
    wrong = await create(client, base, training_file=pairs)
    assert wrong.status_code == 400 and wrong.json()["error"]["code"] == "invalid_file_purpose"
    other = await create(client, base, validation_file="file-none")
    assert other.json()["error"]["param"] == "validation_file"


async def test_a_file_in_use_is_not_deleted(app: FastAPI, client: httpx.AsyncClient, base: str) -> None:
    job = (await create(client, base)).json()
    held = await client.delete(f"/v1/files/{job['training_file']}")
    assert held.status_code == 400 and held.json()["error"]["code"] == "file_in_use" and job["id"] in held.text
    assert (await client.get(f"/v1/files/{job['training_file']}/content")).status_code == 200
    await client.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")
    assert (await client.delete(f"/v1/files/{job['training_file']}")).status_code == 200


async def test_a_keyed_request_is_answered_again_even_when_its_file_is_gone(
    client: httpx.AsyncClient, base: str
) -> None:
    data = (await upload(client)).json()["id"]
    headers = {"Idempotency-Key": "k1"}
    first = (await create(client, base, training_file=data, headers=headers)).json()
    await client.post(f"/v1/fine_tuning/jobs/{first['id']}/cancel")
    await client.delete(f"/v1/files/{data}")
    again = await create(client, base, training_file=data, headers=headers)
    assert again.status_code == 200 and again.json()["id"] == first["id"]


async def test_a_retry_without_a_key_is_answered_again_even_when_its_file_is_gone(
    app: FastAPI, client: httpx.AsyncClient, base: str
) -> None:
    data = (await upload(client)).json()["id"]
    first = (await create(client, base, training_file=data)).json()["id"]
    store: JobStore = app.state.store
    for source, status, after in (("validating_files",) * 2 + ("queued",), ("queued", "running", "succeeded")):
        claimed = store.claim("me", 30, status=source)
        assert claimed is not None and claimed.id == first and claimed.status == status
        store.transition(first, status, after, token=claimed.lease_token)
    assert (await client.delete(f"/v1/files/{data}")).status_code == 200
    again = await create(client, base, training_file=data, headers={"x-stainless-retry-count": "1"})
    assert again.status_code == 200 and again.json()["id"] == first
    fresh = await create(client, base, training_file=data)
    assert fresh.status_code == 404


@pytest.mark.parametrize("sent", ["", "x" * 256, "a b", "\x7f"])
async def test_keys_that_are_none(client: httpx.AsyncClient, base: str, sent: str) -> None:
    answer = await create(client, base, headers={"Idempotency-Key": sent})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "Idempotency-Key"


@pytest.mark.parametrize(("count", "jobs"), [("0", 2), ("1", 1), ("2", 1), ("x", 2), ("-1", 2)])
async def test_the_sdks_retry_header(client: httpx.AsyncClient, base: str, count: str, jobs: int) -> None:
    data = (await upload(client)).json()["id"]
    ids = {
        (await create(client, base, training_file=data, headers={"x-stainless-retry-count": sent})).json()["id"]
        for sent in ("0", count)
    }
    assert len(ids) == jobs


async def test_moves_that_are_not_allowed(client: httpx.AsyncClient, base: str) -> None:
    job = (await create(client, base)).json()["id"]
    route = f"/v1/fine_tuning/jobs/{job}"
    for action in ("pause", "resume"):
        answer = await client.post(f"{route}/{action}")
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_job_state"
    assert (await client.post(f"{route}/cancel")).json()["status"] == "cancelled"
    for action in ("cancel", "pause", "resume"):
        answer = await client.post(f"{route}/{action}")
        assert answer.status_code == 400 and "cancelled" in answer.json()["error"]["message"]


async def test_pages_and_metadata(client: httpx.AsyncClient, base: str) -> None:
    ids = [(await create(client, base, metadata={"n": str(n % 2), 'odd"key': "v"})).json()["id"] for n in range(5)]
    first = (await client.get("/v1/fine_tuning/jobs?limit=2")).json()
    assert [one["id"] for one in first["data"]] == ids[:2:-1] and first["has_more"]
    rest = (await client.get(f"/v1/fine_tuning/jobs?limit=5&after={first['last_id']}")).json()
    assert [one["id"] for one in rest["data"]] == ids[2::-1] and not rest["has_more"]
    found = (await client.get("/v1/fine_tuning/jobs", params={"metadata[n]": "1"})).json()["data"]
    assert [one["id"] for one in found] == [ids[3], ids[1]]
    both = (await client.get("/v1/fine_tuning/jobs", params={"metadata[n]": "0", 'metadata[odd"key]': "v"})).json()
    assert len(both["data"]) == 3
    for query in ("metadata=null", "metadata[]=x", "metadata[a]x=y", "metadata[a]=%00"):
        wrong = await client.get(f"/v1/fine_tuning/jobs?{query}")
        assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "metadata", query
    unknown = await client.get("/v1/fine_tuning/jobs?after=ftjob-none")
    assert unknown.status_code == 404


async def test_a_page_of_checkpoints_starts_at_one_of_this_job(client: httpx.AsyncClient, base: str) -> None:
    job = (await create(client, base)).json()["id"]
    answer = await client.get(f"/v1/fine_tuning/jobs/{job}/checkpoints", params={"after": "ftckpt-none"})
    assert answer.status_code == 404 and answer.json()["error"]["param"] == "after"


async def test_an_unknown_after_is_named(client: httpx.AsyncClient) -> None:
    for after in ("ftjob-none", "\x00"):
        error = (await client.get("/v1/fine_tuning/jobs", params={"after": after})).json()["error"]
        assert (error["code"], error["param"]) == ("job_not_found", "after")
