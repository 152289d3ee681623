"""Pausing and cancelling, seen from the scheduler: grace, stubborn runs, races with the end of a run."""

from __future__ import annotations

import time

import pytest

from service.db.engine import DatabaseBusy
from service.executors.base import Gone, Running
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


def test_a_validation_has_nothing_to_save_and_is_killed_at_once(world: World) -> None:
    world.validation_code = world.on_term = None
    job_id = world.submit()
    world.tick()
    world.store.request_cancel(job_id)
    world.tick()
    assert not world.alive() and world.job(job_id).stop_deadline is None
    world.tick()
    assert world.status(job_id) == "cancelled"


def test_what_outlives_its_supervisor_is_ended_before_the_job_is_over(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = world.running()
    ended: list[str] = []

    def recover(directory: object, asked: str) -> Gone:
        ended.append(asked)  # as the local executor does: what it does not adopt, it ends
        return Gone(1)

    monkeypatch.setattr(world.executor, "recover", recover)
    world.store.request_cancel(job_id)
    world.executor.vanish(world.folder(job_id))
    world.tick()
    assert world.status(job_id) == "cancelled" and ended == [job_id]


def test_a_newer_start_found_then_is_looked_after(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = world.running()
    (handle,) = world.alive()
    monkeypatch.setattr(world.executor, "poll", lambda handle: Gone(handle.attempt))
    world.tick()
    assert world.status(job_id) == "running" and world.executor.recover(world.folder(job_id), job_id) == Running(handle)


def test_a_busy_database_does_not_cost_the_grace_time(world: World) -> None:
    world.on_term = None
    job_id = world.running()
    world.store.request_cancel(job_id)
    apply, world.store.apply = world.store.apply, _busy  # type: ignore[method-assign]
    world.tick(3)
    assert world.alive()
    world.store.apply = apply  # type: ignore[method-assign]
    world.tick(2)
    assert world.alive() and world.job(job_id).stop_deadline == world.clock() + 10
    world.clock.now += 9
    world.tick()
    assert world.alive()
    world.clock.now += 1
    world.tick(2)
    assert world.status(job_id) == "cancelled" and not world.alive()


def _busy(*_args: object, **_more: object) -> None:
    raise DatabaseBusy("locked")


def test_a_stop_that_was_written_and_never_sent_is_sent_by_the_next_server(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = world.running()
    world.store.request_pause(job_id)
    with monkeypatch.context() as killed:
        killed.setattr(world.executor, "terminate", _fails)
        world.tick()
    assert world.job(job_id).stop_deadline is not None and world.alive()
    world.restart()
    world.tick(2)
    assert world.status(job_id) == "paused"
    assert not any("SIGKILL" in line for line in world.messages(job_id))


def _fails(*_args: object) -> None:
    raise OSError("killed here")


def test_a_clock_set_back_or_forward_moves_no_deadline(world: World) -> None:
    world.on_term = None
    job_id = world.running()
    world.store.request_cancel(job_id)
    world.tick()
    world.set_clock_back(-3600)
    world.clock.now += 9
    world.tick()
    assert world.alive()
    world.set_clock_back(7200)
    world.clock.now += 1
    world.tick(2)
    assert world.status(job_id) == "cancelled" and not world.alive()


def test_a_clock_set_back_under_a_server_that_was_replaced(world: World) -> None:
    world.on_term = None
    job_id = world.running()
    world.store.request_cancel(job_id)
    world.tick()
    world.set_clock_back(3600)
    world.restart()
    world.tick()
    world.clock.now += 10
    world.tick(2)
    assert world.status(job_id) == "cancelled"


def test_a_retry_and_a_start_do_not_wait_for_the_clock_to_come_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = world.running()
    world.finish(job_id, -9)
    world.tick()
    assert world.status(job_id) == "queued"
    world.tick()
    assert world.status(job_id) == "queued"  # its back-off
    world.set_clock_back(3600)
    with monkeypatch.context() as full:
        full.setattr(world.executor, "submit", _fails)
        world.tick(2)
    assert world.status(job_id) == "running" and not world.alive()
    world.set_clock_back(3600)
    world.clock.now += 2
    world.tick()
    assert world.alive()


def test_a_run_that_is_stopped_often_and_saves_in_between_goes_on(world: World) -> None:
    """Progress is told every so many steps only; a checkpoint is a step forward too."""
    job_id = world.running()
    for step in range(1, 7):
        world.emit(job_id, {"kind": "artifact", "artifact": "checkpoint", "step": step, "path": "x", "servable": False})
        world.finish(job_id, 3)
        world.tick(2)
        assert (world.status(job_id), world.job(job_id).step) == ("running", step)
    world.emit(job_id, {"kind": "artifact", "artifact": "checkpoint", "step": 2, "path": "x"})
    world.tick()
    assert world.job(job_id).step == 6
    for _ in range(3):
        world.finish(job_id, 3)
        world.tick(2)
    assert world.job(job_id).error_code == "run_stopped"


def test_ending_the_runs_waits_for_no_job_without_a_process(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.executor, "submit", _fails)
    job_id = world.submit()
    world.tick()
    began = time.monotonic()
    world.scheduler.stop(end_runs=True, seconds=5)
    assert time.monotonic() - began < 2 and world.job(job_id).lease_token is not None
