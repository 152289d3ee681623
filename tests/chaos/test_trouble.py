"""A graceful stop, a full disk, a locked database."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.jobs.supervisor import RECORD, read_json
from tests.chaos.server import Server, until

pytestmark = pytest.mark.chaos


def test_sigterm_under_load(server: Server, figure) -> None:
    job_id = server.submit(steps=300, seconds=0.05)
    until(lambda: server.job(job_id)["progress"]["step"] > 2, 30)
    record = read_json(server.folder(job_id) / RECORD)
    assert record is not None
    answers: Counter[str] = Counter()
    stopping = threading.Event()

    def load() -> None:
        with httpx.Client(base_url=server.url, headers=server.headers, timeout=20) as client:
            while True:
                try:
                    answers[str(client.get("/v1/fine_tuning/jobs").status_code)] += 1
                except httpx.ConnectError:
                    return
                except httpx.TransportError as error:
                    # An idle kept-alive connection that the server closed is no lost answer, unless it was in use.
                    answers["dropped" if not stopping.is_set() else type(error).__name__] += 1
                    return

    streamed: list[str] = []

    def stream() -> None:
        url = f"{server.url}/v1/fine_tuning/jobs/{job_id}/events?stream=true"
        with httpx.stream("GET", url, headers=server.headers, timeout=30) as answer:
            streamed.extend(answer.iter_lines())

    threads = [threading.Thread(target=load) for _ in range(8)] + [threading.Thread(target=stream)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    assert server.process is not None
    began = time.monotonic()
    stopping.set()
    server.process.send_signal(signal.SIGTERM)
    code = server.process.wait(15)
    took = time.monotonic() - began
    for thread in threads:
        thread.join(15)
        assert not thread.is_alive()
    assert code == 0 and took <= 10
    assert set(answers) <= {"200", "503", "ReadError", "RemoteProtocolError"} and answers["200"] > 8
    assert answers["dropped"] == 0
    assert streamed, "the stream ended without a word"
    run = read_json(server.folder(job_id) / RECORD)
    assert run == record and Path(f"/proc/{record['run_pid']}").exists()
    server.start()
    assert server.wait(job_id, seconds=60)["status"] == "succeeded"
    assert len(server.starts(job_id)) == 1
    figure(f"SIGTERM under load: exit after {took:.1f} s (target 10), {answers['200']} answers, training left running")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 20 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a small file system takes more rights than this user has")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path: Path) -> None:
    with path.open("ab") as file, contextlib.suppress(OSError):
        while True:
            os.write(file.fileno(), b"\0" * 4096)


def test_a_full_disk_is_survived(small_disk: Path, tiny_llama: Path, figure) -> None:
    import shutil

    home = small_disk / "home"
    shutil.copytree(tiny_llama, home / "models" / "tiny-llama")
    with Server(home) as server:
        file_id = server.upload(steps=3)
        job_id = server.submit(steps=100, seconds=0.03)
        until(lambda: server.job(job_id)["progress"]["step"] > 5, 30)
        fill(small_disk / "ballast")
        upload = server.call(
            "POST", "/v1/files", files={"file": ("b.jsonl", b'{"steps": 1}\n' * 5000)}, data={"purpose": "fine-tune"}
        )
        body = {"model": "tiny-llama", "training_file": file_id}
        answers = [upload]
        deadline = time.monotonic() + 10
        while (answer := server.call("POST", "/v1/fine_tuning/jobs", json=body)).status_code < 300:
            fill(small_disk / "ballast")  # the write-ahead log has some room of its own
            assert time.monotonic() < deadline
        answers.append(answer)
        for answer in answers:
            assert answer.status_code in (503, 507), answer.text
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert server.call("GET", f"/v1/fine_tuning/jobs/{job_id}").status_code == 200
        time.sleep(2)
        (small_disk / "ballast").unlink()
        job = server.wait(job_id, seconds=60)
        assert job["status"] == "succeeded", job
        again = server.call("POST", "/v1/fine_tuning/jobs", json=body)
        assert again.status_code < 300
        assert server.wait(again.json()["id"], seconds=60)["status"] == "succeeded"
        with contextlib.closing(sqlite3.connect(home / "gradhelm.db")) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        codes = [answer.status_code for answer in answers]
        figure(f"full disk: upload and submit answered {codes}; job and server recovered without a restart")


def test_a_locked_database_is_survived(server: Server, home: Path, figure) -> None:
    file_id = server.upload(steps=3)
    job_id = server.submit(steps=100, seconds=0.1)
    until(lambda: server.job(job_id)["progress"]["step"] > 2, 30)
    lock = sqlite3.connect(home / "gradhelm.db", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    began = time.monotonic()
    busy = server.call("POST", "/v1/fine_tuning/jobs", json={"model": "tiny-llama", "training_file": file_id})
    waited = time.monotonic() - began
    assert busy.status_code == 503 and int(busy.headers["Retry-After"]) >= 1
    assert busy.json()["error"]["message"]
    assert server.call("GET", f"/v1/fine_tuning/jobs/{job_id}").status_code == 200
    time.sleep(max(0.0, 5 - (time.monotonic() - began)))
    lock.execute("ROLLBACK")
    lock.close()
    job = server.wait(job_id, seconds=60)
    assert job["status"] == "succeeded" and job["progress"]["attempt"] == 1
    assert len(server.starts(job_id)) == 1
    events = server.call("GET", f"/v1/fine_tuning/jobs/{job_id}/events?limit=500").json()["data"]
    steps = [event["data"]["step"] for event in events if event["type"] == "metrics"]
    assert sorted(steps) == list(range(1, 101))
    figure(f"write lock held 5 s: 503 and Retry-After after {waited:.1f} s; run and lease untouched, no event lost")
