"""Retrying a POST is safe: by key, and by what the unmodified SDK does when an answer never arrives."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from openai import DefaultHttpxClient, OpenAI

from tests.contract.base import BASE
from tests.contract.conftest import Served

transports: Any = pytest.importorskip("openai._base_client")
http: Any = next(module for name in ("httpx2", "httpx") if (module := getattr(transports, name, None)) is not None)


class DropsTheFirstAnswer(http.HTTPTransport):  # type: ignore[misc]
    """Sends each request, and loses the answer to the first one of each path after the server has made it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[str] = []

    def handle_request(self, request: Any) -> Any:
        answer = super().handle_request(request)
        if request.method == "POST" and request.url.path.endswith("/jobs"):
            self.counts.append(request.headers["x-stainless-retry-count"])
            if len(self.counts) == 1:
                answer.read()
                answer.close()
                raise http.ReadError("the connection was cut before the answer came", request=request)
        return answer


def created(served: Served, marker: str) -> list[str]:
    return [one.id for one in served.client.fine_tuning.jobs.list(metadata={"marker": marker})]


def test_the_sdks_own_retry_makes_no_second_job(served: Served) -> None:
    transport = DropsTheFirstAnswer()
    data = served.upload()
    with OpenAI(
        base_url=f"{served.url}/v1", api_key=served.key, http_client=DefaultHttpxClient(transport=transport)
    ) as client:
        job = client.fine_tuning.jobs.create(model=BASE, training_file=data, metadata={"marker": "sdk"})
    assert transport.counts == ["0", "1"], "the SDK retried by itself, and without a key"
    assert created(served, "sdk") == [job.id]


def test_one_key_and_body_make_one_job_however_often(served: Served) -> None:
    data = served.upload()
    body = {"model": BASE, "training_file": data, "metadata": {"marker": "key"}}
    headers = {"Authorization": f"Bearer {served.key}", "Idempotency-Key": "once-and-only-once"}

    route = f"{served.url}/v1/fine_tuning/jobs"
    with httpx.Client(headers=headers, timeout=60) as client, ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: client.post(route, json=body), range(50)))
        again = client.post(route, json=body)
        other = client.post(route, json={**body, "seed": 1})
    good = {answer.json()["id"] for answer in answers if answer.status_code == 200}
    assert len(good) == 1 and created(served, "key") == list(good)
    assert {answer.status_code for answer in answers} <= {200, 409}
    assert all(answer.headers["Retry-After"] for answer in answers if answer.status_code == 409)
    assert again.json()["id"] in good, "a replay long after"
    assert other.status_code == 422 and other.json()["error"]["code"] == "idempotency_key_reused"


def test_a_refused_request_gives_its_key_back(served: Served) -> None:
    headers = {"Idempotency-Key": "second-try"}
    with pytest.raises(openai.NotFoundError):
        served.client.fine_tuning.jobs.create(model=BASE, training_file="file-none", extra_headers=headers)
    job = served.client.fine_tuning.jobs.create(model=BASE, training_file=served.upload(), extra_headers=headers)
    assert job.id.startswith("ftjob-")


def test_two_equal_requests_that_are_no_retries_make_two_jobs(served: Served) -> None:
    data = served.upload()
    ids = {
        served.client.fine_tuning.jobs.create(model=BASE, training_file=data, metadata={"marker": "two"}).id
        for _ in range(2)
    }
    assert len(ids) == 2
