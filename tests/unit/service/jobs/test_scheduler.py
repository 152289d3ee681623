"""The scheduler on fake runs and a clock that only the test moves."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import yaml
from sqlalchemy import select

from service.db.engine import write
from service.db.tables import File, Job, Model
from service.executors.base import Gone
from service.jobs import names, tail
from service.jobs.lock import FolderInUse
from service.jobs.scheduler import Scheduler
from service.jobs.store import JobStore
from service.jobs.supervisor import RECORD
from tests.unit.service.jobs.world import VERDICT, World
from trainers.config import parse_run


def test_the_main_road(world: World) -> None:
    job_id = world.submit(suffix="shop")
    assert world.status(job_id) == "validating_files"
    world.tick()
    assert world.status(job_id) == "validating_files"
    world.tick(2)
    job = world.job(job_id)
    assert (job.status, job.attempt, job.started_at) == ("running", 1, int(world.clock()))
    assert job.resolved == {"n_epochs": 3, "batch_size": 2, "learning_rate_multiplier": 1.0}
    run = parse_run(yaml.safe_load((world.folder(job_id) / "run.yaml").read_text()))
    assert (run.config.epochs, run.config.batch_size, run.config.seed) == (3, 2, 7)
    world.emit(
        job_id,
        {"kind": "metric", "step": 1, "train_loss": 2.0},
        {"kind": "progress", "step": 1, "total_steps": 2, "trained_tokens": 50, "eta_seconds": 60.0,
         "micro_batch_seconds": 4.0, "save_seconds": 1.0},
    )  # fmt: skip
    world.tick()
    job = world.job(job_id)
    assert (job.step, job.total_steps, job.trained_tokens) == (1, 2, 50)
    assert job.estimated_finish == int(world.clock()) + 60
    assert job.grace_seconds == 14.0
    (world.folder(job_id) / "metrics.csv").write_text("step,train_loss\n1,2.0\n")
    world.finish(job_id)
    world.tick()
    job = world.job(job_id)
    assert (job.status, job.lease_token, job.finished_at) == ("succeeded", None, int(world.clock()))
    assert job.result_model == f"ft:tiny-llama:local:shop:{job_id[-8:]}"
    with write(world.store.engine) as session:
        (model,) = session.scalars(select(Model)).all()
        (file,) = session.scalars(select(File)).all()
    assert (model.id, model.kind, model.path) == (job.result_model, "adapter", str(world.folder(job_id) / "artifact"))
    assert job.result_files == [file.id]
    assert names.file_path(world.home, file.id).read_text().startswith("step,train_loss")
    said = world.messages(job_id)
    for part in (
        "Created job",
        "Files validated",
        "Job started",
        "Step 1/2: training loss=2",
        "New model",
        "successfully",
    ):
        assert sum(part in line for line in said) == 1, (part, said)


def test_a_bad_file_fails_at_once_with_its_rows(world: World) -> None:
    problems = [
        {"file": "training_file", "line": n, "code": "missing_content", "message": "no content"} for n in range(1, 131)
    ]
    world.verdict = {"ok": False, "param": "training_file", "code": "missing_content", "problems": problems,
                     "problem_count": 130}  # fmt: skip
    world.validation_code = 2
    job_id = world.submit()
    world.tick(2)
    job = world.job(job_id)
    assert (job.status, job.error_code, job.error_param) == ("failed", "missing_content", "training_file")
    assert job.error_message is not None
    assert "100 rows (lines 1, 2, 3, ...): no content (missing_content)" in job.error_message
    assert "and 30 more" in job.error_message
    event = world.store.events(job_id, newest_first=True).data[0]
    assert event.level == "error" and len(event.data["problems"]) == 100


def test_validation_runs_beside_a_running_job(world: World) -> None:
    busy = world.running()
    world.verdict = {"ok": False, "param": "validation_file", "code": "empty_file", "problems": [], "problem_count": 1}
    world.validation_code = 2
    bad = world.submit()
    world.tick(2)
    assert (world.status(busy), world.status(bad)) == ("running", "failed")
    assert world.job(bad).error_param == "validation_file"


def test_warnings_are_told(world: World) -> None:
    warning = {"file": "training_file", "line": 3, "code": "truncated", "message": "the row is cut"}
    world.verdict = VERDICT | {"warnings": [warning], "warning_count": 5}
    job_id = world.running()
    assert "training_file line 3: the row is cut" in world.messages(job_id)
    assert "4 more warnings are not shown" in world.messages(job_id)


def test_a_validation_that_crashes_is_done_again_and_then_given_up(world: World) -> None:
    world.verdict, world.validation_code = None, -11
    job_id = world.submit()
    for _ in range(8):
        world.tick(2)
        world.clock.now += 5
    job = world.job(job_id)
    assert (job.status, job.error_code) == ("failed", "validation_crashed")
    assert sum("done again" in line for line in world.messages(job_id)) == 3
    assert len(world.executor.starts) == 4


def test_no_more_runs_than_slots(store: JobStore, clock, tmp_path: Path) -> None:
    world = World(store, clock, tmp_path / "home", max_running=2)
    ids = [world.submit() for _ in range(4)]
    world.tick(6)
    assert [world.status(job_id) for job_id in ids] == ["running", "running", "queued", "queued"]
    world.finish(ids[0])
    world.tick(2)
    assert [world.status(job_id) for job_id in ids] == ["succeeded", "running", "running", "queued"]


def test_a_run_is_adopted_and_never_started_again(world: World) -> None:
    job_id = world.running()
    world.emit(job_id, {"kind": "metric", "step": 1, "train_loss": 2.0})
    world.tick()
    starts = list(world.executor.starts)
    world.restart()
    world.emit(job_id, {"kind": "metric", "step": 2, "train_loss": 1.0})
    world.tick()
    assert world.executor.starts == starts
    assert any("looks after the run again" in line for line in world.messages(job_id))
    assert [line for line in world.messages(job_id) if line.startswith("Step")] == [
        "Step 1: training loss=2", "Step 2: training loss=1",
    ]  # fmt: skip
    world.finish(job_id)
    world.tick()
    assert world.status(job_id) == "succeeded"


def test_a_run_that_ended_while_no_server_lived_is_taken_as_it_ended(world: World) -> None:
    job_id = world.running()
    starts = list(world.executor.starts)
    world.emit(job_id, {"kind": "progress", "step": 5})
    world.finish(job_id)
    world.restart()
    assert world.status(job_id) == "succeeded"
    assert world.job(job_id).step == 5
    assert world.executor.starts == starts


def test_claimed_but_never_started(world: World) -> None:
    """The server died between the claim and the start: an older end of the same folder must not count."""
    job_id = world.running()
    world.executor.finish(world.folder(job_id), -9)
    world.tick()
    assert world.status(job_id) == "queued"
    world.clock.now += 100
    claimed = world.store.claim("me", 30)
    assert claimed is not None and claimed.attempt == 2
    world.restart()
    world.tick()
    assert world.status(job_id) == "running"
    assert world.alive()[0].attempt == 2


def test_a_vanished_run_is_queued_again_and_given_up_without_progress(world: World) -> None:
    job_id = world.running()
    world.emit(job_id, {"kind": "progress", "step": 3})
    for vanished in range(1, 5):
        world.tick()
        world.executor.vanish(world.folder(job_id))
        world.restart()
        job = world.job(job_id)
        if vanished == 2:  # it had come further in between: the count begins anew
            assert job.restarts_without_progress == 1
        if job.status == "queued":
            world.tick(2)
            if vanished == 1:
                world.emit(job_id, {"kind": "progress", "step": 4})
    assert world.job(job_id).status == "running"
    world.executor.vanish(world.folder(job_id))
    world.tick()
    job = world.job(job_id)
    assert (job.status, job.error_code) == ("failed", "run_lost")
    assert sum("job queued again, to resume" in line for line in world.messages(job_id)) == 4


def test_killed_runs_are_retried_with_a_limit(world: World) -> None:
    job_id = world.running()
    waits = []
    for _ in range(3):
        world.finish(job_id, -9, lines=["bye"])
        world.tick()
        job = world.job(job_id)
        assert job.status == "queued"
        waits.append(job.not_before - world.clock())
        world.tick(2)
        assert world.status(job_id) == "queued"
        world.clock.now += waits[-1]
        world.tick(2)
        assert world.status(job_id) == "running"
    world.finish(job_id, -9, lines=["one", "two"])
    world.tick()
    job = world.job(job_id)
    assert (job.status, job.error_code, job.retries) == ("failed", "run_killed", 3)
    assert job.error_message is not None and job.error_message.endswith("one\ntwo")
    assert "SIGKILL" in job.error_message and "after 3 retries" in job.error_message
    assert 1.5 <= waits[0] <= 2.5 and 3 <= waits[1] <= 5 and 6 <= waits[2] <= 10
    assert len([start for start in world.executor.starts if start[1] == world.folder(job_id)]) == 4


@pytest.mark.parametrize(("code", "error_code"), [(7, "run_crashed"), (-11, "run_killed"), (1, "run_crashed")])
def test_other_crashes_fail_with_the_last_lines(world: World, code: int, error_code: str) -> None:
    job_id = world.running()
    world.finish(job_id, code, lines=["Traceback", "KeyError: 'x'"])
    world.tick()
    job = world.job(job_id)
    assert (job.status, job.error_code, job.retries) == ("failed", error_code, 0)
    assert job.error_message is not None and job.error_message.endswith("Traceback\nKeyError: 'x'")


def test_a_user_error_is_told_as_the_run_said_it(world: World) -> None:
    job_id = world.running()
    world.emit(job_id, {"kind": "error", "code": "not_finite", "message": "lower the rate", "param": "eval_file"})
    world.finish(job_id, 2)
    world.tick()
    job = world.job(job_id)
    assert (job.status, job.error_code, job.error_message) == ("failed", "not_finite", "lower the rate")
    assert job.error_param == "validation_file"


def test_success_without_artifact_is_a_failure(world: World) -> None:
    job_id = world.running()
    world.executor.finish(world.folder(job_id), 0)
    world.tick()
    assert (world.status(job_id), world.job(job_id).error_code) == ("failed", "artifact_missing")


def test_checkpoints_appear_and_go_with_retention(world: World) -> None:
    job_id = world.running()
    for step in (1, 2):
        saved = world.folder(job_id) / f"checkpoints/step-{step:08d}"
        (saved / "adapter").mkdir(parents=True)
        world.emit(
            job_id,
            {"kind": "metric", "step": step, "train_loss": 1.0 / step},
            {"kind": "artifact", "artifact": "checkpoint", "path": str(saved), "step": step, "servable": True,
             "metrics": {"valid_loss": 0.5}},
        )  # fmt: skip
        world.tick()
        if step == 1:
            (saved / "adapter").rmdir()
    (row,) = world.store.checkpoints(job_id).data
    assert row.model_id == f"ft:tiny-llama:local::{job_id[-8:]}:ckpt-step-2"
    assert row.metrics == {"step": 2, "train_loss": 0.5, "valid_loss": 0.5}
    assert len(world.store.checkpoints(job_id, available=False).data) == 2


def test_broken_events_do_no_harm(world: World) -> None:
    job_id = world.running()
    world.emit(
        job_id,
        {"kind": "progress", "step": -1, "trained_tokens": 10**30, "micro_batch_seconds": "x", "eta_seconds": None},
        {"kind": "metric", "step": None, "train_loss": None},
        {"kind": "artifact", "artifact": "checkpoint"},
        {"kind": "message", "level": "shout", "message": "x" * 10_000},
        {"kind": "unknown"},
    )
    with (world.folder(job_id) / "events.jsonl").open("a") as file:
        file.write('not json\n{"seq": 1, "kind": "metric", "step": NaN}\n{"half')
    world.tick()
    job = world.job(job_id)
    assert (job.status, job.step) == ("running", 0)
    assert job.events_offset > 10_000


def test_a_busy_writer_does_not_keep_the_scheduler(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever writes faster than events are taken over must not stop pauses, cancels and other jobs."""
    job_id = world.running()
    world.emit(job_id, {"kind": "metric", "step": 0, "train_loss": 1.0})
    apply, taken = world.store.apply, []

    def slow(*args, **kwargs):
        taken.append(1)
        assert len(taken) < 50
        world.emit(job_id, {"kind": "metric", "step": len(taken), "train_loss": 1.0})
        return apply(*args, **kwargs)

    monkeypatch.setattr(world.store, "apply", slow)
    world.tick()
    assert len(taken) == 1


def test_a_hyperparameter_that_no_run_takes_fails_the_job(world: World) -> None:
    job_id = world.submit(resolved={"rank": -1})
    world.tick(3)
    job = world.job(job_id)
    assert (job.status, job.error_code) == ("failed", "invalid_hyperparameters")
    assert not world.alive()


def test_a_server_wide_stop_checkpoints_and_queues_again(world: World) -> None:
    job_id = world.running()
    world.scheduler.stop(end_runs=True, seconds=5)
    assert world.status(job_id) == "queued"
    assert not world.alive()
    world.restart()
    world.tick()
    assert world.status(job_id) == "running"


def test_a_plain_stop_leaves_runs_alone(world: World) -> None:
    job_id = world.running()
    world.scheduler.stop()
    assert world.status(job_id) == "running" and len(world.alive()) == 1


def test_a_holder_that_slept_too_long_changes_nothing(world: World) -> None:
    job_id = world.running()
    sleeper = world.scheduler
    world.clock.now += 31
    world.restart("other")
    assert world.job(job_id).lease_owner == "other"
    world.finish(job_id)
    sleeper._safely(sleeper._follow_all)  # before it has looked at its leases
    assert world.status(job_id) == "running" and sleeper._live == {}
    world.tick()
    assert world.status(job_id) == "succeeded"


def test_two_schedulers_share_jobs_without_doubling(store: JobStore, clock, tmp_path: Path) -> None:
    world = World(store, clock, tmp_path / "home", max_running=3)
    ids = [world.submit() for _ in range(30)]
    other = world.new_scheduler("other")
    other.open()
    for _ in range(40):
        for scheduler in (world.scheduler, other):
            scheduler.tick()
        for handle in world.alive():
            world.finish(handle.job_id)
    assert {world.status(job_id) for job_id in ids} == {"succeeded"}
    runs = [start for start in world.executor.starts if start[1].name != "validation"]
    assert len(runs) == len(set(runs)) == 30


def test_a_locked_database_delays_and_breaks_nothing(world: World) -> None:
    job_id = world.running()
    world.finish(job_id)
    with write(world.store.engine):
        world.tick()
    assert world.status(job_id) == "running"
    world.tick()
    assert world.status(job_id) == "succeeded"


def test_adoption_is_tried_again_when_the_database_was_locked(world: World) -> None:
    job_id = world.running()
    starts = list(world.executor.starts)
    with write(world.store.engine):
        world.restart()
    world.clock.now += 11
    world.tick(2)
    assert world.executor.starts == starts
    assert any("looks after the run again" in line for line in world.messages(job_id))


def test_a_run_that_cannot_be_started_yet_is_tried_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = world.submit()
    world.tick()
    submit = world.executor.submit

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(world.executor, "submit", full)
    world.tick(3)
    assert world.status(job_id) == "running" and not world.alive()
    assert sum("cannot be started yet" in line for line in world.messages(job_id)) == 1
    monkeypatch.setattr(world.executor, "submit", submit)
    world.clock.now += 2
    world.tick()
    assert len(world.alive()) == 1


def test_a_database_older_than_the_folder_counts_on_from_it(world: World) -> None:
    job_id = world.submit()
    world.tick()
    folder = world.folder(job_id)
    world.executor.submit(job_id, ["run"], {}, folder, attempt=9, token="t")
    world.executor.vanish(folder)
    world.tick(4)
    assert world.status(job_id) == "running"
    assert world.alive()[0].attempt == world.job(job_id).attempt == 10


def test_a_second_server_is_refused_with_the_pid_of_the_first(store: JobStore, world: World, tmp_path: Path) -> None:
    import os

    first = Scheduler(store, world.executor, tmp_path / "locked")
    first.open()
    with pytest.raises(FolderInUse, match=f"process {os.getpid()}") as caught:
        Scheduler(store, world.executor, tmp_path / "locked").open()
    assert caught.value.pid == os.getpid()
    first.stop()
    second = Scheduler(store, world.executor, tmp_path / "locked")
    second.open()
    assert second._owner == first._owner  # leases are held under the folder's name
    second.stop()


def test_the_thread_does_the_work(store: JobStore, world: World, tmp_path: Path) -> None:
    """The only test that waits on the real scheduler thread."""
    store.clock = __import__("time").time
    scheduler = Scheduler(store, world.executor, tmp_path / "home")
    scheduler.start()
    try:
        job_id = world.submit()
        done = threading.Event()
        for _ in range(500):
            scheduler.wake()
            if world.status(job_id) == "running" and world.alive():
                break
            done.wait(0.01)
        world.finish(job_id)
        for _ in range(500):
            scheduler.wake()
            if world.status(job_id) == "succeeded":
                break
            done.wait(0.01)
        assert world.status(job_id) == "succeeded"
    finally:
        scheduler.stop()


def test_nothing_of_a_validation_is_taken_from_an_earlier_one(world: World) -> None:
    """A verdict that an earlier process left behind must not pass for the new one's."""
    job_id = world.submit()
    folder = names.validation_directory(world.home, job_id)
    folder.mkdir(parents=True)
    (folder / "validation.json").write_text(json.dumps(VERDICT))
    world.verdict, world.validation_code = None, 0
    world.tick(2)
    assert world.status(job_id) == "validating_files"
    assert world.executor.recover(world.folder(job_id), job_id) == Gone(None)


def test_a_run_of_a_newer_attempt_that_is_gone_is_counted_on_from_and_is_no_loss(world: World) -> None:
    """Starting it under its own number again would be refused as stale, and look as if one more run had vanished."""
    job_id = world.submit()
    world.tick()
    folder = world.folder(job_id)
    world.executor.submit(job_id, ["run"], {}, folder, attempt=9, token="t")
    world.executor.vanish(folder)
    world.tick(4)
    assert world.job(job_id).restarts_without_progress == 0
    assert not any("vanished" in line for line in world.messages(job_id))


def test_lines_that_another_reader_took_over_meanwhile_are_not_told_twice(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = world.running()
    world.emit(job_id, {"kind": "message", "message": "once"})
    translate = tail.translate

    def slow(job: Job, batch: list[dict[str, object]]) -> tail.Changes:
        monkeypatch.setattr(tail, "translate", translate)
        world.scheduler._catch_up(world.scheduler._live[job_id], job)  # between its reading and its writing
        return translate(job, batch)

    monkeypatch.setattr(tail, "translate", slow)
    world.tick(2)
    assert world.messages(job_id).count("once") == 1
    assert world.job(job_id).events_offset == (world.folder(job_id) / tail.EVENTS).stat().st_size


def test_an_error_of_an_earlier_attempt_explains_no_later_end(world: World) -> None:
    job_id = world.running()
    world.emit(job_id, {"kind": "error", "code": "io_error", "message": "the disk was full", "retryable": True})
    world.finish(job_id, 1)
    world.tick()
    assert world.status(job_id) == "queued" and world.job(job_id).retries == 1
    world.clock.now += 100
    world.tick()
    assert world.status(job_id) == "running"
    (world.folder(job_id) / RECORD).write_text(json.dumps({"started_at": world.clock()}))
    world.finish(job_id, 1)
    world.tick()
    job = world.job(job_id)
    assert (job.status, job.error_code) == ("failed", "run_crashed")
    assert "the disk was full" not in (job.error_message or "")
