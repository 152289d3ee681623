"""Watches a job over server-sent events: a live bar on a terminal, plain lines in a pipe, JSON lines for programs.

A broken connection or a restarted server is no reason to stop: the stream is taken up again behind the last event
that arrived (Last-Event-ID), so that no event is shown twice and none is missing.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Any, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from service.cli.client import Client
from service.cli.errors import ServerGone, ServerRefused
from service.cli.output import emit, err, out, when

BAD = frozenset({"failed", "cancelled"})
SETTLED = BAD | {"succeeded", "paused"}
RETRY_FOR = 60.0
PAUSE = 0.5  # seconds between two tries


class View(AbstractContextManager["View"], Protocol):
    """Shows a job while it is followed."""

    def job(self, job: dict[str, Any]) -> None:
        """The job's present state."""

    def event(self, event: dict[str, Any]) -> None:
        """A new event of the job."""


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


class LineView:
    """Lines of text for pipes and logs."""

    def __init__(self) -> None:
        self.status = ""

    def __enter__(self) -> LineView:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def job(self, job: dict[str, Any]) -> None:
        """A line when the status changed."""
        if job["status"] != self.status:
            self.status = job["status"]
            print(summary(job), flush=True)

    def event(self, event: dict[str, Any]) -> None:
        """Time, level and message."""
        print(line(event), flush=True)


class BarView:
    """A progress bar with loss and remaining time; messages scroll by above it."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            console=out(),
        )
        self.task: TaskID = self.progress.add_task("waiting", total=None, numbers="")
        self.numbers: dict[str, str] = {}
        self.settled = ""

    def __enter__(self) -> BarView:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
        if self.settled:
            out().print(self.settled)

    def job(self, job: dict[str, Any]) -> None:
        """Status beside the bar."""
        self.progress.update(self.task, description=job["status"])
        self._advance(job.get("progress") or {})
        if job["status"] in SETTLED:
            self.settled = summary(job)

    def event(self, event: dict[str, Any]) -> None:
        """Numbers move the bar; messages are printed above it."""
        data = event.get("data") or {}
        self._advance(data)
        if event.get("type") != "metrics":
            self.progress.console.print(Text(line(event)))

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
    return f"{when(event.get('created_at'))}  {event.get('level', 'info'):<5}  {event.get('message', '')}"


def summary(job: dict[str, Any]) -> str:
    """A job's state in one line, with the reason where it failed and the result where it succeeded."""
    text = f"{job['id']}  {job['status']}"
    result = job.get("fine_tuned_model") or job.get("vector")
    if result:
        text += f"  {result}"
    error = job.get("error") or {}
    if error.get("message"):
        text += f"  {error.get('code')}: {error['message']}"
    return text


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
    silent_since: float | None = None
    with view:
        while True:
            try:
                job = client.get(route)
                silent_since = None
                if job["status"] not in SETTLED:
                    view.job(job)
                for event in client.events("GET", f"{route}/events", params={"stream": "true"}, last_id=last_id):
                    body = event.json()
                    last_id = event.id if event.id is not None else last_id
                    if body is not None and body.get("object") == "fine_tuning.job.event":
                        view.event(body)
                # The stream ends when the job is settled or the server shuts down. Only a job that was settled before
                # its stream was read to the end has nothing more to tell.
                if job["status"] in SETTLED:
                    view.job(job)
                    return job
            except (ServerGone, ServerRefused) as error:
                if isinstance(error, ServerRefused) and error.status != 503:
                    raise
                now = time.monotonic()
                if silent_since is None:
                    silent_since = now
                    err().print(
                        Text(f"{error.message.splitlines()[0]} Trying again for {retry_for:g} s.", style="yellow")
                    )
                if now - silent_since >= retry_for:
                    raise
            time.sleep(PAUSE)
