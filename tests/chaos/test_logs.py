"""Logs stream and resume without loss, and a chatty job cannot fill the disk."""

from __future__ import annotations

import contextlib
import json
import random
import re
import time

import httpx
import psutil
import pytest

from service.jobs import logs
from tests.chaos.server import QUICK, Server, until

pytestmark = pytest.mark.chaos


def test_a_stream_is_taken_up_again_where_it_broke(shared: Server, figure) -> None:
    count = 5_000 if QUICK else 50_000
    drops = 3 if QUICK else 10
    draw = random.Random(5)
    job_id = shared.submit(steps=1, lines=count)
    shared.wait(job_id, "running", "succeeded")
    assert shared.process is not None
    memory = psutil.Process(shared.process.pid).memory_info
    before, peak = memory().rss, 0
    text, position, first_bytes = "", "0", []
    limit = len(f"line {0:06d}\n") * count
    cuts = sorted(draw.sample(range(limit // 20, limit * 19 // 20), drops))
    settled = False
    deadline = time.monotonic() + 120
    while not settled:
        assert time.monotonic() < deadline
        began = time.monotonic()
        with httpx.stream(
            "GET", f"{shared.url}/v1/fine_tuning/jobs/{job_id}/logs?stream=true",
            headers={**shared.headers, "Last-Event-ID": position}, timeout=30,
        ) as answer:  # fmt: skip
            assert answer.status_code == 200
            event: dict[str, str] = {}
            for number, line in enumerate(answer.iter_lines()):
                if number == 0:
                    first_bytes.append(time.monotonic() - began)
                name, _, value = line.partition(":")
                if line:
                    event[name] = value.strip()
                    continue
                body = json.loads(event["data"]) if event.get("data", "").startswith("{") else {}
                if body.get("object") == "log":
                    text += body["text"]
                    position = event["id"]
                event = {}
                peak = max(peak, memory().rss)
                if cuts and len(text) > cuts[0]:
                    cuts.pop(0)
                    break  # hang up
            else:
                settled = shared.job(job_id)["status"] == "succeeded"
    numbers = [int(number) for number in re.findall(r"^line (\d{6})$", text, re.MULTILINE)]
    assert numbers == list(range(count))
    growth = (peak - before) / 2**20
    median = sorted(first_bytes)[len(first_bytes) // 2]
    figure(
        f"{count} lines, {drops} dropped clients: 0 lost, 0 twice; memory +{growth:.0f} MiB (target 20);"
        f" first byte after {median * 1000:.0f} ms, {max(first_bytes) * 1000:.0f} ms at most (target 200)"
    )
    assert growth <= 20


def test_a_chatty_job_is_capped_and_told(shared: Server, figure) -> None:
    size = (64 << 20) if QUICK else (1 << 30)
    quota = 8 << 20
    job_id = shared.submit(steps=1, end=f"print:{size}")
    most = 0

    def used() -> int:
        sizes = 0
        for _, path in logs.segments(shared.folder(job_id)):
            with contextlib.suppress(FileNotFoundError):
                sizes += path.stat().st_size
        return sizes

    deadline = time.monotonic() + 120
    while shared.job(job_id)["status"] not in ("succeeded", "failed"):
        most = max(most, used())
        assert time.monotonic() < deadline
    assert shared.job(job_id)["status"] == "succeeded"
    assert max(most, used()) <= quota + 65536
    first, end = logs.span(shared.folder(job_id))
    assert end >= size - 80_000 and end - first <= quota
    events = shared.call("GET", f"/v1/fine_tuning/jobs/{job_id}/events").json()["data"]
    assert sum("quota" in event["message"] for event in events) == 1
    tail = shared.call("GET", f"/v1/fine_tuning/jobs/{job_id}/logs", headers={"Range": "bytes=-80"})
    assert tail.status_code == 206 and len(tail.content) == 80
    assert until(shared.ready, 5)
    figure(f"{size >> 20} MiB of prints, quota {quota >> 20} MiB: at most {most / 2**20:.1f} MiB on disk, told once")
