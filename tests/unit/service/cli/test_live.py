"""The command line against a real server: what is sent is understood, and what comes back is shown."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from core.models.fingerprint import fingerprint
from tests.unit.service.cli.conftest import Run
from tests.unit.service.cli.live import STEPS, Live, pull_stand_in, serve, vector_file


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def live(home: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    """A server on the data folder of the command line: no key and no address have to be given."""
    with serve(home) as server:
        monkeypatch.setenv("GRADHELM_URL", server.url)
        yield server


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for _ in range(12)))
    return path


@pytest.fixture
def base(live: Live, home: Path) -> str:
    return pull_stand_in(home)


def test_files_go_in_and_come_out(live: Live, run: Run, rows: Path, tmp_path: Path) -> None:
    identifier = run("files", "upload", rows).out.strip()
    assert identifier.startswith("file-")
    assert identifier in run("files", "list").out
    assert run("files", "get", identifier, "--json").json["bytes"] == rows.stat().st_size
    assert run("files", "content", identifier).out == rows.read_text()
    copy = tmp_path / "copy.jsonl"
    assert run("files", "content", identifier, "-o", copy).code == 0
    assert copy.read_bytes() == rows.read_bytes()
    assert run("files", "content", identifier, "-o", copy).code == 2, "an existing file is not overwritten"
    assert run("files", "delete", identifier, "--json").json["deleted"] is True
    gone = run("files", "get", identifier)
    assert gone.code == 1
    assert "[file_not_found]" in gone.err


def test_what_is_no_json_lines_is_refused(live: Live, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "letter.txt"
    path.write_text("Dear server,\n")
    result = run("files", "upload", path)
    assert result.code == 1
    assert "[invalid_file_format]" in result.err


def test_a_job_from_a_path_to_its_files(live: Live, run: Run, rows: Path, base: str, tmp_path: Path) -> None:
    live.runs.go.set()
    options = ("--suffix", "try", "--seed", 7, "--set", "n_epochs=2", "--set", "rank=4", "--metadata", "who=me")
    made = run("jobs", "create", "--model", base, "--file", rows, *options, "--follow")
    assert made.code == 0, made.err
    assert "uploaded" in made.err
    assert f"Step {STEPS}/{STEPS}" in made.out
    listed = run("jobs", "list", "--metadata", "who=me", "--json").json
    job = listed[0]
    assert (job["status"], job["seed"], job["suffix"]) == ("succeeded", 7, "try")
    assert job["hyperparameters"]["n_epochs"] == 2
    assert job["method"]["lora"]["hyperparameters"]["rank"] == 4
    assert job["fine_tuned_model"] in made.out
    assert run("jobs", "list", "--metadata", "who=you", "--json").json == []
    assert "succeeded" in run("jobs", "list").out
    assert f"Step 1/{STEPS}" in run("jobs", "events", job["id"]).out
    again = run("jobs", "follow", job["id"], "--json")
    assert [line["data"].get("step") for line in again.lines[:-1] if line["type"] == "metrics"] == list(range(1, 5))
    assert again.lines[-1]["status"] == "succeeded"

    model = job["fine_tuned_model"]
    assert model in run("models", "list").out
    assert run("models", "get", model, "--json").json["kind"] == "adapter"
    written = run("models", "export", model, tmp_path / "out", "--json").json["files"]
    assert [Path(name).name for name in written] == ["adapter_model.safetensors", "manifest.json"]
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == b"weights"
    assert run("models", "export", model, tmp_path / "out").code == 2
    assert run("models", "delete", model).code == 0
    assert run("models", "get", model).code == 1


def test_a_job_is_paused_resumed_and_cancelled(live: Live, run: Run, rows: Path, base: str) -> None:
    identifier = run("jobs", "create", "--model", base, "--file", rows).out.strip()
    for _ in range(200):
        if run("jobs", "get", identifier, "--json").json["status"] == "queued":
            break
        time.sleep(0.02)
    assert run("jobs", "pause", identifier).out.split() == [identifier, "paused"]
    followed = run("jobs", "follow", identifier)
    assert (followed.code, "paused" in followed.out) == (0, True)
    assert run("jobs", "resume", identifier, "--json").json["status"] == "queued"
    assert run("jobs", "cancel", identifier).out.split() == [identifier, "cancelled"]
    assert run("jobs", "follow", identifier).code == 1
    refused = run("jobs", "resume", identifier)
    assert refused.code == 1
    assert "[invalid_job_state]" in refused.err


def test_the_same_idempotency_key_is_the_same_job(live: Live, run: Run, rows: Path, base: str) -> None:
    identifier = run("files", "upload", rows).out.strip()
    create = ("jobs", "create", "--model", base, "--file", identifier, "--idempotency-key", "once")
    assert run(*create).out == run(*create).out
    assert len(run("jobs", "list", "--json").json) == 1
    other = run(*create, "--seed", 3)
    assert "[idempotency_key_reused]" in other.err


def test_unknown_names_say_what_there_is(live: Live, run: Run, rows: Path, base: str) -> None:
    for arguments, code in (
        (("jobs", "create", "--model", "nothing", "--file", rows), "model_not_found"),
        (("jobs", "create", "--model", base, "--file", "file-nothing"), "file_not_found"),
        (("jobs", "create", "--model", base, "--file", rows, "--method", "dpo"), "unknown_method"),
        (("jobs", "create", "--model", base, "--file", rows, "--set", "nothing=1"), "unknown_hyperparameter"),
        (("jobs", "get", "ftjob-nothing"), "job_not_found"),
        (("chat", "--model", "nothing", "Hi"), "model_not_found"),
        (("vectors", "get", "vec_nothing"), "vector_not_found"),
    ):
        result = run(*arguments)
        assert result.code == 1
        assert f"[{code}]" in result.err


def test_the_log_is_printed_and_followed(live: Live, run: Run, rows: Path, base: str, home: Path) -> None:
    from service.jobs.logs import LogWriter

    identifier = run("jobs", "create", "--model", base, "--file", rows).out.strip()
    folder = home / "jobs" / identifier
    folder.mkdir(parents=True, exist_ok=True)
    writer = LogWriter(folder)
    writer.write(b"first line\nsecond line\n")
    writer.close()
    assert run("jobs", "logs", identifier).out == "first line\nsecond line\n"
    assert run("jobs", "logs", identifier, "--json").json == {"offset": 0, "text": "first line\nsecond line\n"}
    assert run("jobs", "cancel", identifier).code == 0
    assert run("jobs", "logs", identifier, "--follow").out == "first line\nsecond line\n"


def test_chat_streams_steered_and_plain(live: Live, run: Run, base: str, home: Path, tmp_path: Path) -> None:
    assert run("chat", "--model", base, "--max-tokens", 3, "Hi").out.count(" ") == 2
    assert run("chat", "--model", base, "--json", "Hi").json["object"] == "chat.completion"

    path = vector_file(tmp_path / "kind.safetensors", fingerprint(home / "models" / base))
    vector = run("vectors", "import", path, "--name", "kind").out.strip()
    assert "kind" in run("vectors", "list").out
    assert run("vectors", "get", vector, "--json").json["layers"] == [1]
    assert run("vectors", "export", vector, tmp_path / "back.safetensors").code == 0
    assert (tmp_path / "back.safetensors").read_bytes() == path.read_bytes()
    assert run("vectors", "export", vector, tmp_path / "back.safetensors").code == 2
    steered = run("chat", "--model", base, "--vector", f"{vector}:4:1", "Hi")
    assert steered.code == 0, steered.err
    assert "steered layers [1]" in steered.err
    assert live.engine.requests[-1].steering is not None
    assert "[steering_touches_nothing]" in run("chat", "--model", base, "--vector", f"{vector}:0", "Hi").err
    assert run("chat", "--model", base, "--vector", f"{vector}:1:9", "Hi").code == 1
    assert run("vectors", "delete", vector).code == 0
    assert run("vectors", "list", "--json").json == []


def test_a_fit_is_a_job(live: Live, run: Run, base: str, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"positive": "Good.", "negative": "Bad."}\n')
    fit = ("vectors", "fit", "--model", base, "--file", pairs, "--layers", "0-1", "--name", "mood", "--json")
    made = run(*fit, "--set", "positions=last").json
    assert (made["name"], made["job_id"].startswith("steerjob-")) == ("mood", True)
    job = run("jobs", "get", made["job_id"], "--json").json
    assert job["method"]["mean_difference"]["hyperparameters"] == {"layers": [0, 1], "positions": "last"}
    assert run(*fit, "--set", "positions=nowhere").code == 1


def test_a_restart_does_not_lose_the_follower(run: Run, home: Path, rows: Path) -> None:
    """The server goes away in the middle and comes back on the same port: every event is shown once."""
    from service.cli import follow
    from service.cli.client import Client

    with serve(home) as first:
        base = pull_stand_in(home)
        identifier = run("jobs", "create", "--model", base, "--file", rows, "--url", first.url).out.strip()

    seen: list[str] = []

    class View(follow.LineView):
        def event(self, event: dict[str, object]) -> None:
            seen.append(str(event["id"]))

    result: list[dict[str, object]] = []
    with serve(home) as second, Client(second.url, None) as client:
        watch = threading.Thread(
            target=lambda: result.append(follow.follow(client, f"/v1/fine_tuning/jobs/{identifier}", View()))
        )
        watch.start()
        time.sleep(0.3)
        # The stream is told to end as on a stop; the follower connects again.
        second.app.state.draining.begun.set()
        time.sleep(0.3)
        second.app.state.draining.begun.clear()
        second.runs.go.set()
        watch.join(timeout=20)
        assert result[0]["status"] == "succeeded"
        listed = client.get(f"/v1/fine_tuning/jobs/{identifier}/events", limit=100)["data"]
    assert seen == [event["id"] for event in reversed(listed)]


def test_a_stop_ends_streams_and_is_quick(home: Path, run: Run, rows: Path) -> None:
    with serve(home) as live:
        base = pull_stand_in(home)
        identifier = run("jobs", "create", "--model", base, "--file", rows, "--url", live.url).out.strip()
        key = (home / "admin.key").read_text().strip()
        got: list[str] = []

        def read() -> None:
            route = f"{live.url}/v1/fine_tuning/jobs/{identifier}/events?stream=true"
            with httpx.stream("GET", route, headers={"Authorization": f"Bearer {key}"}, timeout=20) as response:
                got.extend(response.iter_lines())

        reader = threading.Thread(target=read)
        reader.start()
        time.sleep(0.3)
        began = time.monotonic()
    assert time.monotonic() - began < 3
    reader.join(timeout=5)
    assert "event: shutdown" in got


def test_a_refused_job_leaves_no_upload(live: Live, run: Run, rows: Path, base: str, tmp_path: Path) -> None:
    create = ("jobs", "create", "--model", base, "--file", rows)
    for wrong in (("--method", "dpo"), ("--set", "nothing=1"), ("--validation-file", tmp_path / "missing.jsonl")):
        result = run(*create, *wrong)
        assert result.code != 0 and "the request was refused" in result.err, wrong
    fit = run("vectors", "fit", "--model", base, "--file", rows, "--layers", "2")
    assert "blocks 0 to 1" in fit.err
    assert run("files", "list", "--json").json == []
    assert run(*create).code == 0
    assert len(run("files", "list", "--json").json) == 1


def test_a_fit_that_failed_is_listed(live: Live, run: Run, base: str, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"positive": "Good.", "negative": "Bad."}\n')
    made = run("vectors", "fit", "--model", base, "--file", pairs, "--json").json
    for _ in range(200):
        if run("jobs", "get", made["job_id"], "--json").json["status"] == "queued":
            break
        time.sleep(0.02)
    live.app.state.store.transition(made["job_id"], "queued", "failed", values={"error_code": "out_of_memory"})
    assert run("jobs", "list", "--json").json == run("vectors", "list", "--json").json == []
    assert "jobs list --all" in run("vectors", "list").err
    shown = run("jobs", "list", "--all").out
    assert made["job_id"] in shown and "failed" in shown
