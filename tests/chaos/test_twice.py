"""No job runs twice at once, even under two schedulers, one of which sleeps beyond its lease."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service.db.engine import connect, migrate
from service.jobs import processes
from service.jobs.store import JobStore
from tests.chaos.server import OVER, QUICK, ROOT, until
from tests.unit.service.jobs.world import new_job

pytestmark = pytest.mark.chaos


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "files").mkdir()
    return tmp_path


@pytest.fixture
def store(folder: Path) -> Iterator[JobStore]:
    engine = connect(folder / "gradhelm.db", busy_timeout_ms=20_000)
    migrate(engine)
    yield JobStore(engine)
    engine.dispose()


@pytest.fixture
def scheduler(folder: Path) -> Iterator[Callable[[str, str], subprocess.Popen[bytes]]]:
    running = []

    def start(name: str, how: str) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-m", "tests.chaos.two", str(folder), name, how, "200"]
        log = (folder / f"{name}.log").open("wb")
        with log:
            running.append(subprocess.Popen(argv, cwd=ROOT, stdout=log, stderr=log))
        until((folder / f"{name}.pid").exists, 60, name)
        return running[-1]

    yield start
    (folder / "stop").touch()
    for process in running:
        process.send_signal(signal.SIGCONT)
        process.wait(30)
    for job in (folder / "jobs").glob("*"):
        processes.kill_all(job.name)


def test_two_schedulers_share_a_thousand_jobs(store: JobStore, folder: Path, scheduler, figure) -> None:
    count = 100 if QUICK else 1000
    ids = [store.create(new_job(training_file="f")).job.id for _ in range(count)]
    for name in ("one", "two"):
        scheduler(name, "fake")
    until(lambda: store.counts().get("succeeded") == count, 240, "the end of all jobs")
    starts = Counter((folder / "starts").read_text().splitlines())
    assert starts == Counter(f"{kind} {job_id}" for job_id in ids for kind in ("validation", "run"))
    figure(f"two schedulers, {count} jobs: 0 doubles")


def put_to_sleep(pid: int, folder: Path) -> None:
    """Stop a process, but not inside a transaction: SQLite's lock would then stop everyone else as well."""
    while True:
        os.kill(pid, signal.SIGSTOP)
        with contextlib.closing(sqlite3.connect(folder / "gradhelm.db", timeout=1.0, isolation_level=None)) as db:
            with contextlib.suppress(sqlite3.OperationalError):
                db.execute("BEGIN IMMEDIATE")
                db.execute("ROLLBACK")
                return
        os.kill(pid, signal.SIGCONT)


def test_a_holder_that_sleeps_beyond_its_lease(store: JobStore, folder: Path, scheduler, figure) -> None:
    """SIGSTOP the holder, let the other take over, SIGCONT: the same run goes on, and ends once."""
    rounds = 1 if QUICK else 4
    (folder / "files" / "f").write_text(json.dumps({"steps": 160, "seconds": 0.05}))
    stale = 0
    first = scheduler("one", "real")
    other = None
    for _ in range(rounds):
        job_id = store.create(new_job(training_file="f")).job.id
        until(lambda job_id=job_id: store.get(job_id).step > 3, 30, "the run")
        before = store.get(job_id)
        holder = first if before.lease_owner == "one" else other
        assert holder is not None
        other = other or scheduler("two", "real")
        put_to_sleep(holder.pid, folder)
        until(lambda job_id=job_id, b=before: store.get(job_id).lease_owner != b.lease_owner, 20, "the take-over")
        os.kill(holder.pid, signal.SIGCONT)
        until(lambda job_id=job_id: store.get(job_id).status in OVER, 30, "the end")
        job = store.get(job_id)
        assert (job.status, job.attempt, job.step) == ("succeeded", 1, 160)
        assert len((folder / "jobs" / job_id / "starts").read_text().splitlines()) == 1
        said = [event.message for event in store.events(job_id, limit=1000).data]
        steps = [line for line in said if line.startswith("Step ")]
        assert len(steps) == len(set(steps)) == 160  # no line of its events was taken over twice
        stale += 1
    assert list(folder.glob("jobs/*/DOUBLE")) == []
    figure(f"{stale} holders slept beyond their lease: taken over each time, 0 doubles, 0 stale writes landed")
