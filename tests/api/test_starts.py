"""Jobs that start from an earlier result: what they keep of it, what it fixes, and what is refused."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service.api.resolve import target
from service.db.engine import write
from service.db.tables import Checkpoint, Job, Model
from service.jobs import names, spec
from service.jobs.store import JobStore
from service.settings import Settings
from tests.api.test_files import upload
from tests.api.test_follow import make_job
from tests.api.test_jobs import create
from tests.api.test_sweep import add_file, restart, start
from tests.chaos.standin import put_adapter
from trainers.config import parse_run

ROUTE = "/v1/fine_tuning/jobs"


def put_result(app: FastAPI, home: Path, *, kind: str = "adapter", start_kind: str | None = None) -> tuple[str, Path]:
    """A finished job's model: its name and folder."""
    job = make_job(app.state.store)
    folder = home / "jobs" / job / "artifact"
    put_adapter(folder)
    if kind == "merged":
        (folder / "manifest.json").write_text(json.dumps({"format": "gradhelm-artifact/1", "kind": "merged"}))
    if start_kind is not None:
        put_adapter(names.base_directory(home, job))
        app.state.store.apply(job, values={"start_kind": start_kind})
    name = f"ft:tiny-llama:local::{job[-8:]}"
    row = Model(
        id=name, kind=kind, base="tiny-llama", path=str(folder), job_id=job, created_at=1, manifest={}, key_id="k"
    )
    with write(app.state.db) as session:
        session.add(row)
    return name, folder


def put_checkpoint(app: FastAPI, home: Path) -> tuple[str, Path]:
    """A cancelled job's checkpoint."""
    store: JobStore = app.state.store
    job = make_job(store)
    folder = names.job_directory(home, job) / "checkpoints" / "step-00000002" / "adapter"
    put_adapter(folder)
    name = f"ft:tiny-llama:local::{job[-8:]}:ckpt-step-2"
    row = Checkpoint(
        id="ftckpt-1", job_id=job, step=2, created_at=1, model_id=name, kind="adapter", path=str(folder), metrics={}
    )
    with write(app.state.db) as session:
        session.add(row)
    assert store.request_cancel(job).status == "cancelled"
    return name, folder


def row_of(app: FastAPI, job: dict[str, Any]) -> Job:
    """The job's row as it is once its files are validated."""
    row: Job = app.state.store.get(job["id"])
    row.resolved = spec.resolve(row.resolved, 100)
    return row


def folders(home: Path) -> set[str]:
    return {path.name for path in (home / "jobs").iterdir()}


@pytest.mark.parametrize("source", ["model", "checkpoint"])
async def test_a_job_goes_on_with_an_adapter_and_keeps_it(
    app: FastAPI, client: httpx.AsyncClient, settings: Settings, base: str, source: str
) -> None:
    home = settings.home
    name, folder = (put_result if source == "model" else put_checkpoint)(app, home)
    made = await create(client, name, suffix="more")
    assert made.status_code == 200, made.text
    job = made.json()
    assert (job["model"], job["base"]) == (name, base), "what was named, and the base at its root"
    assert job["method"]["lora"]["hyperparameters"] == {
        "n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto", "rank": 4, "alpha": 8.0,
    }  # fmt: skip
    row = row_of(app, job)
    assert names.model_id(row) == f"ft:{base}:local:more:{job['id'][-8:]}", "no name grows from the name before it"
    first = (await client.get(f"{ROUTE}/{job['id']}/events")).json()["data"][-1]["message"]
    assert first == f"Created job {job['id']}, which starts from {name}"

    kept = names.start_directory(home, job["id"])
    assert {path.name for path in kept.iterdir()} == {path.name for path in folder.iterdir()}
    assert (kept / "adapter_model.safetensors").samefile(folder / "adapter_model.safetensors"), "a link costs nothing"
    shutil.rmtree(folder)  # as the deletion of the model, or retention, does
    content = spec.run_file(row, home, 1)
    run = parse_run(content)
    assert (run.config.model, run.config.start, run.config.start_name) == (base, str(kept), name)
    assert run.settings.rank == 4  # type: ignore[attr-defined]
    assert spec.validation_argv(row, home, None)[4] == base


async def test_deleting_the_model_takes_nothing_from_the_job(
    app: FastAPI, client: httpx.AsyncClient, settings: Settings, base: str
) -> None:
    name, folder = put_result(app, settings.home)
    job = (await create(client, name)).json()
    assert (await client.delete(f"/v1/models/{name}")).status_code == 200
    assert not folder.exists()
    assert (names.start_directory(settings.home, job["id"]) / "adapter_model.safetensors").stat().st_size > 32
    again = await create(client, name)
    assert again.status_code == 404 and again.json()["error"]["code"] == "model_not_found"


async def test_whole_weights_are_the_base_of_the_job(
    app: FastAPI, client: httpx.AsyncClient, settings: Settings, base: str
) -> None:
    home = settings.home
    name, folder = put_result(app, home, kind="merged")
    job = (await create(client, name, hyperparameters={"rank": 2})).json()
    assert (job["model"], job["base"]) == (name, base)
    assert "alpha" not in job["method"]["lora"]["hyperparameters"], "there is no adapter that fixes it"
    row, kept = row_of(app, job), names.base_directory(home, job["id"])
    assert (kept / "manifest.json").samefile(folder / "manifest.json")
    content = spec.run_file(row, home, 1)
    assert (content["model"], content["start_name"]) == (str(kept), name) and "start" not in content
    assert spec.validation_argv(row, home, None)[4] == str(kept), "rows are judged with the tokenizer that trains"


async def test_an_adapter_on_tuned_weights_is_served_and_continued_on_them(
    app: FastAPI, client: httpx.AsyncClient, settings: Settings, base: str
) -> None:
    home = settings.home
    name, folder = put_result(app, home, start_kind="merged")
    weights = names.base_directory(home, folder.parent.name)
    found = target(app.state.db, home, name)
    assert (found.base, found.adapter) == (weights, folder)
    job = (await create(client, name)).json()
    content = spec.run_file(row_of(app, job), home, 1)
    assert content["model"] == str(names.base_directory(home, job["id"]))
    assert content["start"] == str(names.start_directory(home, job["id"]))
    assert (names.base_directory(home, job["id"]) / "manifest.json").samefile(weights / "manifest.json")
    shutil.rmtree(weights)
    for route, body in ((ROUTE, {"training_file": "file-x"}), ("/v1/completions", {"prompt": "x"})):
        gone = await client.post(route, json={"model": name, **body})
        assert gone.status_code == 404 and gone.json()["error"]["code"] == "model_not_found"


async def test_an_adapter_on_tuned_weights_names_them_and_is_exported_with_them(
    app: FastAPI, client: httpx.AsyncClient, settings: Settings, base: str
) -> None:
    name, folder = put_result(app, settings.home, start_kind="merged")
    app.state.store.apply(folder.parent.name, values={"start": "ft:tiny-llama:local::earlier"})
    shown = (await client.get(f"/v1/models/{name}")).json()
    (listed,) = [row for row in (await client.get("/v1/models")).json()["data"] if row["id"] == name]
    assert shown == listed and (shown["base"], shown["start"]) == ("tiny-llama", "ft:tiny-llama:local::earlier")
    answer = await client.get(f"/v1/models/{name}/content")
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        held = set(archive.getnames())
    assert {"adapter_model.safetensors", "base/adapter_model.safetensors", "base/manifest.json"} <= held
    plain, _ = put_result(app, settings.home)
    answer = await client.get(f"/v1/models/{plain}/content")
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        assert not any(member.startswith("base/") for member in archive.getnames())
    assert (await client.get(f"/v1/models/{plain}")).json()["start"] is None


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"rank": 8}, ("rank is 4", "and 8 here")),
        ({"alpha": 16}, ("alpha is 8.0", "and 16.0 here")),
        ({"targets": ["q_proj"]}, ("['all-linear']", "['q_proj']")),
        ({"rslora": True}, ("rslora is False", "and True here")),
        ({"dora": True}, ("dora is False", "and True here")),
    ],
)
async def test_what_the_adapter_fixes_cannot_be_asked_otherwise(
    app: FastAPI,
    client: httpx.AsyncClient,
    settings: Settings,
    base: str,
    asked: dict[str, Any],
    words: tuple[str, ...],
) -> None:
    name, _ = put_result(app, settings.home)
    before = folders(settings.home)
    answer = await create(client, name, method={"type": "lora", "lora": {"hyperparameters": asked}})
    error = answer.json()["error"]
    assert answer.status_code == 400, answer.text
    assert error["param"] == f"method.lora.hyperparameters.{next(iter(asked))}"
    assert all(word in error["message"] for word in words), error["message"]
    assert folders(settings.home) == before, "nothing is left of what was refused"
    assert (await create(client, name, hyperparameters={"rank": 4, "dropout": 0.1})).status_code == 200
    assert (await create(client, name, method={"type": "full"})).status_code == 200


@pytest.mark.parametrize("harm", ["weights", "manifest", "config"])
async def test_a_start_that_is_broken_is_refused(
    app: FastAPI, client: httpx.AsyncClient, settings: Settings, base: str, harm: str
) -> None:
    name, folder = put_result(app, settings.home)
    if harm == "weights":
        (folder / "adapter_model.safetensors").write_bytes(b"x")
    elif harm == "manifest":
        (folder / "manifest.json").write_text("{}")
    else:
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "auto_mapping": {"a": 1}}))
    before = folders(settings.home)
    answer = await create(client, name)
    error = answer.json()["error"]
    assert answer.status_code == 400, answer.text
    assert (error["param"], error["code"]) == ("model", "model_not_usable")
    assert str(settings.home) not in error["message"]
    assert folders(settings.home) == before


@pytest.mark.parametrize("kind", ["unknown", "deleted files", "gone checkpoint", "NUL"])
async def test_what_cannot_be_named_in_a_chat_cannot_be_started_from(
    app: FastAPI, client: httpx.AsyncClient, settings: Settings, base: str, kind: str
) -> None:
    if kind == "deleted files":
        name, folder = put_result(app, settings.home)
        shutil.rmtree(folder)
    elif kind == "gone checkpoint":
        name, folder = put_checkpoint(app, settings.home)
        app.state.store.apply(folder.parents[2].name, gone=["ftckpt-1"])
    else:
        name = f"ft:{base}:local::nothing0" if kind == "unknown" else "ft:x\x00"
    answers = [
        await client.post(ROUTE, json={"model": name, "training_file": "file-x"}),
        await client.post("/v1/chat/completions", json={"model": name, "messages": [{"role": "user", "content": "x"}]}),
    ]
    if kind != "NUL":
        assert [answer.status_code for answer in answers] == [404, 404]
        assert answers[0].json()["error"]["code"] == "model_not_found"
    assert answers[0].json()["error"] == answers[1].json()["error"], "one answer for both"


async def test_who_may_chat_with_a_model_may_start_from_it(
    app: FastAPI, client: httpx.AsyncClient, settings: Settings, base: str
) -> None:
    """Models belong to the data folder, not to the key that made them; scopes say what a key may do."""
    name, _ = put_result(app, settings.home)
    data = (await upload(client)).json()["id"]
    for scope, status in (("jobs", 200), ("generate", 403), ("read", 403)):
        key = (await client.post("/v1/keys", json={"name": scope, "scopes": [scope]})).json()["key"]
        headers = {"Authorization": f"Bearer {key}"}
        answer = await client.post(ROUTE, json={"model": name, "training_file": data}, headers=headers)
        assert answer.status_code == status, answer.text


async def test_a_refused_file_leaves_nothing_of_the_start(
    app: FastAPI, client: httpx.AsyncClient, settings: Settings, base: str
) -> None:
    name, _ = put_result(app, settings.home)
    before = folders(settings.home)
    answer = await create(client, name, training_file="file-none")
    assert answer.status_code == 404 and answer.json()["error"]["param"] == "training_file"
    assert folders(settings.home) == before


@pytest.mark.parametrize("headers", [{"Idempotency-Key": "k1"}, {"x-stainless-retry-count": "1"}])
async def test_a_repeated_request_is_answered_though_its_start_is_gone(
    app: FastAPI, client: httpx.AsyncClient, settings: Settings, base: str, headers: dict[str, str]
) -> None:
    name, _ = put_result(app, settings.home)
    data = (await upload(client)).json()["id"]
    first = (await create(client, name, training_file=data, headers=headers)).json()
    await client.delete(f"/v1/models/{name}")
    before = folders(settings.home)
    again = await create(client, name, training_file=data, headers=headers)
    assert again.status_code == 200 and again.json()["id"] == first["id"]
    assert folders(settings.home) == before


async def test_starts_that_nobody_needs_are_swept(
    app: FastAPI, client: httpx.AsyncClient, settings: Settings, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = settings.home
    add_file(app, settings)
    name, _ = put_result(app, home)
    waiting, ended = [(await create(client, name)).json()["id"] for _ in range(2)]
    await client.post(f"{ROUTE}/{ended}/cancel")  # nothing ran, so no scheduler let go of it
    unwritten, halfway, other = (names.job_directory(home, f"ftjob-{letter * 24}") for letter in "uho")
    put_adapter(unwritten / "start")
    put_adapter(halfway / ".base.abc123")
    put_adapter(other / "start")
    (other / "run.yaml").write_text("not ours to judge")
    await start(settings)
    assert not names.start_directory(home, ended).exists()
    assert names.start_directory(home, waiting).is_dir()
    assert unwritten.is_dir() and halfway.is_dir(), "a day must pass: their rows may come, or come back"
    await restart(settings, monkeypatch)
    assert not unwritten.exists() and not halfway.exists()
    assert (home / "trash" / "jobs" / unwritten.name / "start" / "manifest.json").is_file()
    assert (other / "start").is_dir() and names.start_directory(home, waiting).is_dir()
