"""Watches a job over server-sent events: a live bar on a terminal, plain lines in a pipe, JSON lines for programs.

A broken connection or a restarted server is no reason to stop: the stream is taken up again behind the last event
that arrived (Last-Event-ID), so that no event is shown twice and none is missing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from service.cli.client import Client
from service.cli.errors import CliError, ServerGone, ServerRefused
from service.cli.output import emit, note, out, when

BAD = frozenset({"failed", "cancelled"})
SETTLED = BAD | {"succeeded", "paused"}
RETRY_FOR = 60.0
PAUSE = 0.5  # seconds between two tries
LOOKED_AT = 200  # newest jobs among which those ahead of a queued one are counted
EVERY = 10.0  # seconds between two lines that tell of steps, where no bar does
REFRESH = 1.0  # seconds between two looks at the job while events arrive


class View(AbstractContextManager["View"], Protocol):
    """Shows a job while it is followed."""

    def job(self, job: dict[str, Any]) -> None:
        """The job's present state."""

    def event(self, event: dict[str, Any]) -> None:
        """A new event of the job."""

    def say(self, message: str) -> None:
        """A word to the person watching."""


class Reasons:
    """Why a job failed, once: the run says it, the server as "Job failed: ...", and then it stands on the job."""

    def __init__(self) -> None:
        self.told: set[str] = set()

    def new(self, event: dict[str, Any]) -> bool:
        """Whether an event says more than one before it."""
        if event.get("level") != "error":
            return True
        reason = str(event.get("message", "")).removeprefix("Job failed: ").strip()
        known = reason in self.told
        self.told |= {reason, reason.partition("\n")[0]}
        return not known

    def left(self, job: dict[str, Any]) -> dict[str, Any]:
        """The job without a reason that was told; its code stays."""
        error = job.get("error") or {}
        if str(error.get("message") or "").strip() not in self.told:
            return job
        return {**job, "error": {**error, "message": None}}


class JsonView:
    """Each event as one line of JSON, and the job itself as the last line."""

    def __enter__(self) -> JsonView:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def job(self, job: dict[str, Any]) -> None:
        """Only the settled job is printed, last: it is the result."""
        if job["status"] in SETTLED:
            emit(job, indent=None)

    def event(self, event: dict[str, Any]) -> None:
        """One line."""
        emit(event, indent=None)

    def say(self, message: str) -> None:
        """On stderr."""
        note(message)


class LineView:
    """Lines of text for pipes and logs: every message, a step in ten seconds, and the last."""

    def __init__(self) -> None:
        self.status = ""
        self.shown = -math.inf
        self.held: dict[str, Any] | None = None
        self.reasons = Reasons()

    def __enter__(self) -> LineView:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def job(self, job: dict[str, Any]) -> None:
        """A line when the status changed."""
        if job["status"] != self.status:
            self.status = job["status"]
            self._release()
            print(summary(self.reasons.left(job)), flush=True)

    def event(self, event: dict[str, Any]) -> None:
        """Time, level and message; a step that was passed over is told after all when it was the last before a word."""
        if event.get("type") == "metrics":
            now = time.monotonic()
            if now - self.shown < EVERY and "valid_loss" not in (event.get("data") or {}):
                self.held = event
                return
            self.shown, self.held = now, None
        self._release()
        if self.reasons.new(event):
            print(line(event), flush=True)

    def _release(self) -> None:
        if self.held is not None:
            print(line(self.held), flush=True)
            self.held = None

    def say(self, message: str) -> None:
        """On stderr."""
        note(message)


class BarView:
    """A progress bar with loss and remaining time; messages scroll by above it."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("watched for"),
            TimeElapsedColumn(),
            console=out(),
        )
        self.task: TaskID = self.progress.add_task("waiting", total=None, numbers="")
        self.numbers: dict[str, str] = {}
        self.settled = ""
        self.reasons = Reasons()

    def __enter__(self) -> BarView:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
        if self.settled:
            out().print(Text(self.settled))

    def job(self, job: dict[str, Any]) -> None:
        """Status beside the bar."""
        self.progress.update(self.task, description=job["status"])
        if job["status"] == "running" and job.get("estimated_finish"):
            self.numbers["left"] = f"{max(0.0, job['estimated_finish'] - time.time()):.0f} s left"
        self._advance(job.get("progress") or {})
        if job["status"] in SETTLED:
            self.settled = summary(self.reasons.left(job))

    def event(self, event: dict[str, Any]) -> None:
        """Numbers move the bar; messages are printed above it."""
        data = event.get("data") or {}
        self._advance(data)
        if event.get("type") != "metrics" and self.reasons.new(event):
            self.progress.console.print(Text(line(event)))

    def say(self, message: str) -> None:
        """Above the bar."""
        self.progress.console.print(Text(message, style="yellow"))

    def _advance(self, data: dict[str, Any]) -> None:
        for name, label in (("train_loss", "loss"), ("valid_loss", "held-out loss")):
            if isinstance(data.get(name), int | float):
                self.numbers[label] = f"{label} {data[name]:.4f}"
        if isinstance(data.get("tokens_per_second"), int | float):
            self.numbers["speed"] = f"{data['tokens_per_second']:.0f} tokens/s"
        if isinstance(data.get("eta_seconds"), int | float):
            self.numbers["left"] = f"{data['eta_seconds']:.0f} s left"
        changes: dict[str, Any] = {"numbers": "  ".join(self.numbers.values())}
        if data.get("total_steps"):
            changes["total"] = data["total_steps"]
        if data.get("step"):
            changes["completed"] = data["step"]
        self.progress.update(self.task, **changes)


def make_view() -> LineView | BarView:
    """A bar where someone watches, lines where nobody does."""
    return BarView() if out().is_terminal else LineView()


def line(event: dict[str, Any]) -> str:
    """One event as one line."""
    return plain(f"{when(event.get('created_at'))}  {event.get('level', 'info'):<5}  {event.get('message', '')}")


def summary(job: dict[str, Any]) -> str:
    """A job's state in one line, with the reason where it failed and the result where it succeeded."""
    text = f"{job['id']}  {job['status']}"
    result = job.get("fine_tuned_model") or job.get("vector")
    if result:
        text += f"  {result}"
    error = job.get("error") or {}
    if error.get("code"):
        text += f"  {error['code']}" + (f": {error['message']}" if error.get("message") else "")
    return plain(text)


def plain(text: str) -> str:
    """What a run wrote, without characters that a terminal would obey; newlines and tabs stay."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)


class Patience:
    """How long a server may be silent before we give up; says once that it waits.

    Args:
        seconds: the longest silence.
        say: tells the person watching.
    """

    def __init__(self, seconds: float, say: Callable[[str], None]) -> None:
        self.seconds, self.say = seconds, say
        self.since: float | None = None

    def reset(self) -> None:
        """The server answered."""
        self.since = None

    def endure(self, error: ServerGone | ServerRefused) -> None:
        """Return if it is worth trying again, else raise what happened."""
        if isinstance(error, ServerRefused) and error.status != 503:
            raise error
        if self.since is None:
            self.since = time.monotonic()
            self.say(f"{error.message.splitlines()[0]} Trying again for {self.seconds:g} s.")
        if time.monotonic() - self.since >= self.seconds:
            raise error


def follow(client: Client, route: str, view: View, *, retry_for: float = RETRY_FOR) -> dict[str, Any]:
    """Show a job until it is settled.

    Args:
        client: the server.
        route: the job's route, without /events.
        view: where events and states go.
        retry_for: seconds for which a server that does not answer is tried again.

    Returns:
        The job in its settled state: succeeded, failed, cancelled or paused.

    Raises:
        ServerGone: the server did not answer for ``retry_for`` seconds.
    """
    last_id: str | None = None
    patience = Patience(retry_for, view.say)
    told = False

    def look(job: dict[str, Any]) -> None:
        nonlocal told
        if job["status"] not in SETTLED:
            view.job(job)
        if job["status"] == "queued" and not told:
            told = True
            if waiting := ahead(client, job):
                view.say(waiting)

    with view:
        while True:
            try:
                job = client.get(route)
                looked = time.monotonic()
                patience.reset()
                look(job)
                for event in client.events("GET", f"{route}/events", params={"stream": "true"}, last_id=last_id):
                    body = event.json()
                    last_id = event.id if event.id is not None else last_id
                    if body is not None and body.get("object") == "fine_tuning.job.event":
                        view.event(body)
                    if time.monotonic() - looked >= REFRESH:
                        # Events say what happened; status, total and estimate stand on the job.
                        looked = time.monotonic()
                        look(client.get(route))
                # The stream ends when the job is settled or the server shuts down. Only a job that was settled before
                # its stream was read to the end has nothing more to tell.
                if job["status"] in SETTLED:
                    view.job(job)
                    return job
            except (ServerGone, ServerRefused) as error:
                patience.endure(error)
            time.sleep(PAUSE)


def ahead(client: Client, job: dict[str, Any]) -> str | None:
    """What a queued job waits for; None when nothing is ahead of it, or the server does not say."""
    try:
        rows = client.list("/v1/fine_tuning/jobs", limit=LOOKED_AT, kind="all")
    except CliError:
        return None  # a hint is worth no error
    names = [row.get("id") for row in rows]
    earlier = rows[names.index(job["id"]) + 1 :] if job["id"] in names else []
    going = [
        str(row.get("status")) for row in earlier if row.get("status") in ("running", "queued", "validating_files")
    ]
    if not going:
        return None
    running = going.count("running")
    return f"waiting for {len(going)} earlier job{'s' if len(going) > 1 else ''}, {running} of them running"


def pieces(client: Client, route: str, *, wait: bool, retry_for: float = RETRY_FOR) -> Iterator[dict[str, Any]]:
    """A job's log, piece by piece, taken up again by byte offset when the connection breaks.

    Args:
        client: the server.
        route: the job's logs.
        wait: go on until the job settles; without it, only what is there now.
        retry_for: seconds for which a server that does not answer is tried again.

    Yields:
        dict[str, Any]: ``{"offset": first byte, "text": ...}``.

    Raises:
        ServerGone: the server did not answer for ``retry_for`` seconds.
    """
    if not wait:
        with client.stream("GET", route) as response:
            yield {"offset": 0, "text": response.read().decode("utf-8", errors="replace")}
        return
    last_id: str | None = None
    patience = Patience(retry_for, note)
    while True:
        try:
            for event in client.events("GET", route, params={"stream": "true"}, last_id=last_id):
                patience.reset()
                last_id = event.id if event.id is not None else last_id
                body = event.json() or {}
                if body.get("object") == "log":
                    yield {"offset": body["offset"], "text": body["text"]}
                if event.name == "done":
                    return
        except (ServerGone, ServerRefused) as error:
            patience.endure(error)
        time.sleep(PAUSE)
