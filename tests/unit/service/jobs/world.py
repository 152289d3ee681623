"""A clock that only the test moves, jobs to put in, and a scheduler on fake runs."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from service.db.tables import Job
from service.executors.base import Handle, Running
from service.executors.fake import Behaviour, FakeExecutor
from service.jobs import names
from service.jobs.records import NewJob
from service.jobs.scheduler import Options, Scheduler
from service.jobs.store import JobStore


class Clock:
    """Seconds since the epoch, as the test says."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def new_job(**changes: Any) -> NewJob:
    values: dict[str, Any] = {
        "kind": "fine_tuning",
        "model": "tiny-llama",
        "method": "lora",
        "request": {"model": "tiny-llama"},
        "resolved": {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"},
        "seed": 7,
        "training_file": "file-a",
        "key_id": "key_1",
        "body_hash": "b" * 64,
    }
    return NewJob(**(values | changes))


VERDICT = {"ok": True, "rows": 100, "problems": [], "problem_count": 0, "warnings": [], "warning_count": 0}


class World:
    """A scheduler on fake runs, ticked by the test. Validations pass at once unless ``verdict`` says otherwise."""

    def __init__(self, store: JobStore, clock: Clock, home: Path, **options: Any) -> None:
        self.store, self.clock, self.home = store, clock, home
        self.set_back = 0.0  # seconds by which the clock was set back; time itself went on
        self.options = Options(**options)
        self.verdict: dict[str, Any] | None = VERDICT
        self.validation_code: int | None = 0
        self.on_term: int | None = 3
        self.executor = FakeExecutor(self._behave)
        self.scheduler = self.new_scheduler()
        self.scheduler.open()

    def new_scheduler(self, owner: str = "me") -> Scheduler:
        scheduler = Scheduler(self.store, self.executor, self.home, self.options, owner=owner, draw=random.Random(1))
        scheduler.elapsed = lambda: self.clock() + self.set_back
        return scheduler

    def set_clock_back(self, seconds: float) -> None:
        self.clock.now -= seconds
        self.set_back += seconds

    def _behave(self, argv: Sequence[str], directory: Path) -> Behaviour:
        if directory.name != "validation":
            return Behaviour(on_term=self.on_term)
        if self.verdict is not None:
            (directory / "validation.json").write_text(json.dumps(self.verdict))
        return Behaviour(exits=self.validation_code, on_term=self.on_term)

    def submit(self, **changes: Any) -> str:
        return self.store.create(new_job(**changes)).job.id

    def tick(self, times: int = 1) -> None:
        for _ in range(times):
            self.scheduler.tick()

    def restart(self, owner: str = "me") -> None:
        """Lose the scheduler without a word, and start the next one."""
        self.scheduler = self.new_scheduler(owner)
        self.scheduler._adopting = True  # what the folder's lock proves for a real server
        self.scheduler._safely(self.scheduler._take_over)

    def job(self, job_id: str) -> Job:
        return self.store.get(job_id)

    def status(self, job_id: str) -> str:
        return self.job(job_id).status

    def folder(self, job_id: str) -> Path:
        return names.job_directory(self.home, job_id)

    def emit(self, job_id: str, *events: dict[str, Any]) -> None:
        with (self.folder(job_id) / "events.jsonl").open("a") as file:
            for event in events:
                file.write(json.dumps({"seq": 1, "time": self.clock(), **event}) + "\n")

    def finish(self, job_id: str, code: int = 0, lines: Sequence[str] = ()) -> None:
        if code == 0:
            (self.folder(job_id) / "artifact").mkdir(exist_ok=True)
            (self.folder(job_id) / "artifact" / "manifest.json").write_text('{"kind": "adapter"}')
        self.executor.finish(self.folder(job_id), code, lines)

    def running(self, **changes: Any) -> str:
        """A job that runs."""
        job_id = self.submit(**changes)
        self.tick(3)
        assert self.status(job_id) == "running"
        assert isinstance(self.executor.recover(self.folder(job_id), job_id), Running)
        return job_id

    def messages(self, job_id: str) -> list[str]:
        return [event.message for event in self.store.events(job_id, limit=1000).data]

    def alive(self) -> list[Handle]:
        return self.executor.alive()
