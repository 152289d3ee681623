"""A server that is stopped, and stops its runs with it: that is no fault of the runs, however often it happens."""

from __future__ import annotations

import signal

import pytest

from service.jobs.recovery import RetryPolicy
from tests.unit.service.jobs.world import World

OFTEN = RetryPolicy().max_restarts + 3


def test_a_healthy_run_survives_any_number_of_stops(world: World) -> None:
    job_id = world.running()
    for _ in range(OFTEN):
        world.scheduler.stop(end_runs=True, seconds=5)
        assert world.status(job_id) == "queued"
        world.restart()
        world.tick()
        assert world.status(job_id) == "running" and world.alive()
    assert world.job(job_id).restarts_without_progress == 0
    assert sum("The server was stopped" in line for line in world.messages(job_id)) == OFTEN


def test_a_healthy_validation_survives_any_number_of_stops(world: World) -> None:
    world.validation_code = None
    job_id = world.submit()
    world.tick()
    for _ in range(OFTEN):
        assert world.alive()
        world.scheduler.stop(end_runs=True, seconds=5)
        assert world.status(job_id) == "validating_files" and not world.alive()
        world.restart()
        world.tick()
    assert world.job(job_id).retries == 0


@pytest.mark.parametrize("end", [3, -signal.SIGTERM, -signal.SIGKILL, None])
def test_the_next_server_knows_it_of_a_run_that_took_longer_to_stop(world: World, end: int | None) -> None:
    world.on_term = None
    job_id = world.running()
    for _ in range(OFTEN):
        world.scheduler.stop(end_runs=True, seconds=0.0)
        assert world.status(job_id) == "running" and world.alive()
        world.restart()
        if end is None:
            world.executor.vanish(world.folder(job_id))
        else:
            world.executor.finish(world.folder(job_id), end)
        world.tick(2)
        assert world.status(job_id) == "running" and world.alive()
    job = world.job(job_id)
    assert (job.restarts_without_progress, job.retries) == (0, 0)


def test_the_next_start_of_the_run_is_counted_again(world: World) -> None:
    job_id = world.running()
    world.scheduler.stop(end_runs=True, seconds=5)
    world.restart()
    world.tick()
    world.finish(job_id, 3)
    world.tick()
    assert world.job(job_id).restarts_without_progress == 1


def test_a_run_that_crashes_while_the_server_stops_has_crashed(world: World) -> None:
    world.on_term = 1
    job_id = world.running()
    world.scheduler.stop(end_runs=True, seconds=5)
    assert world.job(job_id).error_code == "run_crashed"


def test_what_was_asked_before_the_stop_is_still_what_becomes_of_it(world: World) -> None:
    world.on_term = None
    pausing = world.running()
    world.store.request_pause(pausing)
    world.tick()
    world.scheduler.stop(end_runs=True, seconds=0.0)
    world.restart()
    world.executor.finish(world.folder(pausing), 3)
    world.tick()
    assert world.status(pausing) == "paused"
