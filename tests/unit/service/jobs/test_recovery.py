"""What an end means, as a table."""

from __future__ import annotations

import random

import pytest

from service.db.tables import Job
from service.executors.base import Exited, Gone
from service.jobs.recovery import RetryPolicy, decide, describe, retryable
from service.jobs.states import ACTIVE, TRANSITIONS

POLICY = RetryPolicy()


def exited(code: int, lines: tuple[str, ...] = ()) -> Exited:
    return Exited(1, code if code >= 0 else None, -code if code < 0 else None, 0.0, lines)


def job(status: str = "running", **changes: object) -> Job:
    values = {"id": "ftjob-1", "status": status, "step": 5, "retries": 0, "restarts_without_progress": 0,
              "last_progress_step": 0}  # fmt: skip
    return Job(**(values | changes))


def outcome(row: Job, status: Exited | Gone, error: dict[str, object] | None = None) -> str:
    return decide(row, status, error, now=100.0, policy=POLICY, draw=random.Random(0)).target


RETRY = {"code": "io_error", "message": "m", "retryable": True}
NO_RETRY = {"code": "internal_error", "message": "m", "retryable": False}


@pytest.mark.parametrize(
    ("status", "end", "error", "target"),
    [
        ("running", exited(0), None, "succeeded"),
        ("running", exited(2), NO_RETRY, "failed"),
        ("running", exited(2), RETRY, "failed"),
        ("running", exited(3), None, "queued"),
        ("running", exited(1), NO_RETRY, "failed"),
        ("running", exited(1), RETRY, "queued"),
        ("running", exited(1), None, "failed"),
        ("running", exited(1, ("Traceback", "MemoryError")), None, "queued"),
        ("running", exited(1, ("ValueError: MemoryError is not it", "a", "b", "c")), None, "failed"),
        ("running", exited(-15), None, "queued"),
        ("pausing", exited(-15), None, "paused"),
        ("running", exited(-9), None, "queued"),
        ("running", exited(-9), NO_RETRY, "queued"),
        ("running", exited(-11), None, "failed"),
        ("running", exited(-11, ("MemoryError",)), None, "failed"),
        ("running", exited(-6), None, "failed"),
        ("running", Gone(1), None, "queued"),
        ("pausing", exited(0), None, "succeeded"),
        ("pausing", exited(3), None, "paused"),
        ("pausing", exited(2), NO_RETRY, "failed"),
        ("pausing", exited(-9), None, "paused"),
        ("pausing", exited(-11), None, "failed"),
        ("pausing", exited(1), RETRY, "paused"),
        ("pausing", Gone(1), None, "paused"),
        ("cancelling", exited(0), None, "cancelled"),
        ("cancelling", exited(2), NO_RETRY, "cancelled"),
        ("cancelling", exited(-9), None, "cancelled"),
        ("cancelling", Gone(None), None, "cancelled"),
    ],
)
def test_table(status: str, end: Exited | Gone, error: dict[str, object] | None, target: str) -> None:
    assert outcome(job(status), end, error) == target


@pytest.mark.parametrize("status", sorted(ACTIVE))
@pytest.mark.parametrize("end", [Gone(None), *(exited(code) for code in (0, 1, 2, 3, 7, 137, -2, -9, -11, -15, -64))])
def test_every_ending_is_a_legal_transition(status: str, end: Exited | Gone) -> None:
    for retries in (0, 3):
        ending = decide(
            job(status, retries=retries, restarts_without_progress=retries, step=0),
            end, None, now=0.0, policy=POLICY, draw=random.Random(0),
        )  # fmt: skip
        assert ending.target in TRANSITIONS[status]
        if ending.target == "failed":
            assert ending.values["error_code"] and ending.values["error_message"]


def test_limits_end_in_failure() -> None:
    assert outcome(job(retries=2), exited(-9)) == "queued"
    assert outcome(job(retries=3), exited(-9)) == "failed"
    assert outcome(job(restarts_without_progress=2, last_progress_step=5), Gone(1)) == "queued"
    assert outcome(job(restarts_without_progress=3, last_progress_step=5), Gone(1)) == "failed"
    assert outcome(job(restarts_without_progress=3, last_progress_step=4), Gone(1)) == "queued"
    assert outcome(job(restarts_without_progress=3, last_progress_step=5), exited(3)) == "failed"
    assert outcome(job(restarts_without_progress=3, last_progress_step=5), exited(-15)) == "failed"


def test_delays_grow_are_capped_and_jittered() -> None:
    draw = random.Random(3)
    for attempt, middle in ((1, 2), (2, 4), (3, 8), (6, 60), (60, 60)):
        delays = [POLICY.delay(attempt, draw) for _ in range(200)]
        assert 0.75 * middle <= min(delays) < 0.8 * middle
        assert 1.2 * middle < max(delays) <= 1.25 * middle


def test_ends_are_described() -> None:
    assert describe(exited(7)) == "the run ended with code 7"
    assert describe(exited(-11)) == "the run was ended by signal 11 (SIGSEGV)"
    assert "memory runs out" in describe(exited(-9))
    assert "(unknown)" in describe(exited(-99))
    assert not retryable(exited(7), None)


def test_a_crash_names_its_error_its_end_and_its_last_lines() -> None:
    ending = decide(job(), exited(1, ("one", "two")), NO_RETRY, now=0.0, policy=POLICY, draw=random.Random(0))
    assert ending.values["error_message"] == "m (the run ended with code 1); the last lines of its log:\none\ntwo"
    silent = decide(job(), exited(-11), None, now=0.0, policy=POLICY, draw=random.Random(0))
    assert silent.values["error_message"].endswith("(SIGSEGV); it printed nothing")
