"""What somebody who watches a run sees: one line that is rewritten in a terminal, now and then a line elsewhere.

Events are the source; events.jsonl has all of them whatever is shown here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol, TextIO

from trainers.terminal import line

LINE_SECONDS = 10.0
"""Between two lines about steps where nothing can be rewritten; the first, the last and evaluations always get one."""

_ORDER = ("loss", "speed", "left", "held-out loss")
"""What comes last is what a narrow terminal cuts off."""
_STEPS = frozenset({"metric", "progress"})


class View(AbstractContextManager["View"], Protocol):
    """Shows a run from entering to leaving."""

    def __call__(self, kind: str, data: dict[str, Any]) -> None:
        """Takes an event, of any kind but heartbeats."""


class Numbers:
    """The newest of each number that events have told."""

    def __init__(self) -> None:
        self.step = 0
        self.total: int | None = None
        self.evaluated = False
        self._shown: dict[str, str] = {}

    def take(self, data: dict[str, Any]) -> None:
        """Takes the numbers of a metric or progress event."""
        self.step = data.get("step", self.step)
        self.total = data.get("total_steps", self.total)
        self.evaluated |= "valid_loss" in data
        for name, label in (("train_loss", "loss"), ("valid_loss", "held-out loss")):
            if isinstance(data.get(name), float):
                self._shown[label] = f"{label} {data[name]:.4f}"
        if isinstance(data.get("tokens_per_second"), float):
            self._shown["speed"] = f"{data['tokens_per_second']:,.0f} tokens/s"
        if data.get("eta_seconds"):
            self._shown["left"] = f"{duration(data['eta_seconds'])} left"
        elif "eta_seconds" in data:
            self._shown.pop("left", None)  # before the first step, and after the last

    def __str__(self) -> str:
        total = "?" if self.total is None else self.total
        return "  ".join([f"step {self.step} / {total}", *(self._shown[key] for key in _ORDER if key in self._shown)])


class Lines:
    """Lines of text, for pipes, files and logs."""

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        """Shows nothing until an event comes.

        Args:
            out: Takes the lines.
            clock: Seconds; decides when the next line about steps is due.
        """
        self._out, self._clock = out, clock
        self._numbers = Numbers()
        self._due = float("-inf")

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def __call__(self, kind: str, data: dict[str, Any]) -> None:
        """Prints what happened; of steps, what is due."""
        if kind not in _STEPS:
            self._say(line(kind, data))
            return
        numbers = self._numbers
        numbers.take(data)
        if kind == "metric":
            return  # its progress event follows
        if numbers.evaluated or numbers.step == numbers.total or self._clock() >= self._due:
            self._say(str(numbers))
            numbers.evaluated = False
            self._due = self._clock() + LINE_SECONDS

    def _say(self, text: str) -> None:
        self._out.write(f"{text}\n")
        self._out.flush()


class Live:
    """One line that is rewritten at each step, below everything else that is said."""

    def __init__(self, terminal: TextIO, *, beside: TextIO | None = None) -> None:
        """Draws nothing until it is entered.

        Args:
            terminal: Takes the line.
            beside: Takes all other lines, about steps too, where standard output is no terminal; none: they go to the
                terminal, above the line, without those about steps.
        """
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._numbers = Numbers()
        self._lines = None if beside is None else Lines(beside)
        self._progress = Progress(
            BarColumn(bar_width=12),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=Console(file=terminal, highlight=False),
            auto_refresh=False,  # no thread: it is drawn when there is something new
            redirect_stdout=beside is None,  # what libraries print goes above the line
        )
        self._task = self._progress.add_task("", total=None, numbers="loading")

    def __enter__(self) -> Live:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, kind: str, data: dict[str, Any]) -> None:
        """Redraws the line, or says something above it."""
        from rich.text import Text

        if self._lines is not None:
            self._lines(kind, data)
        elif kind not in _STEPS:
            self._progress.console.print(Text(line(kind, data)))
        if kind == "progress":
            self._progress.update(self._task, total=data["total_steps"], completed=data["step"])
        if kind in _STEPS:
            self._numbers.take(data)
            self._progress.update(self._task, numbers=str(self._numbers), refresh=kind == "progress")


def make_view(out: TextIO, err: TextIO) -> View:
    """The live line where a terminal is, else lines.

    Args:
        out: Standard output.
        err: Standard error; takes the live line where only this one is a terminal.

    Returns:
        A view, not entered yet.
    """
    if _rewritable(out):
        return Live(out)
    return Live(err, beside=out) if _rewritable(err) else Lines(out)


def _rewritable(stream: TextIO) -> bool:
    if not stream.isatty():
        return False
    from rich.console import Console

    console = Console(file=stream)
    return console.is_terminal and not console.is_dumb_terminal


def duration(seconds: float) -> str:
    """Seconds as ``h:mm:ss``, or ``m:ss`` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
