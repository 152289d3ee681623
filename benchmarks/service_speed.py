"""The server without a model: time to submit a job, to list 20 of 10,000 jobs, and its memory when idle.

A real server process over loopback HTTP on an empty data folder. Validation is replaced by a process that sleeps, so
that jobs stay where they were submitted and the API, the database and the scheduler's own work are what is measured.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import httpx
import psutil

from benchmarks.report import Report
from demo.server import Server, processes_of
from demo.tickets import TRAIN

JOBS = 10_000


def p95(seconds: list[float]) -> float:
    """95th percentile in milliseconds."""
    return quantiles(seconds, n=20)[-1] * 1000


def timed(call: Callable[[], httpx.Response], repetitions: int) -> list[float]:
    """Seconds of each call."""
    taken = []
    for _ in range(repetitions):
        began = time.perf_counter()
        response = call()
        taken.append(time.perf_counter() - began)
        response.raise_for_status()
    return taken


def main() -> None:
    """Measure, print, and write the results (not with ``--quick``)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="200 jobs; writes nothing")
    options = parser.parse_args()
    report = Report("service_speed", seeds=[0])
    total, repetitions = (200, 50) if options.quick else (JOBS, 300)
    os.environ["GRADHELM_JOBS__VALIDATE_ARGV"] = '["sleep", "3600"]'
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        subprocess.run(
            [sys.executable, "-c", "from core.models.catalog import pull; pull('tiny-llama')"],
            env={**os.environ, "GRADHELM_HOME": str(home)},
            check=True,
        )
        server = Server.start(home)
        try:
            time.sleep(2)
            idle = psutil.Process(server.process.pid).memory_info().rss / 2**20
            headers = {"Authorization": f"Bearer {server.key}"}
            with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
                uploaded = client.post(
                    "/v1/files", files={"file": ("t.jsonl", TRAIN.read_bytes())}, data={"purpose": "fine-tune"}
                ).json()["id"]
                body = {"model": "tiny-llama", "training_file": uploaded}
                began = time.perf_counter()
                submit = timed(lambda: client.post("/v1/fine_tuning/jobs", json=body), total)
                rate = total / (time.perf_counter() - began)
                listing = timed(lambda: client.get("/v1/fine_tuning/jobs"), repetitions)
                deep_after = client.get("/v1/fine_tuning/jobs", params={"limit": 100}).json()["data"][-1]["id"]
                deep = timed(
                    lambda: client.get("/v1/fine_tuning/jobs", params={"after": deep_after, "limit": 100}), repetitions
                )
        finally:
            server.stop()
            for process in processes_of(home):  # the sleepers, and their supervisors, outlive the server
                process.kill()
    report.row(
        jobs=total,
        submit_p50_ms=round(median(submit) * 1000, 2),
        submit_p95_ms=round(p95(submit), 2),
        submits_per_second_one_client=round(rate, 1),
    )
    report.row(
        list_20_p50_ms=round(median(listing) * 1000, 2),
        list_20_p95_ms=round(p95(listing), 2),
        list_100_p95_ms=round(p95(deep), 2),
    )
    report.row(idle_mib=round(idle, 1))
    report.claim("job-submit-p95-ms", "<= 30", p95(submit))
    report.claim("job-list-p95-ms", "<= 25", p95(listing))
    report.claim("idle-mib", "<= 150", idle)
    if not options.quick:
        report.write()


if __name__ == "__main__":
    main()
