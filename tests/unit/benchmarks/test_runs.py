"""The record of finished runs: what is in it comes back, and nothing else does."""

from __future__ import annotations

import json
import math
from pathlib import Path

from benchmarks.optimizers.runs import Record, Result, Run
from benchmarks.report import commit

RUN = Run("adamw", 1e-3 * 2**0.5, 1)
RESULT = Result(1.25, (2.5, 5.0), (2, 4), 1024, 3.5, {"step_ms": 1.5})


def test_a_result_comes_back_bit_for_bit(tmp_path: Path) -> None:
    record = Record(tmp_path / "deep" / "runs.jsonl", {"steps": 3})
    assert record.read() == {}
    record.add(RUN, RESULT)
    assert record.read() == {RUN: RESULT}
    assert record.commits == {commit(): 1}


def test_a_diverged_run_is_remembered_as_one(tmp_path: Path) -> None:
    record = Record(tmp_path / "runs.jsonl", {})
    record.add(RUN, Result(math.inf, (), (), 8, 1.0, {}))
    assert "Infinity" not in record.path.read_text() and record.read()[RUN].loss == math.inf


def test_runs_of_another_setting_do_not_count_and_stay(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    Record(path, {"steps": 3}).add(RUN, RESULT)
    other = Record(path, {"steps": 4})
    assert other.read() == {} and other.foreign == 1
    other.add(Run("muon", 0.02, 0), RESULT)
    assert list(Record(path, {"steps": 3}).read()) == [RUN]


def test_a_line_cut_short_by_a_kill_costs_that_run_alone(tmp_path: Path) -> None:
    record = Record(tmp_path / "runs.jsonl", {})
    record.add(RUN, RESULT)
    whole = record.path.read_text()
    record.path.write_text(whole + whole[:40])
    assert list(record.read()) == [RUN]
    second = Run("adamw", 1e-3, 2)
    record.add(second, RESULT)
    assert list(record.read()) == [RUN, second]


def test_runs_are_counted_by_the_commit_that_did_them(tmp_path: Path) -> None:
    record = Record(tmp_path / "runs.jsonl", {})
    record.add(RUN, RESULT)
    line = json.loads(record.path.read_text())
    older = [{**line, "seed": 2, "commit": "abc1234"}, {**line, "seed": 3, "commit": "abc1234"}, {**line, "seed": 4}]
    del older[2]["commit"]
    record.path.write_text("\n".join(json.dumps(each) for each in (line, *older)))
    assert len(record.read()) == 4
    assert record.commits == {line["commit"]: 1, "abc1234": 2, "unknown": 1}
    assert Record(record.path, {"steps": 3}).read() == {} and len(record.read()) == 4
    assert record.commits == {line["commit"]: 1, "abc1234": 2, "unknown": 1}
