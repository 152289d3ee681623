"""Pausing and cancelling, seen from the scheduler: grace, stubborn runs, races with the end of a run."""

from __future__ import annotations

import pytest

from tests.unit.service.jobs.world import World


def test_pause_and_resume(world: World) -> None:
    job_id = world.running()
    world.store.request_pause(job_id)
    world.tick(2)
    assert world.status(job_id) == "paused" and not world.alive()
    world.tick(3)
    assert world.status(job_id) == "paused"
    world.store.request_resume(job_id)
    world.tick()
    assert world.status(job_id) == "running" and world.job(job_id).attempt == 2


def test_a_stubborn_run_is_killed_after_the_grace_time(world: World) -> None:
    world.on_term = None
    job_id = world.running()
    world.emit(job_id, {"kind": "progress", "step": 1, "micro_batch_seconds": 10.0, "save_seconds": 2.0})
    world.tick()
    world.store.request_cancel(job_id)
    world.tick()
    assert world.job(job_id).stop_deadline == world.clock() + 34
    world.clock.now += 33
    world.tick()
    assert world.status(job_id) == "cancelling" and world.alive()
    world.restart()  # the deadline is the job's, not the server's
    world.clock.now += 2
    world.tick(2)
    assert world.status(job_id) == "cancelled" and not world.alive()


def test_a_stubborn_pause_ends_paused(world: World) -> None:
    world.on_term = None
    job_id = world.running()
    world.store.request_pause(job_id)
    world.tick()
    world.clock.now += 11
    world.tick(2)
    assert world.status(job_id) == "paused"
    assert any("last checkpoint" in line for line in world.messages(job_id))


@pytest.mark.parametrize("code", [0, 2, 3, 7, -9, -11])
def test_a_cancelled_job_ends_cancelled_whatever_its_run_says(world: World, code: int) -> None:
    world.on_term = None
    job_id = world.running()
    world.store.request_cancel(job_id)
    world.finish(job_id, code)
    world.tick()
    assert world.status(job_id) == "cancelled"
    assert world.job(job_id).result_model is None


def test_pausing_and_finishing_at_once_succeeds(world: World) -> None:
    world.on_term = None
    job_id = world.running()
    world.store.request_pause(job_id)
    world.finish(job_id)
    world.tick()
    assert world.status(job_id) == "succeeded"


def test_cancel_during_validation(world: World) -> None:
    world.validation_code = None
    job_id = world.submit()
    world.tick()
    assert world.alive()
    assert world.store.request_cancel(job_id).status == "cancelling"
    world.tick(2)
    assert world.status(job_id) == "cancelled" and not world.alive()
