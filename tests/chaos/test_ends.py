"""Deaths are noticed and explained, foreign processes are left alone, cancel ends everything."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from service.jobs import processes
from service.jobs.supervisor import RECORD, read_json, write_json
from tests.chaos.server import QUICK, Server, until

pytestmark = pytest.mark.chaos


def zombies() -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            fields = processes._stat(int(name))
            if fields is not None and fields[0] == "Z":
                found.append(int(fields[1]))
    return found


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        ("signal:11", "run_killed", "signal 11 (SIGSEGV)"),
        ("exit:7", "run_crashed", "code 7"),
        ("value_error", "invalid_value", "a bad value"),
    ],
)
def test_a_death_is_noticed_and_explained(shared: Server, figure, end: str, code: str, words: str) -> None:
    job_id = shared.submit(steps=2, end=end)
    job = shared.wait(job_id)
    exit_record = read_json(shared.folder(job_id) / "exit.json")
    assert exit_record is not None
    assert job["status"] == "failed" and job["error"]["code"] == code and words in job["error"]["message"]
    if end != "value_error":
        assert "attempt 1 begins after step 0" in job["error"]["message"]
    assert len(shared.starts(job_id)) == 1  # what cannot succeed is not tried again
    delay = time.time() - exit_record["finished_at"]
    figure(f"{end}: terminal {delay:.2f} s after the end (target 2 s, polling and HTTP included)")
    assert delay <= 2.0
    assert shared.process is not None
    until(lambda: shared.process.pid not in zombies(), 2, "the collection of the supervisor")


def test_killed_and_out_of_memory_are_retried_and_a_poison_job_ends(shared: Server, figure) -> None:
    once = shared.submit(end="signal:9", fail_attempts=1)
    memory = shared.submit(end="memory", fail_attempts=1)
    poison = shared.submit(end="signal:9") if not QUICK else None
    for job_id in (once, memory):
        assert shared.wait(job_id, seconds=60)["status"] == "succeeded"
        assert len(shared.starts(job_id)) == 2
    if poison is not None:
        job = shared.wait(poison, seconds=60)
        assert (job["status"], job["error"]["code"]) == ("failed", "run_killed")
        assert "signal 9 (SIGKILL)" in job["error"]["message"] and "after 3 retries" in job["error"]["message"]
        assert len(shared.starts(poison)) == 4
        figure("killed, out of memory: 2 starts each; poison job: 4 starts, then failed; ValueError: 1 start")


def test_a_forged_record_harms_nobody(server: Server) -> None:
    """The record names a live foreign process: with the wrong start time, then with another boot."""
    foreign = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(300)"])
    try:
        for changes in ({"started": 1}, {"boot_id": "00000000-0000-0000-0000-000000000000"}):
            job_id = server.submit(steps=400, seconds=0.05)
            until(lambda job_id=job_id: server.job(job_id)["progress"]["step"] > 2, 30)
            server.kill()
            path = server.folder(job_id) / RECORD
            record = read_json(path)
            assert record is not None
            os.kill(record["pid"], signal.SIGKILL)
            started = processes.start_time(foreign.pid)
            write_json(path, record | {"pid": foreign.pid, "started": started, "run_pid": foreign.pid} | changes)
            server.start()
            until(lambda job_id=job_id: len(server.starts(job_id)) == 2, 30, "the second start")
            assert foreign.poll() is None
            events = server.call("GET", f"/v1/fine_tuning/jobs/{job_id}/events?limit=100").json()["data"]
            assert any("vanished" in event["message"] for event in events)
            server.call("POST", f"/v1/fine_tuning/jobs/{job_id}/cancel")
            assert server.wait(job_id)["status"] == "cancelled"
            assert foreign.poll() is None
    finally:
        foreign.kill()
        foreign.wait()


def test_cancel_ends_every_descendant(shared: Server, figure) -> None:
    for stubborn in (False, True):
        job_id = shared.submit(steps=10_000, seconds=0.02, tree=True, stubborn=stubborn)
        until(lambda job_id=job_id: shared.job(job_id)["progress"]["step"] > 2, 30)
        record = read_json(shared.folder(job_id) / RECORD)
        assert record is not None
        tree = {pid: processes.start_time(pid) for pid in processes.descendants(record["pid"])}
        assert len(tree) == 6
        grace = shared.job(job_id)["progress"]["grace_seconds"]
        began = time.monotonic()
        shared.call("POST", f"/v1/fine_tuning/jobs/{job_id}/cancel")
        assert shared.wait(job_id, seconds=grace + 5)["status"] == "cancelled"
        took = time.monotonic() - began
        assert [pid for pid, started in tree.items() if processes.start_time(pid) == started] == []
        assert processes.marked(job_id) == set()
        assert took <= (grace + 1 if stubborn else 1.5)
        figure(f"tree of 5, stubborn={stubborn}: cancelled after {took:.2f} s (grace {grace:.0f} s), 0 survivors")


def test_a_cooperative_cancel_is_quick(shared: Server, figure) -> None:
    took = []
    for _ in range(4 if QUICK else 20):
        job_id = shared.submit(steps=10_000, seconds=0.05)
        until(lambda job_id=job_id: shared.job(job_id)["progress"]["step"] > 1, 30)
        began = time.monotonic()
        shared.call("POST", f"/v1/fine_tuning/jobs/{job_id}/cancel")
        shared.wait(job_id)
        took.append(time.monotonic() - began)
    p95 = statistics.quantiles(took, n=20)[-1] if len(took) > 1 else took[0]
    figure(f"cooperative cancel, {len(took)} times: p95 {p95:.2f} s (target 1 s)")
    assert p95 <= 1.0


def test_a_second_server_names_the_first(shared: Server) -> None:
    assert shared.process is not None
    twin = subprocess.run(
        [sys.executable, "-m", "service.cli", "serve", "--port", "0"],
        env=shared.environment, capture_output=True, timeout=60, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert twin.returncode != 0
    assert f"process {shared.process.pid}" in twin.stdout + twin.stderr
    assert shared.ready()
