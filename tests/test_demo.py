"""What the demo tells while it waits. The demo itself, with the real model, is run by ``make demo``."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import typer

from demo import tickets
from demo.run import MARK, cancel_leftovers, follow, main, what_next
from demo.server import Server, alone, end_leftover
from service.cli import app
from service.cli.chat import parse_vector
from service.jobs.lock import FolderLock

ROOT = Path(__file__).parents[1]


class Jobs:
    """A job that does five steps from one look to the next, and says its total from the second look on."""

    def __init__(self, steps: int) -> None:
        self.steps, self.looks = steps, 0

    def retrieve(self, job: str) -> Any:
        self.looks += 1
        total = self.steps if self.looks > 1 else None
        return SimpleNamespace(status="running", model_extra={"progress": {"step": 0, "total_steps": total}})

    def list_events(self, job: str, limit: int) -> Any:
        seen = range(1, min(self.steps, 5 * self.looks) + 1)
        events = [
            SimpleNamespace(
                id=f"e{step}", type="metrics", level="info", message="", data={"step": step, "train_loss": 1 / step}
            )
            for step in seen
        ]
        return SimpleNamespace(data=events[::-1])


def test_each_step_that_is_told_says_how_many_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("demo.run.time.sleep", lambda seconds: None)
    client: Any = SimpleNamespace(fine_tuning=SimpleNamespace(jobs=Jobs(12)))
    follow(client, "job", set(), until_step=12)
    assert capsys.readouterr().out.splitlines() == ["   step 5 of 12: loss 0.200", "   step 10 of 12: loss 0.100"]


WAIT = "import time; print('up', flush=True); time.sleep(60)"
HOLD = f"import sys; from pathlib import Path; from demo.server import alone\nwith alone(Path(sys.argv[1])): {WAIT}"


def started(script: str, *arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    return process


def test_a_second_demo_refuses_and_leaves_the_first_ones_server_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo, server = started(HOLD, str(tmp_path)), started(WAIT)
    try:
        record = {"pid": server.pid, "created": psutil.Process(server.pid).create_time()}
        (tmp_path / "demo.json").write_text(json.dumps(record))
        monkeypatch.setattr("demo.run.HOME", tmp_path)
        monkeypatch.setattr("demo.run.pull", lambda: end_leftover(tmp_path))
        with pytest.raises(SystemExit, match=f"process {demo.pid}"):
            main([])
        assert server.poll() is None
        demo.kill()  # a crash: its lock goes with it, its server stays
        demo.wait()
        with alone(tmp_path):
            end_leftover(tmp_path)
        assert not psutil.pid_exists(server.pid)
    finally:
        for process in (demo, server):
            process.kill()
            process.communicate()


def test_help_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("demo.run.HOME", tmp_path / "home")
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "GRADHELM_DEMO_HOME" in capsys.readouterr().out
    assert not (tmp_path / "home").exists()


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "server.log").write_text("error: of an earlier start\n")
    lock = FolderLock(tmp_path)
    lock.acquire()
    try:
        with pytest.raises(SystemExit) as ended:
            Server.start(tmp_path)
    finally:
        lock.release()
    said = str(ended.value.code)
    assert f"in use by process {os.getpid()}" in said
    assert "earlier" not in said and "Traceback" not in said
    assert len(said.splitlines()) <= 4


def test_only_the_demos_own_jobs_are_cancelled() -> None:
    cancelled: list[str] = []
    listed = [
        SimpleNamespace(id="mine", status="running", metadata=MARK),
        SimpleNamespace(id="done", status="succeeded", metadata=MARK),
        SimpleNamespace(id="yours", status="running", metadata={}),
    ]
    jobs = SimpleNamespace(
        list=lambda limit: listed, cancel=cancelled.append, retrieve=lambda job: SimpleNamespace(status="cancelled")
    )
    client: Any = SimpleNamespace(fine_tuning=SimpleNamespace(jobs=jobs))
    cancel_leftovers(client)
    assert cancelled == ["mine"]


def test_the_end_shows_commands_that_the_command_line_takes() -> None:
    text = what_next("ft:base:me:tickets:1", "vec_1").replace("\\\n", " ")
    chats = [shlex.split(line)[2:] for line in text.splitlines() if line.strip().startswith("gradhelm chat ")]
    command: Any = typer.main.get_command(app)
    tuned, steered = (command.commands["chat"].make_context("chat", list(words)).params for words in chats)
    assert (tuned["model"], tuned["system"]) == ("ft:base:me:tickets:1", tickets.rows(tickets.TRAIN)[0][0]["content"])
    assert parse_vector(steered["vector"][0]) == {"id": "vec_1", "strength": 1.5, "layers": [16]}
