"""Following survives broken connections and restarts: nothing is shown twice, nothing is missing."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from service.cli import follow
from tests.unit.service.cli.conftest import Reply, Run, Script

JOB = "/v1/fine_tuning/jobs/ftjob-1"


def job(status: str, **more: object) -> Reply:
    return Reply({"id": "ftjob-1", "object": "fine_tuning.job", "status": status, **more})


def events(*numbers: int, cut: bool = False) -> Reply:
    text = ""
    for number in numbers:
        event = {
            "object": "fine_tuning.job.event",
            "id": f"ftevent-{number}",
            "created_at": 1_700_000_000,
            "level": "info",
            "message": f"step {number}",
            "type": "metrics",
            "data": {"step": number, "total_steps": 4, "train_loss": 1.5},
        }
        text += f"id: {number}\ndata: {json.dumps(event)}\n\n"
    return Reply(text.encode(), headers={"Content-Type": "text/event-stream"}, cut=cut)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "PAUSE", 0.01)


def test_a_cut_stream_goes_on_behind_the_last_event(run: Run, script: Script) -> None:
    script.on(f"GET {JOB}", job("running"), job("running"), job("succeeded", fine_tuned_model="ft:x"))
    script.on(f"GET {JOB}/events", events(1, 2, cut=True), events(3), events(4))
    result = run("jobs", "follow", "ftjob-1", "--json", "--url", script.url)
    assert result.code == 0
    assert [line.get("message") for line in result.lines[:-1]] == ["step 1", "step 2", "step 3", "step 4"]
    assert result.lines[-1]["status"] == "succeeded"
    sent = script.sent(f"GET {JOB}/events")
    assert [one.headers.get("Last-Event-ID") for one in sent] == [None, "2", "3"]
    assert "broke" in result.err


def test_a_paused_server_is_waited_for(run: Run, script: Script) -> None:
    script.on(f"GET {JOB}", Reply({"error": {"message": "Draining."}}, 503), job("succeeded"))
    script.on(f"GET {JOB}/events", events(1))
    result = run("jobs", "follow", "ftjob-1", "--url", script.url)
    assert result.code == 0
    assert "Draining. Trying again" in result.err
    assert "step 1" in result.out
    assert result.out.count("succeeded") == 1


def test_a_server_that_stays_away_ends_it(run: Run) -> None:
    result = run("jobs", "follow", "ftjob-1", "--retry-for", "0", "--url", "http://127.0.0.1:9")
    assert result.code == 1
    assert "gradhelm serve" in result.err


@pytest.mark.parametrize(("status", "code"), [("succeeded", 0), ("paused", 0), ("failed", 1), ("cancelled", 1)])
def test_the_exit_code_tells_how_it_ended(run: Run, script: Script, status: str, code: int) -> None:
    error = {"code": "bad_data", "message": "Row 3 has no answer."} if status == "failed" else None
    script.on(f"GET {JOB}", job(status, error=error))
    script.on(f"GET {JOB}/events", events(1))
    result = run("jobs", "follow", "ftjob-1", "--url", script.url)
    assert result.code == code
    assert status in result.out
    assert ("Row 3 has no answer." in result.out) == (status == "failed")


def test_an_unknown_job_is_not_waited_for(run: Run, script: Script) -> None:
    script.on(f"GET {JOB}", Reply({"error": {"message": "No such job."}}, 404))
    result = run("jobs", "follow", "ftjob-1", "--url", script.url)
    assert (result.code, len(script.asked)) == (1, 1)


def test_the_bar_shows_loss_and_the_end(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    view = follow.BarView()
    with view:
        view.job({"id": "ftjob-1", "status": "running"})
        data = {"step": 3, "total_steps": 4, "train_loss": 0.25, "tokens_per_second": 120.0, "eta_seconds": 9}
        view.event({"type": "metrics", "data": data})
        view.event({"type": "message", "level": "warn", "message": "[look] out", "created_at": 1_700_000_000})
        view.say("The server is away.")
        view.job({"id": "ftjob-1", "status": "succeeded", "fine_tuned_model": "ft:x"})
    shown = capsys.readouterr().out
    for text in ("3/4", "loss 0.2500", "120 tokens/s", "9 s left", "[look] out", "The server is away.", "ft:x"):
        assert text in shown


def test_the_clock_of_the_bar_says_what_it_counts(capsys: pytest.CaptureFixture[str]) -> None:
    with follow.BarView() as view:
        view.job({"id": "ftjob-1", "status": "running"})
    assert "watched for 0:00:00" in capsys.readouterr().out


def test_after_a_success_the_next_command_is_told(run: Run, script: Script) -> None:
    script.on("POST /v1/fine_tuning/jobs", job("queued"))
    script.on(f"GET {JOB}", job("succeeded", fine_tuned_model="ft:x"))
    script.on(f"GET {JOB}/events", events(1))
    create = ("jobs", "create", "--model", "m", "--file", "file-1", "--follow", "--url", script.url)
    told = run(*create).err
    assert "next: `gradhelm chat --model ft:x --system '<from the training file>' --temperature 0 \"Hello\"`" in told
    assert "next:" not in run(*create, "--json").err
    script.on(f"GET {JOB}", job("failed", fine_tuned_model=None))
    assert "next:" not in run(*create).err


@pytest.mark.parametrize(("layers", "named"), [(list(range(30)), ":16"), ([0, 1], ":1"), ([7], ":7"), (None, "")])
def test_after_a_fit_the_next_command_steers_on_one_layer(
    run: Run, script: Script, layers: list[int] | None, named: str
) -> None:
    script.on("POST /v1/steering/vectors", Reply({"id": "vec_1", "job_id": "ftjob-1"}))
    script.on(f"GET {JOB}", job("succeeded", vector="vec_1", model="base"))
    script.on(f"GET {JOB}/events", events(1))
    if layers is not None:
        script.on("GET /v1/steering/vectors/vec_1", Reply({"id": "vec_1", "layers": layers}))
    result = run("vectors", "fit", "--model", "base", "--file", "file-1", "--follow", "--url", script.url)
    assert result.code == 0
    assert f'next: `gradhelm chat --model base --vector vec_1:1.5{named} "Hello"`' in result.err


@pytest.mark.parametrize("command", [("jobs", "follow", "ftjob-1"), ("jobs", "create", "--follow")])
def test_ctrl_c_says_that_the_job_goes_on(
    run: Run, script: Script, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(follow, "follow", interrupted)
    script.on("POST /v1/fine_tuning/jobs", job("queued"))
    more = ("--model", "m", "--file", "file-1") if "create" in command else ()
    result = run(*command, *more, "--url", script.url)
    assert result.code == 130
    assert "the job goes on" in result.err
    assert "gradhelm jobs follow ftjob-1" in result.err and "gradhelm jobs cancel ftjob-1" in result.err


@pytest.mark.parametrize(("status", "deleted"), [(400, True), (422, True), (500, False), (503, False)])
def test_an_upload_is_taken_back_only_when_the_job_is_surely_refused(
    run: Run, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, deleted: bool
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    script.on("POST /v1/files", Reply({"id": "file-9"}))
    script.on("DELETE /v1/files/file-9", Reply({"deleted": True}))
    script.on("POST /v1/fine_tuning/jobs", Reply({"error": {"message": "No."}}, status))
    create = ("jobs", "create", "--model", "m", "--url", script.url, "--file")
    assert run(*create, tmp_path / "rows.jsonl").code == 1
    assert len(script.sent("DELETE /v1/files/file-9")) == int(deleted)
    assert run(*create, "file-9").code == 1
    assert len(script.sent("DELETE /v1/files/file-9")) == int(deleted), "a file that was there before stays"


HOSTILE = "[red]no markup[/red] [/] [link=file:///etc]x[/link] \x1b[31m\x1b]0;title\x07\u202e\rover"
SHOWN = "[red]no markup[/red] [/] [link=file:///etc]x[/link] \ufffd[31m\ufffd]0;title\ufffd\ufffd\ufffdover"


def test_what_a_run_says_is_neither_markup_nor_commands_to_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=400, color_system=None, legacy_windows=False)
    monkeypatch.setattr(follow, "out", lambda: console)
    failed = {"id": "ftjob-1", "status": "failed", "error": {"code": "bad", "message": HOSTILE}}
    with follow.BarView() as view:
        view.event({"created_at": 1, "level": "warn", "message": HOSTILE, "type": "message"})
        view.job(failed)
    assert screen.getvalue().count(SHOWN) == 2
    assert follow.summary(failed) == f"ftjob-1  failed  bad: {SHOWN}"
    assert follow.line({"message": HOSTILE}).endswith(SHOWN) and follow.plain("a\n\tb \u00e9") == "a\n\tb \u00e9"


def test_without_a_terminal_steps_are_told_at_most_every_ten_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(follow, "time", SimpleNamespace(monotonic=lambda: now))
    view = follow.LineView()
    for step in range(25):
        view.event({"type": "metrics", "message": f"step {step}.", "data": {"step": step}})
        now += 1
    view.event({"type": "metrics", "message": "judged", "data": {"step": 25, "valid_loss": 1.0}})
    view.event({"type": "metrics", "message": "last", "data": {"step": 26}})
    view.event({"type": "message", "message": "word"})
    shown = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["0.", "10.", "20.", "judged", "last", "word"]


def test_a_queued_job_says_what_is_ahead_of_it(run: Run, script: Script) -> None:
    script.on(f"GET {JOB}", job("queued"), job("succeeded", fine_tuned_model="ft:x"))
    script.on(f"GET {JOB}/events", events(1))
    rows = [("ftjob-2", "queued"), ("ftjob-1", "queued"), ("ftjob-0", "queued"), ("a", "running"), ("b", "failed")]
    listed = [{"id": name, "status": status} for name, status in rows]
    script.on("GET /v1/fine_tuning/jobs", Reply({"data": listed, "has_more": False}))
    said = run("jobs", "follow", "ftjob-1", "--url", script.url)
    assert said.code == 0 and "waiting for 2 earlier jobs, 1 of them running" in said.err


def test_the_bar_counts_down_to_the_jobs_own_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    with follow.BarView() as view:
        view.job({"id": "ftjob-1", "status": "running", "estimated_finish": time.time() + 90})
    assert "s left" in capsys.readouterr().out


def test_the_reason_of_a_failure_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    view = follow.LineView()
    for message in ("train_file: no rows", "Job failed: train_file: no rows"):
        view.event({"type": "message", "level": "error", "message": message})
    view.job({"id": "ftjob-1", "status": "failed", "error": {"code": "bad_data", "message": "train_file: no rows"}})
    first, last = capsys.readouterr().out.splitlines()
    assert first.endswith("train_file: no rows") and last == "ftjob-1  failed  bad_data"
