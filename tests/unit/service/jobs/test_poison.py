"""What a user's file or a run says may be no UTF-8; one job's trouble must never become that of all others."""

from __future__ import annotations

import pytest

from service.jobs.scheduler import PATIENCE, Scheduler
from service.jobs.tail import EVENTS
from tests.unit.service.jobs.world import VERDICT, World

PROBLEM = {"file": "training_file", "line": 1, "code": "invalid_weight", "message": "weight is \ud800\0"}


def test_a_verdict_with_half_a_pair_is_written_down(world: World) -> None:
    world.verdict = VERDICT | {"ok": False, "problems": [PROBLEM], "problem_count": 1}
    world.validation_code = 2
    bad = [world.submit(), world.submit()]  # as many as validate at once
    world.tick(2)
    assert {world.status(job_id) for job_id in bad} == {"failed"}
    assert "weight is \\ud800\\x00" in (world.job(bad[0]).error_message or "")
    data = world.store.events(bad[0], limit=100, newest_first=True).data[0].data
    assert data["problems"] == [PROBLEM | {"message": "weight is \\ud800\\x00"}]


def test_half_a_pair_in_what_a_run_says_does_not_stop_the_tail(world: World) -> None:
    job_id = world.running()
    world.emit(job_id, {"kind": "message", "message": "odd \ud800"}, {"kind": "progress", "step": 4})
    world.emit(job_id, {"kind": "artifact", "artifact": "checkpoint", "step": 4, "path": "/x/\ud800",
                        "metrics": {"train_loss": "\ud800"}})  # fmt: skip
    world.tick()
    job = world.job(job_id)
    assert job.step == 4 and job.events_offset == (world.folder(job_id) / EVENTS).stat().st_size
    assert "odd \\ud800" in world.messages(job_id)
    (saved,) = world.store.checkpoints(job_id).data
    assert saved.metrics["train_loss"] == "\\ud800" and saved.path.startswith("/x/\\ud800")


def _broken(*_args: object, **_more: object) -> None:
    raise ZeroDivisionError("a fault of ours")


def test_a_fault_that_stays_ends_its_job_and_no_other(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = world.running()
    monkeypatch.setattr(Scheduler, "_catch_up", _broken)
    world.tick(PATIENCE - 1)
    assert world.status(job_id) == "running" and world.alive()
    world.tick()
    job = world.job(job_id)
    assert (job.status, job.error_code, job.lease_token) == ("failed", "server_error", None)
    assert "a fault of ours" in (job.error_message or "") and not world.alive()
    monkeypatch.undo()
    assert world.running()


def test_a_fault_that_stays_still_ends_cancelled(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = world.running()
    monkeypatch.setattr(Scheduler, "_catch_up", _broken)
    world.store.request_cancel(job_id)
    world.tick(PATIENCE)
    assert world.status(job_id) == "cancelled" and not world.alive()


def test_a_full_disk_and_passing_faults_end_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = world.running()

    def full(*_args: object, **_more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Scheduler, "_catch_up", full)
    world.tick(3 * PATIENCE)
    for _ in range(3):
        monkeypatch.setattr(Scheduler, "_catch_up", _broken)
        world.tick(PATIENCE - 1)
        monkeypatch.undo()
        world.tick()
    assert world.status(job_id) == "running" and world.alive()
