"""Models: what there is, an artifact as a tar, deletion, and pulling in a process of its own."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from core.models.resolve import NotFetched
from service.api import pulling
from service.api.drain import Draining
from service.api.errors import APIError
from service.db.engine import write
from service.db.tables import Checkpoint, Model, Vector
from service.settings import Settings
from tests.api.test_follow import make_job


def put_model(app: FastAPI, home: Path, *, kind: str = "adapter") -> tuple[str, Path]:
    job = make_job(app.state.store)
    folder = home / "jobs" / job / "artifact"
    folder.mkdir(parents=True)
    manifest = {"format": "gradhelm-artifact/1", "kind": kind, "files": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "README.md").write_text("# card\n")
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 3000)
    (folder / "deep").mkdir()
    (folder / "deep" / "a.txt").write_text("deep")
    (folder / "escape").symlink_to("/etc/passwd")
    name = f"ft:tiny-llama:local::{job[-8:]}"
    row = Model(
        id=name, kind=kind, base="tiny-llama", path=str(folder), job_id=job, created_at=1, manifest=manifest, key_id="k"
    )
    with write(app.state.db) as session:
        session.add(row)
    return name, folder


async def test_an_artifact_comes_as_a_tar(
    app: FastAPI, client: httpx.AsyncClient, settings: Settings, base: str
) -> None:
    name, folder = put_model(app, settings.home)
    answer = await client.get(f"/v1/models/{name}/content")
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/x-tar"
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        members = {member.name: member for member in archive.getmembers()}
        assert set(members) == {"manifest.json", "README.md", "adapter_model.safetensors", "deep/a.txt"}
        assert all(member.isreg() and member.uid == 0 and member.mode == 0o644 for member in members.values())
        for member in members.values():
            found = archive.extractfile(member)
            assert found is not None and found.read() == (folder / member.name).read_bytes()
    assert name in [one["id"] for one in (await client.get("/v1/models")).json()["data"]]


async def test_a_deleted_model_is_gone_with_its_files(
    app: FastAPI, client: httpx.AsyncClient, settings: Settings, base: str
) -> None:
    name, folder = put_model(app, settings.home)
    answer = (await client.delete(f"/v1/models/{name}")).json()
    assert {"id": name, "object": "model", "deleted": True}.items() <= answer.items()
    assert answer["checkpoints"] == [] and answer["freed_bytes"] > 3000 and answer["kept_bytes"] == 0
    assert not folder.exists() and folder.parent.exists()
    assert str(folder) in app.state.engine.dropped, "the engine lets go of it too"
    for call in (client.get, client.delete):
        assert (await call(f"/v1/models/{name}")).status_code == 404


def put_checkpoint(app: FastAPI, folder: Path, step: int) -> tuple[str, Path]:
    job = folder.name
    saved = folder / "checkpoints" / f"step-{step:08d}" / "adapter"
    saved.mkdir(parents=True)
    (saved / "adapter_model.safetensors").write_bytes(b"c" * 2000)
    (saved.parent / "tensors.safetensors").write_bytes(b"t" * 4000)
    name = f"ft:tiny-llama:local::{job[-8:]}:ckpt-step-{step}"
    row = Checkpoint(
        id=f"c{step}", job_id=job, step=step, created_at=1, model_id=name, kind="adapter", path=str(saved), metrics={}
    )
    with write(app.state.db) as session:
        session.add(row)
    return name, saved.parent


async def test_the_checkpoints_of_a_deleted_model_go_with_it(
    app: FastAPI, client: httpx.AsyncClient, settings: Settings, base: str
) -> None:
    name, folder = put_model(app, settings.home)
    saved, _ = put_checkpoint(app, folder.parent, 2)
    (folder.parent / "base").mkdir()
    later = folder.parent / "later"  # stands for the own copy of a job that started from the model
    os.link(folder / "adapter_model.safetensors", later)
    answer = (await client.delete(f"/v1/models/{name}")).json()
    assert answer["checkpoints"] == [saved] and answer["kept_bytes"] == 3000 and answer["freed_bytes"] > 6000
    assert [path.name for path in folder.parent.iterdir()] == ["later"]
    assert (await client.get(f"/v1/models/{saved}")).status_code == 404


async def test_one_checkpoint_is_deleted_alone_once_its_job_is_over(
    app: FastAPI, client: httpx.AsyncClient, settings: Settings, base: str
) -> None:
    job = make_job(app.state.store)
    folder = settings.home / "jobs" / job
    one, first = put_checkpoint(app, folder, 2)
    two, second = put_checkpoint(app, folder, 4)
    refused = await client.delete(f"/v1/models/{one}")
    assert refused.status_code == 409 and refused.json()["error"]["code"] == "checkpoint_in_use" and first.is_dir()
    app.state.store.request_cancel(job)
    answer = (await client.delete(f"/v1/models/{one}")).json()
    assert (answer["id"], answer["checkpoints"], answer["freed_bytes"]) == (one, [], 6000)
    assert not first.exists() and second.is_dir()
    assert (await client.get(f"/v1/models/{two}")).status_code == 200
    (folder / "checkpoints" / "step-00000003").mkdir()  # one that only a resume could have used
    assert (await client.delete(f"/v1/models/{two}")).status_code == 200
    assert not (folder / "checkpoints").exists(), "the last one takes the rest with it"
    assert (await client.delete(f"/v1/models/{two}")).status_code == 404


async def test_deletion_never_leaves_the_data_folder(
    app: FastAPI, client: httpx.AsyncClient, settings: Settings, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    row = Model(
        id="ft:x", kind="adapter", base="b", path=str(outside), created_at=1, manifest={}, job_id=None, key_id="k"
    )
    with write(app.state.db) as session:
        session.add(row)
    assert (await client.delete("/v1/models/ft:x")).status_code == 200
    assert outside.is_dir() and not app.state.engine.dropped


async def test_bases_are_neither_deleted_nor_downloaded(client: httpx.AsyncClient, base: str) -> None:
    gone = await client.delete(f"/v1/models/{base}")
    assert gone.status_code == 403 and gone.json()["error"]["code"] == "base_model"
    assert (await client.get(f"/v1/models/{base}/content")).status_code == 400
    assert (await client.get(f"/v1/models/{base}")).json()["kind"] == "base"


async def test_a_checkpoint_is_a_model_until_retention_takes_it(
    app: FastAPI, client: httpx.AsyncClient, settings: Settings, base: str
) -> None:
    job = make_job(app.state.store)
    folder = settings.home / "jobs" / job / "checkpoints" / "step-00000002" / "adapter"
    folder.mkdir(parents=True)
    name = f"ft:{base}:local::{job[-8:]}:ckpt-step-2"
    row = Checkpoint(
        id="ftckpt-1", job_id=job, step=2, created_at=1, model_id=name, kind="adapter", path=str(folder), metrics={}
    )
    with write(app.state.db) as session:
        session.add(row)
    assert (await client.get(f"/v1/models/{name}")).json()["job_id"] == job
    body = {"model": name, "messages": [{"role": "user", "content": "x"}]}
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    assert app.state.engine.requests[-1].adapter == str(folder)
    assert app.state.engine.requests[-1].base == str(settings.home / "models" / base)
    app.state.store.apply(job, gone=["ftckpt-1"])
    for answer in (await client.get(f"/v1/models/{name}"), await client.post("/v1/chat/completions", json=body)):
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("kind", ["adapter", "merged", "checkpoint", "gone checkpoint", "unknown"])
async def test_a_vector_on_a_tuned_model_is_told_the_base(
    app: FastAPI, client: httpx.AsyncClient, settings: Settings, base: str, kind: str
) -> None:
    name, folder = put_model(app, settings.home, kind="merged" if kind == "merged" else "adapter")
    if "checkpoint" in kind:
        job = folder.parent.name
        name += ":ckpt-step-2"
        row = Checkpoint(
            id="c", job_id=job, step=2, created_at=1, model_id=name, kind="adapter", path=str(folder), metrics={}
        )
        with write(app.state.db) as session:
            session.add(row)
    if kind == "gone checkpoint":
        app.state.store.apply(folder.parent.name, gone=["c"])
    elif kind == "unknown":
        name = f"ft:{base}:local::nothing0"
    else:
        assert (await client.get(f"/v1/models/{name}")).status_code == 200
    answer = await client.post("/v1/steering/vectors", json={"model": name, "training_file": "file-x"})
    error = answer.json()["error"]
    assert error["param"] == "model"
    if kind in ("gone checkpoint", "unknown"):
        assert answer.status_code == 404 and error["code"] == "model_not_found"
    else:
        assert answer.status_code == 400 and error["code"] == "base_model_required"
        advice = f"of its base {base!r} steer it" if kind == "merged" else f"Its base is {base!r}: give that"
        assert advice in error["message"] and name in error["message"]


async def test_a_merged_model_is_its_own_base(
    app: FastAPI, client: httpx.AsyncClient, settings: Settings, base: str
) -> None:
    name, folder = put_model(app, settings.home, kind="merged")
    body = {"model": name, "prompt": "x"}
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    asked = app.state.engine.requests[-1]
    assert (asked.base, asked.adapter) == (str(folder), None)


async def test_whole_weights_are_said_not_to_be_steerable(
    app: FastAPI, client: httpx.AsyncClient, settings: Settings, base: str
) -> None:
    name, folder = put_model(app, settings.home, kind="merged")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes((settings.home / "models" / base / "model.safetensors").read_bytes())
    row = Vector(
        id="vec_1", name="v", source="fit", base=base, fingerprint="sha256:0", site="block", method="m", layers=[0],
        path="/gone", bytes=1, sha256="", created_at=1, metadata_={},
    )  # fmt: skip
    with write(app.state.db) as session:
        session.add(row)
    messages = [{"role": "user", "content": "x"}]
    steering = {"vectors": [{"id": "vec_1", "strength": 1.0}]}
    for model, says in ((name, "such cannot be steered"), (base, "Fit one for this model's base.")):
        body = {"model": model, "messages": messages, "steering": steering}
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.json()["error"]["code"] == "steering_wrong_model", answer.text
        assert says in answer.json()["error"]["message"]


async def test_pulling_what_is_here_answers_at_once(client: httpx.AsyncClient, base: str) -> None:
    answer = await client.post("/v1/models/pull", json={"model": base})
    assert answer.status_code == 200 and answer.json()["id"] == base


async def test_a_pull_that_is_left_ends_with_all_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, written = tmp_path / "python", tmp_path / "pid"
    script.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {written}.part; mv {written}.part {written}; wait\n")
    script.chmod(0o755)
    monkeypatch.setattr(pulling, "sys", SimpleNamespace(executable=str(script)))
    started: list[asyncio.subprocess.Process] = []
    start = asyncio.create_subprocess_exec

    async def watched(*command: str, **more: Any) -> asyncio.subprocess.Process:
        started.append(await start(*command, **more))
        return started[0]

    monkeypatch.setattr(pulling.asyncio, "create_subprocess_exec", watched)
    draining = Draining(1.0)
    work = asyncio.create_task(pulling.pull("tiny-llama", tmp_path, draining))
    while not written.exists():
        assert not work.done()
        await asyncio.sleep(0.01)
    draining.begin()
    with pytest.raises(APIError, match="pull again"):
        await asyncio.wait_for(work, 10)
    assert started[0].returncode == -signal.SIGKILL, "it is over when the answer goes out"
    status = Path(f"/proc/{written.read_text().strip()}/stat")
    for _ in range(500):
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        await asyncio.sleep(0.01)
    os.kill(int(written.read_text()), signal.SIGKILL)
    pytest.fail("the grandchild lives on")


@pytest.mark.parametrize("arrives", [True, False])
async def test_a_pull_may_take_as_long_as_something_arrives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrives: bool
) -> None:
    script, part = tmp_path / "python", tmp_path / "models" / "hub" / ".org--name@main.+part"
    part.mkdir(parents=True)
    grows = f"for i in 1 2 3 4 5 6 7 8; do echo x >> '{part}/model.safetensors'; sleep 0.25; done"
    script.write_text(f"#!/bin/sh\n{grows if arrives else 'sleep 60'}\necho '{{\"ok\": true}}'\n")
    script.chmod(0o755)
    monkeypatch.setattr(pulling, "sys", SimpleNamespace(executable=str(script)))
    monkeypatch.setattr(pulling, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(pulling, "_LOOK_SECONDS", 0.05)
    work = asyncio.wait_for(pulling.pull("org/name", tmp_path, Draining(1.0)), 30)
    if arrives:  # two seconds in all
        assert await work == "org/name"
    else:
        with pytest.raises(APIError, match="Nothing has arrived"):
            await work


@pytest.mark.slow
async def test_pulling_makes_a_tiny_model_in_a_child(client: httpx.AsyncClient, settings: Settings) -> None:
    answer = await client.post("/v1/models/pull", json={"model": "tiny-llama"}, timeout=120)
    assert answer.status_code == 200, answer.text
    assert (settings.home / "models" / "tiny-llama" / "model.safetensors").stat().st_size > 100_000
    assert "tiny-llama" in [one["id"] for one in (await client.get("/v1/models")).json()["data"]]


async def test_pulling_an_unknown_catalog_name_is_refused(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/models/pull", json={"model": "no-such-model"}, timeout=120)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_model"
    assert "org/name" in answer.json()["error"]["message"]
    assert "tiny-llama" in answer.json()["error"]["message"], "it lists what there is"


def test_a_hub_that_does_not_answer_is_no_refusal_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise NotFetched("could not download org/name: no network")

    monkeypatch.setattr("core.models.resolve.resolve", no_network)
    assert pulling.main(["org/name"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["kind"] == "failed" and "no network" in answer["message"]


@pytest.mark.parametrize("name", ["", " ", "a b", "org/name/x", "x" * 600, "gpt-4o\n"])
async def test_a_name_that_is_no_reference(client: httpx.AsyncClient, name: str) -> None:
    answer = await client.post("/v1/models/pull", json={"model": name})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "model"
