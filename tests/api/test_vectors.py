"""The list of vectors: pending fits and vectors are one sequence, whatever happens between its pages."""

from __future__ import annotations

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import update

from service.db.engine import write
from service.db.tables import Job, Vector
from tests.api.test_follow import make_job


def put_vector(app: FastAPI, name: str, at: int, job_id: str | None = None) -> str:
    row = Vector(
        id=name,
        name=name,
        source="import" if job_id is None else "fit",
        base="b",
        fingerprint="f",
        site="block",
        method="m",
        layers=[0],
        path="p",
        bytes=1,
        sha256="0",
        created_at=at,
        metadata_={},
        job_id=job_id,
    )
    with write(app.state.db) as session:
        session.add(row)
    return name


def put_fit(app: FastAPI, at: int) -> str:
    job = make_job(app.state.store, kind="steering_fit")
    with write(app.state.db) as session:
        session.execute(update(Job).where(Job.id == job).values(created_at=at))
    return job


def vector_of(job: str) -> str:
    return f"vec_{job.removeprefix('steerjob-')}"


def finish(app: FastAPI, job: str, at: int) -> str:
    with write(app.state.db) as session:
        session.execute(update(Job).where(Job.id == job).values(status="succeeded", finished_at=at))
    return put_vector(app, vector_of(job), at, job)


def put_mix(app: FastAPI) -> list[str]:
    """Two imports, a fit that is done and three that are not, some of them in one second; newest first."""
    first = put_vector(app, "vec_first", 10)
    done = put_fit(app, 20)
    waiting = [put_fit(app, 20), put_fit(app, 20)]
    between = put_vector(app, "vec_between", 20)
    last = put_fit(app, 30)
    finish(app, done, 40)
    return [vector_of(last), vector_of(waiting[1]), vector_of(waiting[0]), vector_of(done), between, first]


async def page(client: httpx.AsyncClient, **query: str | int) -> tuple[list[str], bool]:
    answer = await client.get("/v1/steering/vectors", params=query)
    assert answer.status_code == 200, answer.text
    return [one["id"] for one in answer.json()["data"]], answer.json()["has_more"]


@pytest.mark.parametrize("limit", [1, 2, 4, 6, 7])
async def test_pages_give_every_fit_and_vector_once(app: FastAPI, client: httpx.AsyncClient, limit: int) -> None:
    expected = put_mix(app)
    seen, more = await page(client, limit=limit)
    while more:
        assert len(seen) < len(expected) and len(seen) % limit == 0, "a page has limit entries, and more come"
        names, more = await page(client, limit=limit, after=seen[-1])
        assert 0 < len(names) <= limit
        seen += names
    assert seen == expected


async def test_a_fit_that_ends_between_two_pages_keeps_its_place(app: FastAPI, client: httpx.AsyncClient) -> None:
    expected = put_mix(app)
    seen, _ = await page(client, limit=2)
    for name in expected[:2]:
        finish(app, f"steerjob-{name.removeprefix('vec_')}", 99)
    assert (await page(client, after=seen[-1]))[0] == expected[2:]
    assert (await page(client))[0] == expected


async def test_an_unknown_after_is_named(client: httpx.AsyncClient) -> None:
    for after in ("vec_nothing", "vec_\x00"):
        answer = await client.get("/v1/steering/vectors", params={"after": after})
        assert answer.status_code == 404
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("vector_not_found", "after")


@pytest.mark.parametrize("layers", [[2], [0, 7]])
async def test_a_layer_that_the_model_does_not_have_is_refused_at_once(
    client: httpx.AsyncClient, base: str, layers: list[int]
) -> None:
    body = {"model": base, "training_file": "file-none", "layers": layers}
    answer = await client.post("/v1/steering/vectors", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "steering_layer_out_of_range", "layers")
    assert f"Layer {layers[-1]} is out of range: the model has blocks 0 to 1." in error["message"]
    body["layers"] = [0, 1]
    assert (await client.post("/v1/steering/vectors", json=body)).json()["error"]["code"] == "file_not_found"


async def test_fits_are_in_the_list_of_jobs_for_those_who_ask(app: FastAPI, client: httpx.AsyncClient) -> None:
    fit, job = put_fit(app, 10), make_job(app.state.store)
    for query, expected in (({}, [job]), ({"kind": "all"}, [job, fit]), ({"kind": "steering_fit"}, [fit])):
        answer = await client.get("/v1/fine_tuning/jobs", params=query)
        assert [one["id"] for one in answer.json()["data"]] == expected
    assert (await client.get("/v1/fine_tuning/jobs", params={"kind": "both"})).status_code == 400


async def test_only_a_running_job_has_an_estimate_of_its_end(app: FastAPI, client: httpx.AsyncClient) -> None:
    store = app.state.store
    job = make_job(store)
    store.transition(job, "validating_files", "queued", values={"estimated_finish": 99})
    route = f"/v1/fine_tuning/jobs/{job}"
    assert (await client.get(route)).json()["estimated_finish"] is None
    claimed = store.claim("test", 60.0)
    assert (await client.get(route)).json()["estimated_finish"] == 99
    store.transition(job, "running", "failed", token=claimed.lease_token, values={"error_code": "out_of_memory"})
    assert (await client.get(route)).json()["estimated_finish"] is None


async def test_a_job_that_is_over_is_said_to_be_over(app: FastAPI, client: httpx.AsyncClient) -> None:
    job = make_job(app.state.store)
    app.state.store.transition(job, "validating_files", "failed", values={"error_code": "bad_data"})
    message = (await client.post(f"/v1/fine_tuning/jobs/{job}/resume")).json()["error"]["message"]
    assert message == f"job {job} is failed and cannot be resumed: it is over."
