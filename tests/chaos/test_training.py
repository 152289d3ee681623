"""With the real trainer on the two-layer model: interrupted, paused or orphaned, it ends bitwise the
same as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from service.executors.base import Exited, Running
from service.executors.local import LocalExecutor
from service.jobs.supervisor import RECORD, read_json
from tests.chaos.server import QUICK, Server, until
from trainers.registry import METHODS

pytestmark = pytest.mark.chaos

WORDS = "red blue old new fast slow cat dog tree house river stone bread light rain snow".split()


def rows(count: int = 40) -> str:
    draw = random.Random(3)
    lines = []
    for _ in range(count):
        question, answer = (" ".join(draw.choices(WORDS, k=draw.randint(3, 9))) for _ in range(2))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}))
    return "\n".join(lines) + "\n"


def artifact(folder: Path) -> dict[str, str]:
    """Hashes of the weights that the run made."""
    manifest = json.loads((folder / "artifact" / "manifest.json").read_text())
    return {name: digest for name, digest in manifest["files"].items() if name.endswith(".safetensors")}


def losses(folder: Path) -> dict[int, float]:
    """Last loss said of each step; what a killed run said twice must be the same."""
    found: dict[int, float] = {}
    for line in (folder / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["kind"] == "metric" and "train_loss" in event:
            assert found.setdefault(event["step"], event["train_loss"]) == event["train_loss"], event["step"]
    return found


def sequence(folder: Path) -> list[int]:
    return [json.loads(line)["seq"] for line in (folder / "events.jsonl").read_text().splitlines()]


class Run:
    """The trainer below the real supervisor, started as often as the test wants."""

    def __init__(self, folder: Path, model: Path, method: str) -> None:
        self.folder, self.attempt = folder, 0
        self.executor = LocalExecutor(threads=1)
        folder.mkdir(parents=True)
        (folder / "rows.jsonl").write_text(rows())
        content = {
            "model": str(model), "train_file": str(folder / "rows.jsonl"), "output_dir": str(folder), "seed": 11,
            "batch_size": 4, "max_steps": 24, "save_every": 5, "threads": 1, "method": {"name": method},
        }  # fmt: skip
        (folder / "run.yaml").write_text(yaml.safe_dump(content))

    def start(self) -> Any:
        self.attempt += 1
        argv = [sys.executable, "-m", "trainers", "run.yaml"]
        return self.executor.submit(self.folder.name, argv, {}, self.folder, attempt=self.attempt, token="t")

    def finish(self, handle: Any) -> Exited:
        def ended() -> Any:
            status = self.executor.poll(handle)
            return None if isinstance(status, Running) else status

        status = until(ended, 240, "the end of the run")
        assert isinstance(status, Exited)
        return status


@pytest.mark.parametrize("method", ["lora"] if QUICK else sorted(METHODS))
def test_killed_and_resumed_is_never_interrupted(tmp_path: Path, tiny_llama: Path, method: str, figure) -> None:
    kills = 1 if QUICK else 5
    draw = random.Random(method)
    calm = Run(tmp_path / f"calm-{method}", tiny_llama, method)
    assert calm.finish(calm.start()).code == 0
    torn = Run(tmp_path / f"torn-{method}", tiny_llama, method)
    moments = sorted(draw.sample(range(1, 24), kills))
    for step in moments:
        handle = torn.start()
        until(lambda step=step: max(losses(torn.folder), default=0) >= step if torn_events(torn) else False, 240)
        record = read_json(torn.folder / RECORD)
        assert record is not None
        os.kill(record["run_pid"], signal.SIGKILL)
        status = torn.finish(handle)
        if status.code == 0:
            break  # it was faster than the kill
        assert status.signal == signal.SIGKILL
    handle = torn.start()
    assert torn.finish(handle).code == 0
    assert losses(torn.folder) == losses(calm.folder)
    assert artifact(torn.folder) == artifact(calm.folder) != {}
    figure(f"{method}: kill -9 after steps {moments}: losses and weights bitwise those of a calm run")


def torn_events(run: Run) -> bool:
    path = run.folder / "events.jsonl"
    return path.exists() and path.read_text().endswith("\n")


def submit(server: Server, steps: int) -> str:
    upload = server.call(
        "POST", "/v1/files", files={"file": ("rows.jsonl", rows())}, data={"purpose": "fine-tune"}
    ).json()
    hyperparameters = {"batch_size": 4, "max_steps": steps, "save_every": max(5, steps // 10)}
    answer = server.call(
        "POST",
        "/v1/fine_tuning/jobs",
        json={
            "model": "tiny-llama",
            "training_file": upload["id"],
            "seed": 11,
            "method": {"type": "lora", "lora": {"hyperparameters": hyperparameters}},
        },
    )
    assert answer.status_code < 300, answer.text
    return str(answer.json()["id"])


def step_of(server: Server, job_id: str) -> int:
    return int(server.job(job_id)["progress"]["step"])


@pytest.mark.timeout(900)
def test_orphaned_and_paused_runs_end_as_calm_ones(home: Path, figure) -> None:
    kills, steps = (3, 300) if QUICK else (20, 1500)
    with Server(home, real=True, jobs={"max_running": 1}) as server:
        calm = submit(server, steps)
        assert server.wait(calm, seconds=400)["status"] == "succeeded"
        delays: list[float] = []
        runs = 0
        while len(delays) < kills:
            runs += 1
            assert runs <= kills
            job_id = submit(server, steps)
            until(lambda job_id=job_id: step_of(server, job_id) > 1, 120, "the first step")
            record = read_json(server.folder(job_id) / RECORD)
            while len(delays) < kills and server.job(job_id)["status"] == "running":
                server.kill()
                server.start()
                began = time.monotonic()  # it answers: from here on it must look after the run
                seen = step_of(server, job_id)
                until(
                    lambda seen=seen, job_id=job_id: (
                        step_of(server, job_id) > seen or server.job(job_id)["status"] != "running"
                    ),
                    30,
                )
                delays.append(time.monotonic() - began)
                assert read_json(server.folder(job_id) / RECORD) == record
            job = server.wait(job_id, seconds=400)
            assert (job["status"], job["progress"]["attempt"]) == ("succeeded", 1)
            numbers = sequence(server.folder(job_id))
            assert numbers == list(range(1, len(numbers) + 1))
            assert losses(server.folder(job_id)) == losses(server.folder(calm))
            assert artifact(server.folder(job_id)) == artifact(server.folder(calm)) != {}
        figure(
            f"kill -9 of the server {kills} times in {runs} runs: adopted {len(delays)}/{kills}, the next step seen"
            f" at most {max(delays):.1f} s later (target 5), events without gap, bitwise the calm run"
        )
        assert max(delays) <= 5

        paused = submit(server, steps)
        until(lambda: step_of(server, paused) > 3, 120, "the first steps")
        server.call("POST", f"/v1/fine_tuning/jobs/{paused}/pause")
        job = server.wait(paused, "paused", "succeeded", seconds=60)
        assert job["status"] == "paused" and 3 < job["progress"]["step"] < steps
        at = job["progress"]["step"]
        server.call("POST", f"/v1/fine_tuning/jobs/{paused}/resume")
        assert server.wait(paused, seconds=400)["status"] == "succeeded"
        assert losses(server.folder(paused)) == losses(server.folder(calm))
        assert artifact(server.folder(paused)) == artifact(server.folder(calm))
        figure(f"paused after step {at} and resumed: losses and weights bitwise those of a calm run")


@pytest.mark.skipif(QUICK, reason="takes a minute for each method")
@pytest.mark.parametrize("method", ["frugal", "dct_adamw"])
def test_a_job_of_whole_weights_by_the_sdk_is_adopted_and_answers(home: Path, method: str, figure) -> None:
    with Server(home, real=True, jobs={"max_running": 1}) as server, httpx.Client() as transport:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, http_client=transport)
        data = client.files.create(file=("rows.jsonl", rows().encode()), purpose="fine-tune")
        settings = {"batch_size": 4, "max_steps": 600, "save_every": 100, "update_gap": 7, "learning_rate": 3e-3}
        made: dict[str, Any] = {method: {"hyperparameters": settings}}
        ends = []
        for kills in (0, 2):
            job = client.fine_tuning.jobs.create(
                model="tiny-llama", training_file=data.id, seed=11, method={"type": method, **made}
            )  # type: ignore[call-overload]
            for _ in range(kills):
                at = step_of(server, job.id)
                until(lambda at=at, job=job: step_of(server, job.id) > at + 5, 120, "a few steps")
                server.kill()
                server.start()
            assert server.wait(job.id, seconds=300)["progress"]["attempt"] == 1
            job = client.fine_tuning.jobs.retrieve(job.id)
            assert job.status == "succeeded" and job.fine_tuned_model is not None
            answer = client.chat.completions.create(
                model=job.fine_tuned_model,
                messages=[{"role": "user", "content": json.loads(rows(1))["messages"][0]["content"]}],
                max_tokens=24,
                temperature=0,
            )
            ends.append((losses(server.folder(job.id)), artifact(server.folder(job.id)), answer.choices[0].message))
        assert ends[0] == ends[1] and ends[0][1] and ends[0][2].content
        first, last = (ends[0][0][step] for step in (1, 600))
        assert last < 0.5 * first
        figure(
            f"{method}: a job by the SDK, its server killed twice: losses, weights and answer bitwise a calm one's;"
            f" loss {first:.2f} -> {last:.2f}"
        )
