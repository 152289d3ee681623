"""The supervisor's own decisions, in this process: what it starts beside, and what it writes when the disk is full."""

from __future__ import annotations

import argparse
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.jobs import processes, supervisor
from service.jobs.supervisor import EXIT, RECORD, REFUSED


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A command line; the test's own folder and signals come back afterwards."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    yield [str(tmp_path), "--job-id", "ftjob-super", "--attempt", "2", "--", "/bin/true"]
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_what_an_earlier_one_left_is_ended_before_the_start(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / EXIT).write_text("{}")
    done: list[str] = []
    monkeypatch.setattr(processes, "kill_all", lambda job_id, *_: done.append(f"ended {job_id}") or set())
    monkeypatch.setattr(supervisor._Supervisor, "__init__", lambda *_: None)
    monkeypatch.setattr(supervisor._Supervisor, "run", lambda _: done.append("started") or 0)
    assert supervisor.main(arguments) == 0
    assert done == ["ended ftjob-super", "started"]
    assert not (tmp_path / EXIT).exists()


def test_beside_survivors_nothing_is_started(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / EXIT).write_text("{}")
    said: list[str] = []
    monkeypatch.setattr(processes, "kill_all", lambda *_: {4242})
    monkeypatch.setattr(supervisor, "_answer", lambda word, code=0: said.append(word) or code)
    monkeypatch.setattr(supervisor._Supervisor, "__init__", None)  # would be called
    assert supervisor.main(arguments) == REFUSED
    assert said == ["busy"] and (tmp_path / EXIT).exists() and not (tmp_path / RECORD).exists()


def nobody(tmp_path: Path) -> supervisor._Supervisor:
    """One without a run."""
    one = object.__new__(supervisor._Supervisor)
    one.directory, one.options = tmp_path, argparse.Namespace(job_id="ftjob-super")
    return one


def test_a_full_disk_is_waited_out_and_the_pipe_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, drained = nobody(tmp_path), []
    write, tries = supervisor.write_json, []

    def full(path: Path, value: dict[str, object]) -> None:
        tries.append(path.name)
        if len(tries) < 3:
            raise OSError(28, "No space left on device")
        write(path, value)

    monkeypatch.setattr(supervisor, "write_json", full)
    monkeypatch.setattr(supervisor.time, "sleep", lambda _: None)
    monkeypatch.setattr(one, "_drain", lambda: drained.append(1))
    one._persist(EXIT, {"code": 0})
    assert json.loads((tmp_path / EXIT).read_text()) == {"code": 0}
    assert len(tries) == 3 and len(drained) == 2


def test_a_disk_that_stays_full_ends_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(supervisor, "write_json", full)
    monkeypatch.setattr(supervisor, "_EXIT_RETRY_SECONDS", -1.0)
    with pytest.raises(OSError, match="No space"):
        nobody(tmp_path)._persist(EXIT, {})


def test_the_end_is_told_when_no_process_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = nobody(tmp_path)
    left, said = [{4242}, {4242}, set()], []
    one.run_end, one.status = os.open(os.devnull, os.O_RDONLY), 0
    for name in ("_start", "_record", "_pump", "_drain"):
        monkeypatch.setattr(one, name, lambda: None)
    monkeypatch.setattr(supervisor, "_answer", lambda *_: 0)
    monkeypatch.setattr(processes, "kill_all", lambda *_: left.pop(0))
    monkeypatch.setattr(one, "_finish", lambda **_: said.append(len(left)) or 0)
    assert one.run() == 0
    assert said == [0]
