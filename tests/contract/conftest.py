"""A real server on a loopback port, and the unmodified `openai` package in front of it.

Once with the fake engine and stand-in runs (the real scheduler, supervisor and processes), once, marked slow, with the
real engine and the real trainer on the tiny model. The tests are the same.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import structlog
from openai import OpenAI

from service.app import create_app
from service.engines.base import Request, Sampling
from service.engines.fake import FakeEngine, default_reply
from service.settings import JobSettings, LimitSettings, Settings
from tests.api.live import serving
from tests.contract.base import BASE, make_base

STANDIN = Path(__file__).parent.parent / "chaos" / "standin.py"
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
SETTLED = ("succeeded", "failed", "cancelled", "paused")


def reply(request: Request) -> str:
    """The same words whatever is asked about them (log-probabilities, length, stops), as from a model."""
    return default_reply(replace(request, sampling=Sampling(seed=request.sampling.seed)))


@dataclass
class Served:
    """The server, and how to speak to it."""

    client: OpenAI
    url: str
    key: str
    home: Path
    real: bool
    engine: FakeEngine | None

    def upload(self, rows: int = 12, **behaviour: object) -> str:
        """Training rows; behaviour is what the stand-in run does with them."""
        row = {
            "messages": [
                {"role": "user", "content": "Where is my box?"},
                {"role": "assistant", "content": "It is here."},
            ]
        }
        first = row if self.real else {**row, **behaviour}
        text = "\n".join(json.dumps(one) for one in [first, *[row] * (rows - 1)])
        return self.client.files.create(file=("rows.jsonl", text.encode()), purpose="fine-tune").id

    def settled(self, job_id: str, seconds: float = 120.0) -> str:
        """Wait for the job's end and say what it is."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            status = self.client.fine_tuning.jobs.retrieve(job_id).status
            if status in SETTLED:
                return status
            time.sleep(0.05)
        raise AssertionError(f"job {job_id} is still {status}")

    def running(self, job_id: str, seconds: float = 60.0) -> None:
        """Wait until the job runs and has done a step."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            job = self.client.fine_tuning.jobs.retrieve(job_id)
            if job.status == "running" and job.model_extra["progress"]["step"] >= 1:
                return
            assert job.status in ("validating_files", "queued", "running"), job
            time.sleep(0.05)
        raise AssertionError(f"job {job_id} never ran")


@pytest.fixture(scope="session", params=["stand-in", pytest.param("real", marks=pytest.mark.slow)])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("served")
    real = request.param == "real"
    limits = LimitSettings(min_free_disk_bytes=0)
    if real:
        from core.models.catalog import pull

        pull(BASE, home)
        settings = Settings(home=home, limits=limits, jobs=JobSettings(max_running=2, poll_seconds=0.05))
        engine = None
    else:
        make_base(home)
        argv = (sys.executable, str(STANDIN))
        jobs = JobSettings(max_running=2, poll_seconds=0.05, run_argv=argv, validate_argv=argv)
        settings = Settings(home=home, limits=limits, jobs=jobs, grace_seconds=1)
        engine = FakeEngine(reply, context=256)
    app = create_app(settings, engine=engine)
    with serving(app, settings) as live:
        with OpenAI(base_url=f"{live.url}/v1", api_key=live.key, max_retries=2, timeout=120) as client:
            yield Served(client, live.url, live.key, home, real, engine)
