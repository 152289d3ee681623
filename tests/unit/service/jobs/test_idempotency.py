"""A repeated POST makes one job: with a key, and as the SDK repeats it without one."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import Engine, event, insert

from service.db.tables import Idempotency
from service.jobs.idempotency import ABANDONED_SECONDS, KEEP_SECONDS, RETRY_SECONDS
from service.jobs.records import IdempotencyInFlight, IdempotencyMismatch
from service.jobs.store import JobStore
from tests.unit.service.jobs.world import Clock, new_job


def test_same_key_same_body_is_the_same_job(store: JobStore) -> None:
    first = store.create(new_job(), idempotency_key="k")
    again = store.create(new_job(), idempotency_key="k")
    assert (first.replayed, again.replayed, again.job.id) == (False, True, first.job.id)
    assert len(store.list().data) == 1


def test_same_key_other_body_is_refused(store: JobStore) -> None:
    store.create(new_job(), idempotency_key="k")
    with pytest.raises(IdempotencyMismatch, match="new key"):
        store.create(new_job(body_hash="c" * 64), idempotency_key="k")


def test_keys_of_two_callers_never_meet(store: JobStore) -> None:
    first = store.create(new_job(key_id="a"), idempotency_key="k")
    second = store.create(new_job(key_id="b"), idempotency_key="k")
    assert first.job.id != second.job.id


def test_a_key_is_kept_for_a_day(store: JobStore, clock: Clock) -> None:
    first = store.create(new_job(), idempotency_key="k")
    clock.now += KEEP_SECONDS - 1
    store.prune_idempotency()
    assert store.create(new_job(), idempotency_key="k").job.id == first.job.id
    clock.now += 2
    store.prune_idempotency()
    assert store.create(new_job(), idempotency_key="k").job.id != first.job.id


def test_in_flight_until_answered_or_released(store: JobStore) -> None:
    token = store.reserve("key_1", "k", "b" * 64)
    assert isinstance(token, str)
    with pytest.raises(IdempotencyInFlight):
        store.create(new_job(), idempotency_key="k")
    with pytest.raises(IdempotencyMismatch):
        store.reserve("key_1", "k", "c" * 64)
    store.release("key_1", "k", "not-the-token")
    with pytest.raises(IdempotencyInFlight):
        store.reserve("key_1", "k", "b" * 64)
    store.release("key_1", "k", token)
    token = store.reserve("key_1", "k", "c" * 64)
    assert isinstance(token, str)
    job = store.create(new_job(body_hash="c" * 64), idempotency_key="k", reservation=token).job
    again = store.reserve("key_1", "k", "c" * 64)
    assert not isinstance(again, str) and again.id == job.id
    store.release("key_1", "k", token)  # too late: the answer stays
    assert store.create(new_job(body_hash="c" * 64), idempotency_key="k").replayed


def test_a_reservation_of_a_request_that_died_can_be_taken(store: JobStore, clock: Clock) -> None:
    dead = store.reserve("key_1", "k", "b" * 64)
    assert isinstance(dead, str)
    clock.now += ABANDONED_SECONDS + 1
    first = store.create(new_job(), idempotency_key="k")
    assert not first.replayed
    late = store.create(new_job(), idempotency_key="k", reservation=dead)
    assert late.job.id == first.job.id


@pytest.mark.parametrize("key", ["", "x" * 256])
def test_keys_have_a_length(store: JobStore, key: str) -> None:
    with pytest.raises(ValueError, match="1 to 255"):
        store.create(new_job(), idempotency_key=key)


def test_the_sdk_retry_finds_the_job_of_its_first_post(store: JobStore, clock: Clock) -> None:
    first = store.create(new_job())
    assert store.create(new_job(), retry_count=1).job.id == first.job.id
    assert store.create(new_job(), retry_count=2).replayed
    assert not store.create(new_job(key_id="other"), retry_count=1).replayed
    assert not store.create(new_job(body_hash="c" * 64), retry_count=1).replayed
    clock.now += RETRY_SECONDS + 1
    assert not store.create(new_job(), retry_count=1).replayed


def test_two_deliberate_posts_are_two_jobs_and_a_retry_means_the_newer(store: JobStore) -> None:
    first, second = store.create(new_job()), store.create(new_job())
    assert first.job.id != second.job.id
    assert store.create(new_job(), retry_count=1).job.id == second.job.id


def test_a_retry_is_not_answered_with_a_job_that_came_to_nothing(store: JobStore) -> None:
    first, second = store.create(new_job()), store.create(new_job())
    store.request_cancel(second.job.id)
    assert store.get(second.job.id).status == "cancelled"
    assert store.create(new_job(), retry_count=1).job.id == first.job.id
    store.request_cancel(first.job.id)
    assert not store.create(new_job(), retry_count=1).replayed


def test_a_retry_without_a_key_never_means_a_job_made_under_one(store: JobStore) -> None:
    keyed = store.create(new_job(), idempotency_key="k")
    plain = store.create(new_job(), retry_count=1)
    assert not plain.replayed and plain.job.id != keyed.job.id
    store.create(new_job(), idempotency_key="later")
    assert store.create(new_job(), retry_count=2).job.id == plain.job.id


def test_an_explicit_key_wins_over_the_retry_count(store: JobStore) -> None:
    first = store.create(new_job())
    assert store.create(new_job(), idempotency_key="k", retry_count=1).job.id != first.job.id


@pytest.mark.parametrize("rival_hash", ["b" * 64, "c" * 64])
def test_a_rival_that_inserts_between_our_look_and_our_insert_is_seen(
    store: JobStore, engine: Engine, rival_hash: str
) -> None:
    rivals: list[str] = []

    @event.listens_for(engine, "before_cursor_execute")
    def rival(connection, _cursor, statement, *_rest) -> None:
        if statement.startswith("INSERT INTO idempotency") and not rivals:
            rivals.append(rival_hash)
            row = {"key_id": "key_1", "key": "k", "body_hash": rival_hash, "token": "rival", "job_id": None}
            connection.execute(insert(Idempotency).values(**row, created_at=store.clock()))

    refusal = IdempotencyInFlight if rival_hash == "b" * 64 else IdempotencyMismatch
    with pytest.raises(refusal):
        store.reserve("key_1", "k", "b" * 64)
    assert rivals == [rival_hash]


def test_fifty_at_once_make_one_job(store: JobStore) -> None:
    ids: list[str] = []
    barrier = threading.Barrier(50)

    def post() -> None:
        barrier.wait()
        for _ in range(100):
            try:
                ids.append(store.create(new_job(), idempotency_key="k").job.id)
                return
            except RuntimeError:  # busy
                continue

    threads = [threading.Thread(target=post) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 50 and len(set(ids)) == 1
    assert len(store.list().data) == 1


def test_a_first_post_that_its_own_retry_overtook_is_answered_with_the_retrys_job(
    store: JobStore, clock: Clock
) -> None:
    arrived = clock()
    clock.now += 0.4
    retry = store.create(new_job(), retry_count=1, arrived=clock())
    assert not retry.replayed
    clock.now += 5
    late = store.create(new_job(), arrived=arrived)
    assert late.replayed and late.job.id == retry.job.id
    store.request_cancel(retry.job.id)
    assert store.create(new_job(), arrived=arrived).job.id == retry.job.id, "its client has given up on it all the same"
    assert not store.create(new_job(key_id="other"), arrived=arrived).replayed
    assert not store.create(new_job(body_hash="c" * 64), arrived=arrived).replayed


def test_a_post_that_came_after_a_retry_made_its_job_makes_another(store: JobStore, clock: Clock) -> None:
    clock.now += 0.2
    retry = store.create(new_job(), retry_count=1)
    clock.now += 0.2
    assert store.create(new_job(), arrived=clock()).job.id != retry.job.id


def test_slow_deliberate_posts_and_a_keyed_retry_stay_jobs_of_their_own(store: JobStore, clock: Clock) -> None:
    arrived = clock()
    clock.now += 1
    first = store.create(new_job(), arrived=arrived)
    store.create(new_job(), idempotency_key="k", retry_count=1, arrived=clock())
    second = store.create(new_job(), arrived=arrived)
    assert not second.replayed and second.job.id != first.job.id


def test_a_key_whose_request_died_is_free_for_another_body(store: JobStore, clock: Clock) -> None:
    dead = store.reserve("key_1", "k", "b" * 64)
    clock.now += ABANDONED_SECONDS + 1
    made = store.create(new_job(body_hash="c" * 64), idempotency_key="k")
    assert not made.replayed
    assert store.reserve("key_1", "k", "c" * 64) != dead
    with pytest.raises(IdempotencyMismatch):
        store.create(new_job(), idempotency_key="k", reservation=str(dead))


def test_what_the_last_check_refuses_is_not_written(store: JobStore) -> None:
    def gone(_session: object) -> None:
        raise FileNotFoundError

    with pytest.raises(FileNotFoundError):
        store.create(new_job(), confirm=gone)
    assert store.list().data == []
    first = store.create(new_job())
    assert store.create(new_job(), retry_count=1, confirm=gone).job.id == first.job.id, "what is there needs no check"
