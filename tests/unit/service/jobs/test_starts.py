"""A job's own copy of what it starts from: there as long as it can be needed, and no longer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from sqlalchemy import delete, update

from service.db.engine import write
from service.db.tables import Job, Model
from service.jobs import names, recovery, starts
from service.jobs.records import new_id
from service.jobs.starts import Origin
from service.sweep import sweep
from tests.chaos.standin import put_adapter
from tests.unit.service.jobs.world import World


def begin(world: World, tmp_path: Path, *, method: str = "lora", both: bool = False) -> str:
    """A running job that goes on with an adapter."""
    put_adapter(tmp_path / "adapter")
    put_adapter(tmp_path / "weights")
    origin = Origin("tiny-llama", tmp_path / "weights" if both else None, tmp_path / "adapter")
    job_id = new_id("ftjob")
    starts.keep(origin, world.home, job_id)
    return world.running(id=job_id, method=method, start="ft:a", start_kind=origin.kind)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("end", ["succeeded", "failed", "cancelled"])
def test_it_goes_when_the_job_is_over_unless_adapters_stand_on_it(
    world: World, tmp_path: Path, method: str, saved: bool, end: str
) -> None:
    job_id = begin(world, tmp_path, method=method, both=True)
    stays = method == "lora" and (saved or end == "succeeded")
    if saved:
        put_adapter(world.folder(job_id) / "checkpoints" / "step-00000001" / "adapter")
        path = str(world.folder(job_id) / "checkpoints" / "step-00000001")
        world.emit(job_id, {"kind": "artifact", "artifact": "checkpoint", "step": 1, "path": path})
        world.tick()
    start, base = (place(world.home, job_id) for place in (names.start_directory, names.base_directory))
    assert start.is_dir() and base.is_dir()
    if end == "cancelled":
        world.store.request_cancel(job_id)
        world.tick(3)
    else:
        world.finish(job_id, 0 if end == "succeeded" else 2)
        world.tick()
    assert world.status(job_id) == end
    assert not start.exists()
    assert base.exists() == stays


def test_a_start_of_the_server_lets_go_of_weights_whose_last_model_was_deleted(world: World, tmp_path: Path) -> None:
    job_id = begin(world, tmp_path, both=True)
    world.finish(job_id)
    world.tick()
    gone = begin(world, tmp_path, both=True)
    world.finish(gone)
    world.tick()
    for folder in ("files", "vectors"):
        (world.home / folder).mkdir(exist_ok=True)
    with write(world.store.engine) as session:
        session.execute(delete(Model).where(Model.job_id == gone))
        # a method that this version knows no more: the start must not fail over it
        session.execute(update(Job).values(method="forgotten"))
    sweep(world.home, world.store.engine)
    assert names.base_directory(world.home, job_id).is_dir()
    assert not names.base_directory(world.home, gone).exists()


def test_what_a_job_leaves_without_the_scheduler_goes_within_the_hour(world: World, tmp_path: Path) -> None:
    """Cancelled before it ran, or its last model deleted: nobody starts the server anew for that."""
    served = begin(world, tmp_path, both=True)
    world.finish(served)
    world.tick()
    gone = begin(world, tmp_path, both=True)
    world.finish(gone)
    world.tick()
    with write(world.store.engine) as session:
        session.execute(delete(Model).where(Model.job_id == gone))
    running = begin(world, tmp_path, both=True)
    waiting = new_id("ftjob")
    origin = Origin("tiny-llama", tmp_path / "weights", tmp_path / "adapter")
    starts.keep(origin, world.home, waiting)
    world.submit(id=waiting, start="ft:a", start_kind=origin.kind)
    world.tick(3)
    world.store.request_cancel(waiting)
    assert world.status(waiting) == "cancelled" and world.status(running) == "running"
    world.tick()
    assert names.base_directory(world.home, waiting).is_dir()
    world.clock.now += 3601
    world.tick()
    for job_id, base, start in ((waiting, False, False), (gone, False, False), (served, True, False),
                                (running, True, True)):  # fmt: skip
        assert names.base_directory(world.home, job_id).exists() == base, job_id
        assert names.start_directory(world.home, job_id).exists() == start, job_id


def test_it_stays_for_a_retry_a_pause_and_a_restart(world: World, tmp_path: Path) -> None:
    job_id = begin(world, tmp_path)
    start = names.start_directory(world.home, job_id)
    world.finish(job_id, -9)
    world.tick()
    assert world.status(job_id) == "queued" and start.is_dir()
    world.clock.now += 100
    world.restart()
    world.tick(2)
    assert world.status(job_id) == "running" and start.is_dir()
    world.store.request_pause(job_id)
    world.tick(3)
    assert world.status(job_id) == "paused" and start.is_dir()


def test_a_job_whose_start_is_gone_fails_and_never_trains_from_the_base(world: World, tmp_path: Path) -> None:
    put_adapter(tmp_path / "adapter")
    job_id = world.submit(start="ft:a", start_kind="adapter")
    world.tick(3)
    job = world.job(job_id)
    assert (job.status, job.error_code) == ("failed", "invalid_hyperparameters")
    assert job.error_message is not None and "start: " in job.error_message


def test_what_the_run_says_of_the_start_is_said_of_the_model() -> None:
    told = {"code": "model_not_usable", "message": "start: x has changed", "param": "start"}
    assert recovery.failure(told, default="x", message="x", lines=()).values["error_param"] == "model"


@pytest.mark.parametrize("weights", [None, "w"])
@pytest.mark.parametrize("adapter", [None, "a"])
def test_kinds(weights: str | None, adapter: str | None) -> None:
    origin = Origin("b", Path(weights) if weights else None, Path(adapter) if adapter else None)
    kinds = {(None, None): None, ("w", None): "merged", (None, "a"): "adapter", ("w", "a"): "both"}
    assert origin.kind == kinds[weights, adapter]


def test_a_copy_is_whole_holds_plain_files_and_is_there_at_once_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "a"
    put_adapter(source)
    (source / "deep").mkdir()
    (source / "deep" / "file").write_text("x")
    (source / "escape").symlink_to("/etc/passwd")
    starts.keep(Origin("b", adapter=source), tmp_path, "j")
    kept = tmp_path / "jobs" / "j" / "start"
    files = {str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "manifest.json", "deep/file"}
    assert (kept / "deep" / "file").samefile(source / "deep" / "file")

    def no_links(*_: object, **__: object) -> None:
        raise PermissionError("this disk has no links")

    monkeypatch.setattr(os, "link", no_links)
    starts.keep(Origin("b", weights=source), tmp_path, "k")
    copied = tmp_path / "jobs" / "k" / "base" / "adapter_model.safetensors"
    assert copied.read_bytes() == (source / "adapter_model.safetensors").read_bytes()
    assert not copied.samefile(source / "adapter_model.safetensors")

    (source / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError):
        starts.keep(Origin("b", adapter=source), tmp_path, "m")
    assert list((tmp_path / "jobs" / "m").iterdir()) == []
    starts.discard(tmp_path, "m")
    assert not (tmp_path / "jobs" / "m").exists()
    (tmp_path / "jobs" / "j" / "run.yaml").touch()
    starts.discard(tmp_path, "j")
    assert kept.is_dir(), "more than a start is a job's"
