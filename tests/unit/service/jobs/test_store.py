"""The job store: guarded writes, pages, leases, users' wishes."""

from __future__ import annotations

import itertools
import sqlite3
import threading

import pytest
from sqlalchemy import Engine, event, insert, text
from sqlalchemy.exc import IntegrityError

from service.db.engine import DatabaseBusy, write
from service.db.tables import Checkpoint, Job
from service.jobs.records import Event, StaleWrite, UnknownJob, event_seq
from service.jobs.states import STATES, TRANSITIONS, IllegalTransition
from service.jobs.store import JobStore
from tests.unit.service.jobs.world import Clock, new_job


def queued(store: JobStore, **changes) -> Job:
    job = store.create(new_job(**changes)).job
    claimed = store.claim("validator", 30, status="validating_files")
    assert claimed is not None and claimed.id == job.id
    return store.transition(job.id, "validating_files", "queued", token=claimed.lease_token)


def running(store: JobStore, **changes) -> Job:
    queued(store, **changes)
    job = store.claim("me", 30)
    assert job is not None
    return job


def test_create_writes_a_job_and_its_first_events(store: JobStore, clock: Clock) -> None:
    created = store.create(new_job(metadata={"a": "b"}, suffix="shop"))
    job = store.get(created.job.id)
    assert not created.replayed
    assert job.id.startswith("ftjob-") and len(job.id) == 30
    assert (job.status, job.created_at, job.metadata_, job.suffix) == (
        "validating_files",
        int(clock.now),
        {"a": "b"},
        "shop",
    )
    assert [event.seq for event in store.events(job.id).data] == [1, 2]
    assert store.create(new_job(kind="steering_fit")).job.id.startswith("steerjob-")


def test_unknown_job(store: JobStore) -> None:
    for call in (store.get, store.events, store.checkpoints, store.request_cancel, store.request_pause):
        with pytest.raises(UnknownJob, match="ftjob-none"):
            call("ftjob-none")
    with pytest.raises(UnknownJob):
        store.list(after="ftjob-none")


def test_list_pages_newest_first(store: JobStore) -> None:
    ids = [store.create(new_job()).job.id for _ in range(5)][::-1]
    first = store.list(limit=2)
    assert [job.id for job in first.data] == ids[:2] and first.has_more
    second = store.list(limit=3, after=ids[1])
    assert [job.id for job in second.data] == ids[2:] and not second.has_more


def test_list_filters(store: JobStore) -> None:
    wanted = store.create(new_job(metadata={'odd "key".x': "1", "b": "2"})).job.id
    store.create(new_job(metadata={"b": "2"}))
    fit = store.create(new_job(kind="steering_fit")).job.id
    assert [job.id for job in store.list(metadata={'odd "key".x': "1", "b": "2"}).data] == [wanted]
    assert store.list(metadata={"b": "3"}).data == []
    assert [job.id for job in store.list(kind="steering_fit").data] == [fit]
    assert store.list(status="queued").data == []


def test_a_page_of_ten_thousand_jobs_takes_no_more_work_than_one_of_a_hundred(store: JobStore, engine: Engine) -> None:
    template = {
        "kind": "fine_tuning", "status": "validating_files", "created_at": 1, "key_id": "k", "body_hash": "b",
        "model": "m", "method": "lora", "request": {}, "resolved": {}, "seed": 1, "training_file": "f",
        "result_files": [],
    }  # fmt: skip
    rows = [template | {"id": f"ftjob-{i:024d}", "metadata_": {"team": str(i % 100)}} for i in range(10_000)]
    ticks: list[int] = []

    @event.listens_for(engine, "checkout")
    def count(connection: sqlite3.Connection, *_more: object) -> None:
        connection.set_progress_handler(lambda: ticks.append(1), 10)  # of the database's own instructions

    work = []
    for some, after in ((rows[:100], 50), (rows[100:], 5000)):
        with write(engine) as session:
            session.execute(insert(Job), some)
        ticks.clear()
        for kind in ("fine_tuning", None):
            page = store.list(limit=20, after=f"ftjob-{after:024d}", kind=kind)
            assert len(page.data) == 20 and page.has_more
        work.append(len(ticks))
    assert 0 < work[1] <= 1.5 * work[0]
    assert len(store.list(limit=100, metadata={"team": "7"}).data) == 100


def test_events_in_both_directions(store: JobStore) -> None:
    job = store.create(new_job()).job
    assert store.append_event(job.id, Event("three", level="warn", data={"x": 1})) == 3
    assert [event.seq for event in store.events(job.id, after=1).data] == [2, 3]
    newest = store.events(job.id, limit=2, newest_first=True)
    assert [event.seq for event in newest.data] == [3, 2] and newest.has_more
    assert [event.seq for event in store.events(job.id, after=2, newest_first=True).data] == [1]
    event = newest.data[0]
    assert (event.level, event.data, event_seq(event.id)) == ("warn", {"x": 1}, 3)


@pytest.mark.parametrize(
    "bad", ["", "x", "ftevent-", "ftevent-a-b", "ftevent-a-1x", "ftevent-a-" + "9" * 40, "evt-a-1"]
)
def test_event_ids_are_checked(bad: str) -> None:
    with pytest.raises(ValueError, match="not an event id"):
        event_seq(bad)


def test_events_have_no_gaps_under_concurrent_writers(store: JobStore) -> None:
    job = store.create(new_job()).job
    threads = [
        threading.Thread(target=lambda: [store.append_event(job.id, Event("x")) for _ in range(10)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [event.seq for event in store.events(job.id, limit=100).data] == list(range(1, 43))


def test_claim_is_first_in_first_out_and_exclusive(store: JobStore) -> None:
    ids = [queued(store).id for _ in range(3)]
    claimed = [store.claim("me", 30) for _ in range(4)]
    assert [job and job.id for job in claimed] == [*ids, None]
    assert len({job.lease_token for job in claimed if job}) == 3


def test_claims_of_many_threads_never_meet(store: JobStore) -> None:
    ids = {queued(store).id for _ in range(40)}
    got: list[str] = []

    def work() -> None:
        while (job := store.claim("me", 30)) is not None:
            got.append(job.id)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == sorted(ids)


def test_back_off_is_respected(store: JobStore, clock: Clock) -> None:
    job = running(store)
    store.transition(job.id, "running", "queued", token=job.lease_token, values={"not_before": clock.now + 5})
    assert store.claim("me", 30) is None
    assert store.claimable() == set()
    clock.now += 6
    assert store.claimable() == {"queued"}
    again = store.claim("me", 30)
    assert again is not None and again.attempt == job.attempt + 1 and again.lease_token != job.lease_token


def test_a_stale_token_writes_nothing(store: JobStore, clock: Clock) -> None:
    old = running(store)
    clock.now += 31
    (new,) = store.take_over("other", 30)
    before = store.get(old.id)
    for attempt in (
        lambda: store.transition(old.id, "running", "succeeded", token=old.lease_token),
        lambda: store.apply(old.id, token=old.lease_token, values={"step": 9}, events=[Event("late")]),
        lambda: store.append_event(old.id, Event("late"), token=old.lease_token),
        lambda: store.transition(old.id, "running", "queued"),
    ):
        with pytest.raises(StaleWrite):
            attempt()
    assert store.renew({old.id: old.lease_token or ""}, 30) == {old.id}
    after = store.get(old.id)
    assert (after.status, after.step, after.last_seq, after.lease_token) == (
        before.status, before.step, before.last_seq, new.lease_token,
    )  # fmt: skip


def test_a_lease_survives_two_missed_renewals_and_clock_jumps(store: JobStore, clock: Clock) -> None:
    job = running(store)
    clock.now += 29
    assert store.take_over("other", 30) == []
    assert store.renew({job.id: job.lease_token or ""}, 30) == set()
    clock.now += 29
    assert store.take_over("other", 30) == []
    clock.now -= 3600
    assert store.take_over("other", 30) == []


def test_take_over_takes_its_own_only_when_told(store: JobStore) -> None:
    job = running(store)
    assert store.take_over("me", 30) == []
    (mine,) = store.take_over("me", 30, own=True)
    assert mine.id == job.id and mine.lease_token != job.lease_token


def test_transition_refuses_what_the_machine_forbids(store: JobStore) -> None:
    for source, target in itertools.product(STATES, STATES):
        if target not in TRANSITIONS[source]:
            with pytest.raises(IllegalTransition):
                store.transition("ftjob-any", source, target)


def test_apply_takes_an_offset_only_once(store: JobStore) -> None:
    job = running(store)
    store.apply(job.id, token=job.lease_token, offset=0, values={"events_offset": 10})
    with pytest.raises(StaleWrite):
        store.apply(job.id, token=job.lease_token, offset=0, values={"events_offset": 10}, events=[Event("twice")])


def test_checkpoints_page_and_replace(store: JobStore) -> None:
    job = running(store)

    def row(step: int, path: str) -> Checkpoint:
        return Checkpoint(
            id=f"ftckpt-{step}-{path}", job_id=job.id, step=step, created_at=1, model_id=f"ft:{step}", kind="adapter",
            path=path, metrics={"step": step}, available=True,
        )  # fmt: skip

    store.apply(job.id, token=job.lease_token, checkpoints=[row(1, "a"), row(2, "a"), row(3, "a")])
    store.apply(job.id, token=job.lease_token, checkpoints=[row(2, "b")], gone=["ftckpt-1-a"])
    page = store.checkpoints(job.id, limit=1)
    assert [c.step for c in page.data] == [3] and page.has_more
    (second,) = store.checkpoints(job.id, after=page.data[0].id).data
    other = store.create(new_job()).job.id
    for stranger, after in ((job.id, "ftckpt-none"), (other, page.data[0].id)):
        with pytest.raises(LookupError, match=after):
            store.checkpoints(stranger, after=after)
    assert (second.step, second.path, second.id) == (2, "b", "ftckpt-2-a")
    assert [c.step for c in store.checkpoints(job.id, available=False).data] == [3, 2, 1]


@pytest.mark.parametrize("status", ["validating_files", "queued", "paused"])
def test_cancel_is_immediate_where_nothing_runs(store: JobStore, status: str) -> None:
    job = store.create(new_job()).job if status == "validating_files" else queued(store)
    if status == "paused":
        store.request_pause(job.id)
    cancelled = store.request_cancel(job.id)
    assert (cancelled.status, cancelled.finished_at) == ("cancelled", int(store.clock()))


def test_cancel_of_what_runs_waits_for_its_processes(store: JobStore) -> None:
    job = running(store)
    assert store.request_cancel(job.id).status == "cancelling"
    assert store.request_cancel(job.id).status == "cancelling"
    assert store.get(job.id).lease_token == job.lease_token
    with pytest.raises(IllegalTransition):
        store.request_pause(job.id)


def test_pause_and_resume(store: JobStore) -> None:
    job = running(store)
    assert store.request_pause(job.id).status == "pausing"
    with pytest.raises(IllegalTransition):
        store.request_resume(job.id)
    store.transition(job.id, "pausing", "paused", token=job.lease_token)
    assert store.request_pause(job.id).status == "paused"
    assert store.request_resume(job.id).status == "queued"


def test_what_is_over_stays_over(store: JobStore) -> None:
    job = running(store)
    store.transition(job.id, "running", "succeeded", token=job.lease_token)
    for wish in (store.request_cancel, store.request_pause, store.request_resume):
        with pytest.raises(IllegalTransition, match="it is over"):
            wish(job.id)


def test_pause_of_a_job_in_validation_is_refused(store: JobStore) -> None:
    with pytest.raises(IllegalTransition):
        store.request_pause(store.create(new_job()).job.id)


@pytest.mark.parametrize(
    "broken",
    [
        "status = 'running'",
        "status = 'sleeping'",
        "status = 'failed', finished_at = 1",
        "status = 'cancelled'",
        "lease_token = 't'",
        "status = 'queued', lease_token = 't', lease_owner = 'o', lease_expires_at = 1",
        "kind = 'other'",
    ],
)
def test_the_table_refuses_what_must_not_be(store: JobStore, engine: Engine, broken: str) -> None:
    store.create(new_job())
    with pytest.raises(IntegrityError), write(engine) as session:
        session.execute(text(f"UPDATE jobs SET {broken}"))


def test_a_locked_database_is_busy_and_loses_nothing(store: JobStore, engine: Engine) -> None:
    job = store.create(new_job()).job
    with write(engine):
        with pytest.raises(DatabaseBusy, match="busy"):
            store.append_event(job.id, Event("no"))
        assert store.get(job.id).last_seq == 2  # reading goes on
    assert store.append_event(job.id, Event("yes")) == 3


def test_counts(store: JobStore) -> None:
    queued(store)
    store.create(new_job())
    assert store.counts() == {"queued": 1, "validating_files": 1}


def test_nobody_takes_its_own_lease_over_because_it_was_late(store: JobStore, clock: Clock) -> None:
    """It still looks after that job: a second look at it would start it twice."""
    job_id = store.create(new_job()).job.id
    token = store.claim("me", 30, status="validating_files").lease_token  # type: ignore[union-attr]
    clock.now += 31
    assert list(store.take_over("me", 30)) == []
    assert store.get(job_id).lease_token == token
    assert [job.id for job in store.take_over("other", 30)] == [job_id]
