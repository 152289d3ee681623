"""What stays on the disk when a job is over."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from service.jobs import weights
from service.sweep import sweep
from tests.unit.service.jobs.world import World


def put_checkpoint(world: World, job_id: str, step: int, *, servable: bool = True) -> Path:
    folder = world.folder(job_id) / "checkpoints" / f"step-{step:08d}"
    (folder / "merged").mkdir(parents=True)
    (folder / "tensors.safetensors").write_bytes(b"t" * 1000)
    if servable:
        put_weights(folder / "merged")
    return folder


def put_weights(folder: Path, digest: str = "aa") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(b"m" * 500)
    (folder / "manifest.json").write_text(json.dumps({"kind": "merged", "files": {"model.safetensors": digest}}))


@pytest.mark.parametrize("end", ["succeeded", "cancelled", "failed"])
def test_only_what_serves_stays_unless_the_job_failed(world: World, end: str) -> None:
    job_id = world.running(method="full")
    kept, bare = put_checkpoint(world, job_id, 1), put_checkpoint(world, job_id, 2, servable=False)
    if end == "cancelled":
        world.store.request_cancel(job_id)
        world.tick(3)
    else:
        world.finish(job_id, 0 if end == "succeeded" else 2)
        world.tick()
    assert world.status(job_id) == end
    assert (kept / "merged" / "model.safetensors").is_file()
    assert (kept / "tensors.safetensors").exists() == bare.exists() == (end == "failed")


@pytest.mark.parametrize("stop", ["pause", "crash"])
def test_what_a_resume_needs_stays_while_there_may_be_one(world: World, stop: str) -> None:
    job_id = world.running(method="full")
    kept = put_checkpoint(world, job_id, 1)
    if stop == "pause":
        world.store.request_pause(job_id)
        world.tick(3)
    else:
        world.finish(job_id, -9)
        world.tick()
    assert world.status(job_id) == ("paused" if stop == "pause" else "queued")
    assert (kept / "tensors.safetensors").is_file()


def test_a_start_of_the_server_settles_what_a_kill_left(world: World) -> None:
    job_id = world.running(method="full")
    world.finish(job_id)
    world.tick()
    running = world.running(method="full")
    late, live = put_checkpoint(world, job_id, 3), put_checkpoint(world, running, 3)
    for folder in ("files", "vectors"):
        (world.home / folder).mkdir(exist_ok=True)
    sweep(world.home, world.store.engine)
    assert not (late / "tensors.safetensors").exists() and (live / "tensors.safetensors").exists()


def test_the_last_checkpoint_shares_the_artifacts_files_where_their_hashes_agree(world: World) -> None:
    job_id = world.running(method="full")
    same, other = put_checkpoint(world, job_id, 2), put_checkpoint(world, job_id, 1)
    put_weights(other / "merged", digest="bb")
    artifact = world.folder(job_id) / "artifact"
    put_weights(artifact)
    weights.settle(world.home, job_id)
    weights.settle(world.home, job_id)
    name = "model.safetensors"
    assert (same / "merged" / name).samefile(artifact / name)
    assert not (other / "merged" / name).samefile(artifact / name)
    assert sorted(path.name for path in (same / "merged").iterdir()) == ["manifest.json", name]


def test_bytes_are_counted_once_and_those_that_others_hold_apart(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "x").write_bytes(b"x" * 100)
    os.link(tmp_path / "a" / "x", tmp_path / "b" / "x")
    (tmp_path / "a" / "y").write_bytes(b"y" * 10)
    os.link(tmp_path / "a" / "y", tmp_path / "elsewhere")
    assert weights.remove([tmp_path / "a", tmp_path / "b", tmp_path / "none"]) == weights.Freed(100, 10)
    assert not (tmp_path / "a").exists() and (tmp_path / "elsewhere").is_file()
