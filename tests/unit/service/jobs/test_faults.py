"""Jobs whose files fault, and long backlogs: neither may keep the slots, the database or a cancel."""

from __future__ import annotations

import errno
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from service.db.engine import _TURNS, BUSY_TIMEOUT_MS, DatabaseBusy
from service.executors.base import Gone
from service.jobs import backlog
from service.jobs.scheduler import PATIENCE
from service.jobs.store import JobStore
from service.jobs.tail import EVENTS
from tests.unit.service.jobs.world import Clock, World, new_job


def unreadable(world: World, job_id: str) -> None:
    """A folder in place of the file stands for EIO, EACCES and their like."""
    path = world.folder(job_id) / EVENTS
    path.unlink(missing_ok=True)
    path.mkdir()


def test_events_that_cannot_be_read_end_the_job_and_free_its_slot(world: World) -> None:
    job_id, next_job = world.running(), world.submit()
    unreadable(world, job_id)
    world.tick(PATIENCE - 1)
    assert world.status(job_id) == "running" and world.alive()
    world.tick(3)
    job = world.job(job_id)
    assert (job.status, job.error_code) == ("failed", "server_error")
    assert "Is a directory" in (job.error_message or "")
    assert world.status(next_job) == "running"


def test_events_that_cannot_be_read_do_not_keep_a_cancel_from_the_run(world: World) -> None:
    job_id = world.running()
    unreadable(world, job_id)
    world.store.request_cancel(job_id)
    world.tick()
    assert not world.alive()  # asked at the first look, not after the last
    world.tick(PATIENCE)
    assert world.status(job_id) == "cancelled"


def test_a_stubborn_run_with_unreadable_events_has_its_grace_time(world: World) -> None:
    world.on_term = None
    job_id = world.running()
    unreadable(world, job_id)
    world.store.request_pause(job_id)
    world.tick()
    assert world.job(job_id).stop_deadline is not None


def test_an_artifact_that_cannot_be_read_ends_the_job(world: World) -> None:
    job_id, next_job = world.running(), world.submit()
    (world.folder(job_id) / "artifact" / "manifest.json").mkdir(parents=True)
    world.executor.finish(world.folder(job_id), 0)
    world.tick(PATIENCE + 3)
    assert world.job(job_id).error_code == "server_error" and world.status(next_job) == "running"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM])
def test_faults_of_the_machine_are_waited_out(world: World, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    job_id = world.running()

    def fails(*_args: object, **_more: object) -> None:
        raise OSError(number, "for a while")

    with monkeypatch.context() as trouble:
        trouble.setattr(backlog, "take", fails)
        world.tick(3 * PATIENCE)
    assert world.status(job_id) == "running"


def test_a_job_that_cannot_be_started_gives_its_slot_back_and_is_tried_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, next_job = world.submit(), world.submit()
    submit = world.executor.submit

    def fails(asked: str, argv: Any, env: Any, directory: Path, **more: Any) -> Any:
        if asked == job_id and directory.name != "validation":
            raise OSError(errno.EACCES, "Permission denied")
        return submit(asked, argv, env, directory, **more)

    with monkeypatch.context() as trouble:
        trouble.setattr(world.executor, "submit", fails)
        world.tick(3)
        assert (world.status(job_id), world.status(next_job)) == ("running", "queued")
        for _ in range(PATIENCE):
            world.clock.now += 1.1
            world.tick()
    assert (world.status(job_id), world.status(next_job)) == ("queued", "running")
    assert any("others go first" in line for line in world.messages(job_id))
    world.finish(next_job)
    world.clock.now += 61
    world.tick(2)
    assert world.status(job_id) == "running" and world.alive()


def test_a_validation_that_cannot_be_started_gives_its_slot_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_args: object, **_more: object) -> None:
        raise OSError("the supervisor did not start")

    job_id = world.submit()
    with monkeypatch.context() as trouble:
        trouble.setattr(world.executor, "submit", fails)
        for _ in range(PATIENCE + 1):
            world.tick()
            world.clock.now += 1.1
    job = world.job(job_id)
    assert (job.status, job.lease_token) == ("validating_files", None)
    world.clock.now += 61
    world.tick(3)
    assert world.status(job_id) == "running"


def test_nothing_is_ended_or_started_beside_survivors(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = world.running()
    world.store.request_cancel(job_id)

    def recover(directory: Path, asked: str) -> Gone:
        raise OSError(errno.EAGAIN, "1 process is still alive")

    world.executor.vanish(world.folder(job_id))
    with monkeypatch.context() as stuck:
        stuck.setattr(world.executor, "recover", recover)
        world.tick(3 * PATIENCE)
        assert world.status(job_id) == "cancelling"
        starts = list(world.executor.starts)
        world.restart()
        world.tick(3 * PATIENCE)
        assert world.status(job_id) == "cancelling" and world.executor.starts == starts
    world.clock.now += 2
    world.tick()
    assert world.status(job_id) == "cancelled"


def test_an_adoption_that_fails_starts_nothing_until_it_is_tried_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = world.running()
    submit, asked_for = world.executor.submit, []

    def recover(directory: Path, asked: str) -> Gone:
        raise OSError(errno.EAGAIN, "1 process is still alive")

    def starts(*args: Any, **more: Any) -> Any:
        asked_for.append(args)
        return submit(*args, **more)

    with monkeypatch.context() as stuck:
        stuck.setattr(world.executor, "recover", recover)
        stuck.setattr(world.executor, "submit", starts)
        world.restart()
        world.tick(3)
    assert asked_for == []
    world.clock.now += 2
    world.tick()
    assert world.status(job_id) == "running" and len(world.alive()) == 1


def test_a_backlog_is_taken_over_in_pieces_and_the_job_ends_after_the_last(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = world.running()
    monkeypatch.setattr(backlog, "SECONDS", 0.0)
    world.emit(job_id, *({"kind": "metric", "step": step, "train_loss": 1.0} for step in range(2 * backlog.EVENTS + 1)))
    world.finish(job_id)
    before = world.job(job_id).last_seq
    for pieces in (1, 2):
        world.tick()
        assert world.status(job_id) == "running"
        assert world.job(job_id).last_seq == before + pieces * backlog.EVENTS
    world.tick()
    assert world.status(job_id) == "succeeded"
    steps = [event.data["step"] for event in world.store.events(job_id, limit=5000).data if event.type == "metrics"]
    assert steps == list(range(2 * backlog.EVENTS + 1))


def test_a_backlog_found_at_a_start_is_taken_over_in_pieces_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = world.running()
    starts = list(world.executor.starts)
    monkeypatch.setattr(backlog, "SECONDS", 0.0)
    world.emit(job_id, *({"kind": "metric", "step": step, "train_loss": 1.0} for step in range(3 * backlog.EVENTS)))
    world.finish(job_id)
    world.restart()
    assert world.status(job_id) == "running"
    world.tick(2)
    assert world.status(job_id) == "succeeded" and world.executor.starts == starts


def test_a_backlog_does_not_keep_a_cancel_from_the_run(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = world.running()
    monkeypatch.setattr(backlog, "SECONDS", 0.0)
    world.emit(job_id, *({"kind": "metric", "step": step, "train_loss": 1.0} for step in range(3 * backlog.EVENTS)))
    world.store.request_cancel(job_id)
    world.tick()
    assert not world.alive()


def test_a_long_backlog_leaves_turns_to_those_who_create_jobs(
    world: World, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60,000 events in 11 MB; a writer waits for its turn as long as on a server."""
    monkeypatch.setitem(_TURNS, world.store.engine, (threading.Lock(), BUSY_TIMEOUT_MS / 1000))
    job_id = world.running()
    lines = (
        json.dumps({"seq": step, "time": 1.0, "kind": "metric", "step": step, "train_loss": 1.5, "pad": "x" * 100})
        for step in range(60_000)
    )
    (world.folder(job_id) / EVENTS).write_text("\n".join(lines) + "\n")
    other, busy, waits = JobStore(world.store.engine, clock), [], []
    over = threading.Event()

    def create() -> None:
        while not over.wait(0.02):
            began = time.monotonic()
            try:
                other.create(new_job())
            except DatabaseBusy as error:
                busy.append(error)
            waits.append(time.monotonic() - began)

    thread = threading.Thread(target=create)
    thread.start()
    try:
        longest = 0.0
        for _ in range(4):
            began = time.process_time()
            world.scheduler._follow_all()
            longest = max(longest, time.process_time() - began)
            time.sleep(0.1)
    finally:
        over.set()
        thread.join()
    assert len(waits) >= 4 and not busy
    assert 0 < world.job(job_id).events_offset < (world.folder(job_id) / EVENTS).stat().st_size
    assert longest < 3.0  # a look leaves the rest to the next


def test_a_small_piece_of_events_is_cut_at_a_line(tmp_path: Path) -> None:
    from core.events import EventLog, read

    with EventLog(tmp_path / EVENTS) as log:
        for step in range(10):
            log.emit("progress", step=step)
    raw = (tmp_path / EVENTS).read_bytes().splitlines(keepends=True)
    batch, offset = read(tmp_path / EVENTS, len(raw[0]), lines=3)
    assert [event["step"] for event in batch] == [1, 2, 3] and offset == len(b"".join(raw[:4]))
    batch, offset = read(tmp_path / EVENTS, offset, lines=6)
    assert [event["step"] for event in batch] == [4, 5, 6, 7, 8, 9] and offset == len(b"".join(raw))
    batch, offset = read(tmp_path / EVENTS, 0, size=len(raw[0]) + 3)
    assert [event["step"] for event in batch] == [0] and offset == len(raw[0])
