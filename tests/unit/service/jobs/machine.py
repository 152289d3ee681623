"""A machine that does everything to jobs in any order, and watches every single status change.

Two schedulers' lives never overlap here, as the folder's lock guarantees; a scheduler can die between any two actions.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlalchemy import text

from service.db.engine import connect, migrate
from service.jobs.states import STATES, TERMINAL, TRANSITIONS, IllegalTransition
from service.jobs.store import JobStore
from tests.unit.service.jobs.world import VERDICT, Clock, World

_TRIGGER = """
CREATE TRIGGER watch AFTER UPDATE OF status ON jobs WHEN OLD.status <> NEW.status
BEGIN INSERT INTO changes VALUES (NEW.id, OLD.status, NEW.status); END
"""
BAD = {"ok": False, "param": "training_file", "code": "missing_content", "problems": [], "problem_count": 1}


class JobMachine(RuleBasedStateMachine):
    """Submit, claim, finish, cancel, pause, resume, kill, vanish, restart."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="gradhelm-machine-"))
        self.jobs: list[str] = []
        self.over: dict[str, str] = {}

    @initialize(slots=st.integers(1, 3))
    def begin(self, slots: int) -> None:
        self.engine = connect(self.folder / "g.db")
        migrate(self.engine)
        with self.engine.connect() as connection, connection.begin():
            connection.execute(text("CREATE TABLE changes (id TEXT, old TEXT, new TEXT)"))
            connection.execute(text(_TRIGGER))
        self.clock = Clock()
        self.world = World(JobStore(self.engine, self.clock), self.clock, self.folder / "home", max_running=slots)

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            self._settle()
        finally:
            self.engine.dispose()
            shutil.rmtree(self.folder)

    def _settle(self) -> None:
        """Left alone, every job ends, unless it is paused."""
        self.world.verdict, self.world.validation_code, self.world.on_term = VERDICT, 0, 3
        for _ in range(6 * len(self.jobs) + 40):
            self.clock.now += 61
            self.world.tick()
            for handle in self.world.alive():
                if handle.directory.name == "validation":
                    self.world.executor.vanish(handle.directory)
                else:
                    self.world.finish(handle.job_id)
        assert {self.world.status(job_id) for job_id in self.jobs} <= TERMINAL | {"paused"}
        assert not self.world.alive()
        self._watch()

    @rule(valid=st.sampled_from([True, True, True, False]), hangs=st.sampled_from([False, False, False, True]))
    def submit(self, valid: bool, hangs: bool) -> None:
        self.world.verdict = VERDICT if valid else BAD
        self.world.validation_code = None if hangs else 0 if valid else 2
        self.jobs.append(self.world.submit())

    @rule(times=st.integers(1, 3), seconds=st.sampled_from([0.1, 0.1, 3.0, 12.0, 35.0, 3600.0, -3600.0]))
    def tick(self, times: int, seconds: float) -> None:
        self.clock.now += seconds
        self.world.tick(times)

    @rule()
    def restart(self) -> None:
        self.world.restart()

    @rule()
    def stop_with_the_runs(self) -> None:
        """As a container does; what is stubborn runs on, and is found by the next server."""
        self.world.scheduler.stop(end_runs=True, seconds=0.0)
        self.world.restart()

    @rule(stubborn=st.booleans())
    def be_stubborn(self, stubborn: bool) -> None:
        self.world.on_term = None if stubborn else 3

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), wish=st.sampled_from(["cancel", "pause", "resume"]))
    def wish(self, data: st.DataObject, wish: str) -> None:
        job_id = data.draw(st.sampled_from(self.jobs))
        before = self.world.status(job_id)
        try:
            getattr(self.world.store, f"request_{wish}")(job_id)
        except IllegalTransition:
            assert self.world.status(job_id) == before

    @precondition(lambda self: self._runs())
    @rule(data=st.data(), code=st.sampled_from([0, 0, 0, 1, 2, 3, -9, -11, None]))
    def end(self, data: st.DataObject, code: int | None) -> None:
        handle = data.draw(st.sampled_from(self._runs()))
        if data.draw(st.booleans()):
            step = self.world.job(handle.job_id).step + 1
            self.world.emit(handle.job_id, {"kind": "progress", "step": step})
        if code is None:
            self.world.executor.vanish(handle.directory)
        else:
            self.world.finish(handle.job_id, code)

    def _runs(self) -> list:
        return [handle for handle in self.world.alive() if handle.directory.name != "validation"]

    @invariant()
    def watch(self) -> None:
        if hasattr(self, "world"):
            self._watch()

    def _watch(self) -> None:
        with self.engine.connect() as connection:
            changes = connection.execute(text("SELECT id, old, new FROM changes")).all()
            rows = {row.id: row.status for row in connection.execute(text("SELECT id, status FROM jobs"))}
        for _, old, new in changes:
            assert new in TRANSITIONS[old], f"{old} -> {new}"
        assert rows.keys() == set(self.jobs) and set(rows.values()) <= STATES.keys()
        for job_id, status in self.over.items():
            assert rows[job_id] == status, "a terminal status changed"
        self.over = {job_id: status for job_id, status in rows.items() if status in TERMINAL}
        busy = {handle.job_id for handle in self.world.alive()}
        assert len(self.world.alive()) == len(busy), "two processes of one job"
        assert all(rows[job_id] in ("validating_files", "running", "pausing", "cancelling") for job_id in busy)
