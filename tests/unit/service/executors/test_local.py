"""The local executor against real processes: identity, descendants, output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from service.executors.base import Exited, Gone, Running
from service.executors.local import LocalExecutor
from service.jobs import logs, processes
from service.jobs.supervisor import EXIT, RECORD, read_json, write_json

SLEEP = [sys.executable, "-S", "-c", "import time; print('up', flush=True); time.sleep(60)"]


@pytest.fixture
def executor() -> LocalExecutor:
    return LocalExecutor(threads=1, wait_seconds=2.0)


def finish(executor: LocalExecutor, handle) -> Exited | Gone:
    deadline = time.monotonic() + 20
    while isinstance(status := executor.poll(handle), Running):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return status


def run(executor: LocalExecutor, directory: Path, code: str, **kwargs) -> Exited:
    handle = executor.submit("ftjob-local", [sys.executable, "-S", "-c", code], {}, directory, attempt=1, token="t")
    status = finish(executor, handle)
    assert isinstance(status, Exited)
    return status


def test_environment_is_fixed_and_recorded(executor: LocalExecutor, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("GRADHELM_DATABASE_URL", "postgresql://secret")
    run(executor, tmp_path, "import os, json; print(json.dumps(dict(os.environ)))")
    environment = json.loads(logs.read(tmp_path).data)
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["GRADHELM_JOB_ID"] == "ftjob-local"
    assert "GRADHELM_DATABASE_URL" not in environment
    record = read_json(tmp_path / RECORD)
    assert record is not None
    assert record["environment"] == {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": 1}


def test_a_program_that_does_not_exist_is_an_exit(executor: LocalExecutor, tmp_path: Path) -> None:
    handle = executor.submit("ftjob-local", ["/nowhere/program"], {}, tmp_path, attempt=1, token="t")
    status = finish(executor, handle)
    assert isinstance(status, Exited) and status.code == 127
    assert "could not be started" in status.last_lines[-1]


def test_no_zombie_is_left(executor: LocalExecutor, tmp_path: Path) -> None:
    handle = executor.submit("ftjob-local", [sys.executable, "-S", "-c", ""], {}, tmp_path, attempt=1, token="t")
    finish(executor, handle)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{handle.pid}").exists():
        executor.tidy()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_supervisor_is_in_a_session_of_its_own(executor: LocalExecutor, tmp_path: Path) -> None:
    handle = executor.submit("ftjob-local", SLEEP, {}, tmp_path, attempt=1, token="t")
    record = read_json(tmp_path / RECORD)
    assert record is not None
    try:
        assert os.getsid(handle.pid) == handle.pid != os.getsid(0)
        assert os.getpgid(record["run_pid"]) == record["run_pid"]
    finally:
        assert executor.kill(handle) == 0


def forge(tmp_path: Path, **changes: object) -> dict[str, object]:
    me = os.getpid()
    record = {
        "job_id": "ftjob-local", "attempt": 1, "token": "t", "pid": me, "started": processes.start_time(me),
        "boot_id": processes.boot_id(), "run_pid": me, "run_started": processes.start_time(me),
    } | changes  # fmt: skip
    write_json(tmp_path / RECORD, record)
    return record


@pytest.mark.parametrize("field", ["started", "boot_id"])
def test_a_reused_pid_or_an_old_boot_is_never_adopted_nor_signalled(
    executor: LocalExecutor, tmp_path: Path, field: str
) -> None:
    """The forged record names a live foreign process; a signal would end it."""
    foreign = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    try:
        started = processes.start_time(foreign.pid)
        assert started is not None
        forge(tmp_path, pid=foreign.pid, started=started, run_pid=foreign.pid)
        adopted = executor.recover(tmp_path, "ftjob-local")
        assert isinstance(adopted, Running)  # the identity fits: this is what would be adopted
        forge(tmp_path, pid=foreign.pid, started=started, run_pid=foreign.pid)
        wrong = {"started": started - 1, "boot_id": "another-boot"}[field]
        forge(tmp_path, **{"pid": foreign.pid, "started": started, "run_pid": foreign.pid, field: wrong})
        assert executor.recover(tmp_path, "ftjob-local") == Gone(1)
        handle = adopted.handle.__class__(**{**vars_of(adopted.handle), field: wrong})
        assert executor.poll(handle) == Gone(1)
        executor.terminate(handle)
        assert executor.kill(handle) == 0
        time.sleep(0.05)
        assert foreign.poll() is None
    finally:
        foreign.kill()
        foreign.wait()


def vars_of(handle) -> dict[str, object]:
    return {name: getattr(handle, name) for name in handle.__dataclass_fields__}


def test_what_a_dead_supervisor_left_is_ended(executor: LocalExecutor, tmp_path: Path) -> None:
    handle = executor.submit("ftjob-local", SLEEP, {}, tmp_path, attempt=1, token="t")
    record = read_json(tmp_path / RECORD)
    assert record is not None
    os.kill(handle.pid, signal.SIGKILL)
    assert finish(executor, handle) == Gone(1)
    assert executor.recover(tmp_path, "ftjob-local") == Gone(1)
    assert processes.start_time(record["run_pid"]) != record["run_started"]
    assert processes.marked("ftjob-local") == set()


def test_an_exit_of_an_older_attempt_does_not_count(executor: LocalExecutor, tmp_path: Path) -> None:
    run(executor, tmp_path, "")
    end = read_json(tmp_path / EXIT)
    assert end is not None
    forge(tmp_path, attempt=2, started=1)
    assert executor.recover(tmp_path, "ftjob-local") == Gone(2)


def test_last_lines_are_the_last_hundred(executor: LocalExecutor, tmp_path: Path) -> None:
    status = run(executor, tmp_path, "for i in range(250): print('line', i)")
    assert status.last_lines == tuple(f"line {i}" for i in range(150, 250))


def test_a_chatty_run_is_capped_and_never_blocked(tmp_path: Path) -> None:
    executor = LocalExecutor(log_quota=256 * 1024)
    status = run(executor, tmp_path, "for i in range(60000): print(f'line {i:06d} ' + 'x' * 60)")
    assert status.code == 0
    assert status.last_lines[-1].startswith("line 059999")
    first, end = logs.span(tmp_path)
    assert end == 60000 * 73
    assert 0 < end - first <= 256 * 1024
    assert sum(path.stat().st_size for _, path in logs.segments(tmp_path)) == end - first
    piece = logs.read(tmp_path, end - 73, 1000)
    assert piece.data.startswith(b"line 059999")


@pytest.mark.parametrize("cooperative", [True, False])
def test_every_descendant_is_ended(executor: LocalExecutor, tmp_path: Path, cooperative: bool) -> None:
    """A child of its own session, one deaf to SIGTERM, one without environment, one holding the log's pipe."""
    code = f"""
import signal, subprocess, sys, time
deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
pids = [subprocess.Popen([sys.executable, "-S", "-c", deaf], **k).pid for k in (
    {{}}, {{"start_new_session": True}}, {{"start_new_session": True, "env": {{}}}},
    {{"start_new_session": True, "stdout": sys.stdout, "stderr": sys.stderr}})]
signal.signal(signal.SIGTERM, (lambda *_: sys.exit(3)) if {cooperative} else signal.SIG_IGN)
open("pids", "w").write(" ".join(map(str, pids)))
time.sleep(60)
"""
    handle = executor.submit("ftjob-tree", [sys.executable, "-S", "-c", code], {}, tmp_path, attempt=1, token="t")
    pids: list[int] = []
    deadline = time.monotonic() + 20
    while len(pids) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
        pids = [int(word) for word in (tmp_path / "pids").read_text().split()] if (tmp_path / "pids").exists() else []
    before = [processes.start_time(pid) for pid in pids]
    assert None not in before
    status = executor.stop(handle, 0.1 if not cooperative else 10.0)
    assert isinstance(status, Exited)
    assert (status.code, status.signal) == ((3, None) if cooperative else (None, signal.SIGKILL))
    assert [processes.start_time(pid) for pid in pids] == [None] * 4


def test_survivors_are_no_end(executor: LocalExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What hangs in the kernel can be killed by nobody: the caller tries again, and starts nothing beside it."""
    forge(tmp_path, started=1)
    monkeypatch.setattr(processes, "kill_all", lambda *_args, **_more: {4242})
    with pytest.raises(BlockingIOError, match="still alive"):
        executor.recover(tmp_path, "ftjob-local")
    monkeypatch.undo()
    assert executor.recover(tmp_path, "ftjob-local") == Gone(1)


def test_one_that_is_ending_is_alive_although_its_environment_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"]) as child:
        found = iter([{child.pid}])
        monkeypatch.setattr(processes, "marked", lambda _job_id: next(found, set()))
        monkeypatch.setattr(processes.os, "kill", lambda *_: None)
        assert processes.kill_all("ftjob-x", seconds=0.05) == {child.pid}
        monkeypatch.undo()
        child.kill()


def test_a_supervisor_that_does_not_answer_is_killed(
    executor: LocalExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it could start its run later, beside the one of the next try."""
    pids: list[int] = []
    spawn = os.posix_spawn

    def deaf(_path: str, _argv: list[str], environment: dict[str, str], **more: object) -> int:
        code = "import time; time.sleep(60)"
        pids.append(spawn(sys.executable, [sys.executable, "-S", "-c", code], environment, **more))
        return pids[0]

    monkeypatch.setattr(os, "posix_spawn", deaf)
    monkeypatch.setattr(executor, "_start_seconds", 0.2)
    began = time.monotonic()
    with pytest.raises(OSError, match="did not start"):
        executor.submit("ftjob-local", SLEEP, {}, tmp_path, attempt=1, token="t")
    assert time.monotonic() - began < 30 and processes.start_time(pids[0]) is None


def test_a_run_that_is_ending_is_waited_for_by_what_the_supervisor_wrote(
    executor: LocalExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its environment is gone, and its parent: the record alone still names it."""
    with subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"]) as child:
        started = processes.start_time(child.pid)
        forge(tmp_path, started=1, run_pid=child.pid, run_started=started)
        with monkeypatch.context() as patch:
            patch.setattr(processes.os, "kill", lambda *_: None)
            with pytest.raises(BlockingIOError, match="still alive"):
                executor.recover(tmp_path, "ftjob-local")
        forge(tmp_path, started=1, run_pid=child.pid, run_started=1)
        assert executor.recover(tmp_path, "ftjob-local") == Gone(1)  # that number is somebody else's by now
        assert processes.start_time(child.pid) == started
        forge(tmp_path, started=1, run_pid=child.pid, run_started=started)
        assert executor.recover(tmp_path, "ftjob-local") == Gone(1)
        assert child.wait(5) == -signal.SIGKILL
