"""One suite for every executor: what the scheduler relies on."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest

from service.executors.base import AlreadyRunning, Executor, Exited, Gone, Running, StaleAttempt
from service.executors.fake import Behaviour, FakeExecutor
from service.executors.local import LocalExecutor

PROGRAM = """
import os, resource, signal, sys, time
how, _, value = sys.argv[1].partition("=")
if how == "exit":
    print("the last words")
    sys.exit(int(value))
if how == "signal":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.kill(os.getpid(), int(value))
signal.signal(signal.SIGTERM, signal.SIG_IGN if how == "stubborn" else lambda *_: sys.exit(3))
open("ready", "w").close()
time.sleep(60)
"""


def behave(argv: list[str], directory: Path) -> Behaviour:
    how, _, value = argv[-1].partition("=")
    if how in ("exit", "signal"):
        return Behaviour(exits=int(value) if how == "exit" else -int(value))
    directory.mkdir(exist_ok=True)
    (directory / "ready").touch()
    return Behaviour(on_term=None if how == "stubborn" else 3)


@pytest.fixture(params=["local", "fake"])
def executor(request: pytest.FixtureRequest) -> Executor:
    return LocalExecutor() if request.param == "local" else FakeExecutor(behave)


@pytest.fixture
def start(executor: Executor, tmp_path: Path):
    """Start a run; end it after the test."""
    handles = []

    def start(how: str, attempt: int = 1):
        argv = [sys.executable, "-S", "-c", PROGRAM, how]
        handles.append(executor.submit("ftjob-contract", argv, {}, tmp_path, attempt=attempt, token="t"))
        return handles[-1]

    yield start
    for handle in handles:
        executor.kill(handle)


def until(condition, seconds: float = 10.0):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.005)
    return value


def end_of(executor: Executor, handle) -> Exited | Gone:
    return until(lambda: None if isinstance(status := executor.poll(handle), Running) else status)


@pytest.mark.parametrize(("how", "code", "number"), [("exit=0", 0, None), ("exit=7", 7, None), ("signal=11", None, 11)])
def test_reports_how_a_run_ended(executor: Executor, start, how: str, code: int | None, number: int | None) -> None:
    handle = start(how)
    ended = end_of(executor, handle)
    assert isinstance(ended, Exited)
    assert (ended.attempt, ended.code, ended.signal) == (1, code, number)
    assert executor.recover(handle.directory, handle.job_id) == ended


def test_term_stops_a_cooperative_run(executor: Executor, start, tmp_path: Path) -> None:
    handle = start("cooperative")
    until((tmp_path / "ready").exists)
    assert executor.poll(handle) == Running(handle)
    executor.terminate(handle)
    ended = end_of(executor, handle)
    assert isinstance(ended, Exited) and ended.code == 3


def test_stop_kills_what_ignores_term(executor: Executor, start, tmp_path: Path) -> None:
    handle = start("stubborn")
    until((tmp_path / "ready").exists)
    ended = executor.stop(handle, 0.05)
    assert isinstance(ended, Exited) and ended.signal == signal.SIGKILL
    assert executor.kill(handle) == 0


def test_recover_finds_a_live_run(executor: Executor, start, tmp_path: Path) -> None:
    handle = start("cooperative")
    assert executor.recover(tmp_path, handle.job_id) == Running(handle)


def test_recover_of_nothing_is_gone(executor: Executor, tmp_path: Path) -> None:
    assert executor.recover(tmp_path, "ftjob-contract") == Gone(None)


def test_one_run_at_a_time(executor: Executor, start) -> None:
    start("cooperative")
    with pytest.raises(AlreadyRunning):
        start("exit=0", attempt=2)


def test_attempts_must_grow(executor: Executor, start) -> None:
    end_of(executor, start("exit=0", attempt=2))
    for attempt in (1, 2):
        with pytest.raises(StaleAttempt):
            start("exit=0", attempt=attempt)
    assert isinstance(end_of(executor, start("exit=5", attempt=3)), Exited)


def test_signals_to_an_ended_run_reach_nobody(executor: Executor, start) -> None:
    handle = start("exit=0")
    ended = end_of(executor, handle)
    executor.terminate(handle)
    assert executor.kill(handle) == 0
    assert executor.poll(handle) == ended
