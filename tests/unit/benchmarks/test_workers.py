"""A study in processes: what is finished is kept, what failed is left out, and no time is no run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.optimizers.plan import Plan, Subject
from benchmarks.optimizers.runs import Record
from benchmarks.optimizers.workers import study

PLAN = Plan([Subject("good", 1.0, claimed=True), Subject("bad", 1.0)], count=3, factor=2.0, seeds=(1,))
WORKER = """
import json, os, sys
run = json.loads(sys.argv[sys.argv.index("--one") + 1])
assert run["arm"] != "bad", "this arm is broken"
print("whatever a library says")
print(json.dumps({"loss": abs(run["rate"] - 1), "units": [1.0], "tokens": [1], "state_bytes": 8, "seconds": 0.1,
    "more": {"cores": len(os.sched_getaffinity(0)), "threads": os.environ["OMP_NUM_THREADS"], "given": sys.argv[1]}}))
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "made_up_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "made_up_worker"


def test_a_study_runs_to_its_end_and_leaves_out_what_fails(
    tmp_path: Path, script: str, capfd: pytest.CaptureFixture[str]
) -> None:
    record = Record(tmp_path / "runs.jsonl", {})
    workers = min(2, len(os.sched_getaffinity(0)))
    done, failed = study(PLAN, record, script, ["--steps=3"], workers=workers, hours=1)
    assert {(run.arm, run.rate, run.seed) for run in done} == {
        ("good", 0.5, 0),
        ("good", 1.0, 0),
        ("good", 2.0, 0),
        ("good", 1.0, 1),
    }
    assert {run.arm for run in failed} == {"bad"} and len(failed) <= workers
    assert "this arm is broken" in capfd.readouterr().out
    assert record.read() == done
    assert all(dict(r.more) == {"cores": 1, "threads": "1", "given": "--steps=3"} for r in done.values())


def test_what_is_finished_is_not_run_again_and_no_time_is_no_run(tmp_path: Path, script: str) -> None:
    record = Record(tmp_path / "runs.jsonl", {})
    assert study(PLAN, record, script, ["x"], workers=1, hours=0) == ({}, set())
    first, _ = study(PLAN, record, script, ["first"], workers=1, hours=1)
    again, _ = study(PLAN, record, script, ["second"], workers=1, hours=1)
    assert again == first and {result.more["given"] for result in again.values()} == {"first"}
