"""What the scheduler does besides jobs, and when it does it."""

from __future__ import annotations

from sqlalchemy import select

from service.db.engine import read
from service.db.tables import Idempotency
from service.jobs.records import Created
from tests.unit.service.jobs.world import World, new_job


def test_old_idempotency_keys_are_forgotten_within_the_hour(world: World) -> None:
    assert isinstance(world.store.create(new_job(), idempotency_key="once"), Created)
    world.tick()
    world.clock.now += 24 * 3600 + 1
    world.tick()
    with read(world.store.engine) as session:
        assert session.scalars(select(Idempotency)).all() == []


def test_an_end_wakes_the_scheduler_for_the_next_job(world: World) -> None:
    """Its slot is free now, not after the next pause between two looks."""
    job_id = world.running()
    world.scheduler._wake.clear()
    world.tick()
    assert not world.scheduler._wake.is_set()
    world.finish(job_id)
    world.tick()
    assert world.scheduler._wake.is_set()


def test_retries_of_the_validation_are_none_of_the_run(world: World) -> None:
    world.verdict, world.validation_code = None, -11
    job_id = world.submit()
    world.tick(2)
    assert world.job(job_id).retries == 1
    world.verdict, world.validation_code = {"ok": True, "rows": 5, "warnings": []}, 0
    world.clock.now += 2
    world.tick(3)
    job = world.job(job_id)
    assert (job.status, job.retries) == ("running", 0)
