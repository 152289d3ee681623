"""A real server process that tests kill, and its data folder."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from service.jobs import processes

QUICK = os.environ.get("QUICK") == "1"
STANDIN = (sys.executable, "-S", str(Path(__file__).parent / "standin.py"))
ROOT = Path(__file__).parents[2]
OVER = {"succeeded", "failed", "cancelled"}


def until(condition: Callable[[], Any], seconds: float, what: str = "it") -> Any:
    """Wait for something true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come within {seconds} s"
        time.sleep(0.02)
    return value


class Server:
    """``gradhelm serve`` on one port and one data folder, over as many lives as the test takes."""

    def __init__(self, home: Path, *, real: bool = False, **settings: Any) -> None:
        self.home = home
        self.home.mkdir(parents=True, exist_ok=True)
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None
        # No connection outlives its answer: the next one may go to another life of the server.
        self.client = httpx.Client(verify=False, limits=httpx.Limits(max_keepalive_connections=0))
        values: dict[str, dict[str, Any]] = {"jobs": {"max_running": 4, "poll_seconds": 0.1}}
        if not real:
            values["jobs"] |= {"run_argv": STANDIN, "validate_argv": STANDIN}
        for name, value in settings.items():
            values.setdefault(name, {}).update(value)
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "GRADHELM_HOME": str(home),
            "GRADHELM_LIMITS__MIN_FREE_DISK_BYTES": "0",
        }
        for group, fields in values.items():
            for name, value in fields.items():
                text = json.dumps(value) if isinstance(value, list | tuple | dict) else str(value)
                self.environment[f"GRADHELM_{group.upper()}__{name.upper()}"] = text

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self.client.close()
        for folder in (self.home / "jobs").glob("*job-*"):
            processes.kill_all(folder.name)

    def start(self, *, wait: bool = True) -> None:
        """Start, on the port of the life before."""
        out = (self.home / "server.out").open("ab")
        argv = [sys.executable, "-m", "service.cli", "serve", "--port", str(self.port)]
        with out:
            began = out.tell()
            self.process = subprocess.Popen(argv, stdout=out, stderr=out, env=self.environment, cwd=ROOT)
        if self.port == 0:
            line = until(lambda: self._address(began), 60, "the address")
            self.port = int(line.rsplit(":", 1)[1].split()[0].rstrip("/"))
        if wait:
            until(self.ready, 60, "the server")

    def _address(self, began: int) -> str | None:
        text = (self.home / "server.out").read_bytes()[began:].decode()
        lines = [line for line in text.splitlines() if line.startswith("Gradhelm listens on ")]
        assert self.process is not None and (lines or self.process.poll() is None), text[-3000:]
        return lines[0].split(" with its data")[0] if lines else None

    def ready(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError((self.home / "server.out").read_text()[-3000:])
        with contextlib.suppress(httpx.HTTPError):
            return self.client.get(f"{self.url}/readyz", timeout=5).status_code == 200
        return False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def key(self) -> str:
        return (self.home / "admin.key").read_text().strip()

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def kill(self) -> None:
        """As the kernel does it: no goodbye."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def end(self) -> int | None:
        if self.process is None or self.process.poll() is not None:
            return None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def call(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        headers = {**self.headers, **kwargs.pop("headers", {})}
        return self.client.request(
            method, f"{self.url}{path}", headers=headers, timeout=kwargs.pop("timeout", 30), **kwargs
        )

    def upload(self, **behaviour: Any) -> str:
        """A training file that tells the stand-in how to behave."""
        text = json.dumps(behaviour) + "\n"
        answer = self.call("POST", "/v1/files", files={"file": ("b.jsonl", text)}, data={"purpose": "fine-tune"})
        assert answer.status_code < 300, answer.text
        return str(answer.json()["id"])

    def submit(self, **behaviour: Any) -> str:
        body = {"model": "tiny-llama", "training_file": self.upload(**behaviour)}
        answer = self.call("POST", "/v1/fine_tuning/jobs", json=body)
        assert answer.status_code < 300, answer.text
        return str(answer.json()["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        answer = self.call("GET", f"/v1/fine_tuning/jobs/{job_id}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def wait(self, job_id: str, *statuses: str, seconds: float = 60) -> dict[str, Any]:
        wanted = set(statuses) or OVER

        def look() -> dict[str, Any] | None:
            job = self.job(job_id)
            return job if job["status"] in wanted else None

        return dict(until(look, seconds, f"{wanted} of {job_id}"))

    def folder(self, job_id: str) -> Path:
        return self.home / "jobs" / job_id

    def starts(self, job_id: str) -> list[tuple[int, float]]:
        """(pid, time) of each start of a stand-in."""
        path = self.folder(job_id) / "starts"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(int(line.split()[0]), float(line.split()[1])) for line in lines]
