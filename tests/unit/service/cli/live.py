"""A real server on a loopback port, with an engine in memory and a scheduler whose runs are four metric events."""

from __future__ import annotations

import asyncio
import hashlib
import json
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog
from fastapi import FastAPI

from service.app import create_app
from service.cli.serve import address, listen
from service.cli.server import GracefulServer
from service.db.tables import Job, Model
from service.engines.fake import FakeEngine
from service.jobs.names import model_id
from service.jobs.records import Event
from service.jobs.store import JobStore
from service.settings import LimitSettings, Settings

STEPS = 4


class Runs:
    """Claims jobs as the scheduler does and lets each go through its life, once `go` is set."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.store: JobStore | None = None
        self.go = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop)

    def start(self) -> None:
        self._thread.start()

    def stop(self, *, end_runs: bool = False, seconds: float = 60.0) -> None:
        self._stop.set()
        self._thread.join()

    def wake(self) -> None:
        """It looks often enough."""

    def _loop(self) -> None:
        assert self.store is not None
        while not self._stop.wait(0.02):
            job = self.store.claim("test", 60.0, status="validating_files")
            if job is not None:
                queued = {"events": [Event("Files are in order; job queued")], "values": {"total_steps": STEPS}}
                self.store.transition(job.id, "validating_files", "queued", token=job.lease_token, **queued)
            if self.go.is_set() and (job := self.store.claim("test", 60.0)) is not None:
                self._run(self.store, job)

    def _run(self, store: JobStore, job: Job) -> None:
        for step in range(1, STEPS + 1):
            data = {"step": step, "train_loss": 2.0 / step, "train_mean_token_accuracy": 0.5}
            store.append_event(job.id, Event(f"Step {step}/{STEPS}", type="metrics", data=data), token=job.lease_token)
            time.sleep(0.05)
        if store.get(job.id).status == "pausing":
            store.transition(job.id, "pausing", "paused", token=job.lease_token, events=[Event("Job paused")])
            return
        artifact = self.home / "jobs" / job.id / "artifact"
        artifact.mkdir(parents=True)
        (artifact / "adapter_model.safetensors").write_bytes(b"weights")
        files = {"adapter_model.safetensors": hashlib.sha256(b"weights").hexdigest()}
        (artifact / "manifest.json").write_text(json.dumps({"kind": "adapter", "files": files}))
        model = model_id(job)
        made = Model(
            id=model, kind="adapter", base=job.model, path=str(artifact), job_id=job.id, created_at=1, manifest={}
        )  # fmt: skip
        done = {"events": [Event("The job has succeeded")], "rows": [made], "values": {"result_model": made.id}}
        store.transition(job.id, "running", "succeeded", token=job.lease_token, **done)


class Live:
    """A running server."""

    def __init__(self, home: Path) -> None:
        limits = LimitSettings(min_free_disk_bytes=0)
        self.settings = Settings(home=home, port=0, limits=limits, drain_seconds=0.0, grace_seconds=1.0)
        self.engine = FakeEngine()
        self.runs = Runs(home)
        self.app: FastAPI = create_app(self.settings, engine=self.engine, scheduler=self.runs)
        self.runs.store = self.app.state.store
        self.url = ""


@contextmanager
def serve(home: Path) -> Iterator[Live]:
    """Start, yield when it answers, stop as SIGTERM does."""
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    live = Live(home)
    listener = listen("127.0.0.1", 0)
    live.url = address(listener)
    server = GracefulServer(live.app, live.settings)
    failures: list[Exception] = []

    def main() -> None:
        try:
            asyncio.run(server.serve_app(listener))
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=main)
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        yield live
    finally:
        server.handle_exit(15, None)
        thread.join(timeout=20)
        listener.close()
        assert failures == []
        structlog.reset_defaults()


def pull_stand_in(home: Path) -> str:
    """The files by which a base model is found, without weights to load."""
    folder = home / "models" / "tiny-llama"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    return "tiny-llama"


def vector_file(path: Path, fingerprint: str) -> Path:
    """A steering vector of one layer, written by hand."""
    about = {
        "format": "gradhelm-vector/1", "site": "block", "fingerprint": fingerprint, "base": "tiny-llama",
        "method": "mean_difference", "data_hash": "sha256:0", "norms": {"1": 2.0}, "metadata": {},
    }  # fmt: skip
    tensors = {"layer.1": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    header = json.dumps({"__metadata__": {"gradhelm": json.dumps(about)}, **tensors}).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<2f", 0.5, -0.5))
    return path
