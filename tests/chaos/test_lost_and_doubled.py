"""What was accepted ends once, whatever dies in between; what is repeated is done once."""

from __future__ import annotations

import contextlib
import json
import random
import sqlite3
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from hypothesis import HealthCheck, settings

from tests.chaos.server import OVER, QUICK, Server, until
from tests.unit.service.jobs.machine import JobMachine

pytestmark = pytest.mark.chaos

JOBS, KILLS = (30, 3) if QUICK else (200, 20)


class TestMachine(JobMachine.TestCase):  # type: ignore[name-defined, misc]
    """2,000 steps of submit, claim, finish, cancel, pause, kill, vanish, restart."""

    settings = settings(
        max_examples=10 if QUICK else 40, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
    )


def insist(send) -> httpx.Response:
    """As a careful client: the same request, with its key, until there is an answer."""
    deadline = time.monotonic() + 300
    while True:
        try:
            answer = send()
            if answer.status_code not in (409, 429, 500, 502, 503):
                return answer
        except httpx.HTTPError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_kill_the_server_while_jobs_come_in(home, figure) -> None:
    """Half of the jobs come with idempotency keys, half from the unmodified SDK, which repeats its POSTs by itself."""
    draw = random.Random(7)
    accepted: dict[int, str] = {}
    with Server(home, jobs={"max_running": 3}) as server:
        files = [server.upload(steps=3, seconds=0.03), server.upload(steps=2, end="exit:7"), server.upload(valid=False)]
        done = threading.Event()

        def submit(n: int) -> None:
            body = {
                "model": "tiny-llama",
                "training_file": files[0 if n % 10 else n // 10 % 3],
                "metadata": {"n": str(n)},
            }
            if n % 2:
                answer = insist(
                    lambda: server.call(
                        "POST", "/v1/fine_tuning/jobs", json=body, headers={"Idempotency-Key": f"job-{n}"}, timeout=20
                    )
                )
                assert answer.status_code < 300, answer.text
                accepted[n] = answer.json()["id"]
            else:
                client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=60, timeout=20)
                accepted[n] = client.fine_tuning.jobs.create(**body).id
                client.close()

        def killer() -> None:
            for _ in range(KILLS):
                time.sleep(draw.uniform(0.5, 3.0))
                server.kill()
                time.sleep(draw.uniform(0.0, 0.5))
                server.start(wait=draw.random() < 0.7)
            done.set()

        assassin = threading.Thread(target=killer)
        assassin.start()
        pace = 3.5 * KILLS / JOBS
        with ThreadPoolExecutor(8) as pool:
            futures = []
            for n in range(JOBS):
                futures.append(pool.submit(submit, n))
                time.sleep(pace * draw.uniform(0.2, 1.2))
            for future in futures:
                future.result()
        assassin.join()
        assert done.is_set()
        until(server.ready, 60)

        def rows() -> list[tuple[str, str, str, str]]:
            with contextlib.closing(sqlite3.connect(home / "gradhelm.db")) as db:
                return db.execute("SELECT id, status, metadata, coalesce(error_code, '') FROM jobs").fetchall()

        until(lambda: all(row[1] in OVER for row in rows()), 300 if not QUICK else 120, "the end of all jobs")
        found = rows()
        numbers = Counter(int(json.loads(metadata)["n"]) for _, _, metadata, _ in found)
        doubled = {n: count for n, count in numbers.items() if count != 1}
        lost = [n for n, job_id in accepted.items() if job_id not in {row[0] for row in found}]
        assert len(accepted) == JOBS and not lost and not doubled and len(found) == JOBS
        assert list(home.glob("jobs/*/DOUBLE")) == []
        for job_id, status, metadata, code in found:
            n = int(json.loads(metadata)["n"])
            kind = 0 if n % 10 else n // 10 % 3
            assert (status, code) == [("succeeded", ""), ("failed", "run_crashed"), ("failed", "missing_content")][kind]
            assert len(server.starts(job_id)) == (0 if kind == 2 else 1), "a run was started again"
        figure(f"{JOBS} jobs, {KILLS} kill -9 of the server: {len(lost)} lost, {len(doubled)} doubled, 0 runs twice")


def test_fifty_posts_at_once_with_one_key(server: Server, figure) -> None:
    body = {"model": "tiny-llama", "training_file": server.upload(steps=1)}

    def post(_: int) -> httpx.Response:
        return insist(
            lambda: server.call("POST", "/v1/fine_tuning/jobs", json=body, headers={"Idempotency-Key": "the-key"})
        )

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(post, range(50)))
    ids = {answer.json()["id"] for answer in answers}
    assert len(ids) == 1
    other = server.call(
        "POST", "/v1/fine_tuning/jobs", json=body | {"suffix": "other"}, headers={"Idempotency-Key": "the-key"}
    )
    assert other.status_code == 422
    server.kill()
    server.start()
    again = server.call("POST", "/v1/fine_tuning/jobs", json=body, headers={"Idempotency-Key": "the-key"})
    assert {again.json()["id"]} == ids
    listed = server.call("GET", "/v1/fine_tuning/jobs").json()["data"]
    assert {job["id"] for job in listed} == ids and len(listed) == 1
    plain = server.call("POST", "/v1/fine_tuning/jobs", json=body).json()["id"]
    server.kill()
    server.start()
    retried = server.call("POST", "/v1/fine_tuning/jobs", json=body, headers={"x-stainless-retry-count": "1"})
    assert retried.json()["id"] == plain and plain not in ids  # a key marks an intent of its own
    assert len(server.call("GET", "/v1/fine_tuning/jobs").json()["data"]) == 2
    figure("the same key 50 times at once and after a kill -9: 1 job; other body: 422; an SDK's retry: no second job")
