"""Rows of a training file, streamed in bounded memory, every fault with its line.

No tokenizer and no torch here: what can be said from the text alone. `core.data.validate` adds what takes a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from core.data.lines import MAX_LINE_BYTES, read_lines
from core.data.lines import looks_like_json_lines as looks_like_json_lines
from core.data.rules import CODES as CODES
from core.data.rules import WARNINGS as WARNINGS
from core.data.rules import Checker, RowProblem
from core.data.rules import Message as Message
from core.data.rules import Row as Row

FEW_ROWS = 10
"""Below this many rows a warning is due (it is the least that OpenAI accepts)."""


class DataError(ValueError):
    """A training file that cannot be used; `problems` says where and why."""

    def __init__(self, problems: list[RowProblem]) -> None:
        """Name the first problem in the text.

        Args:
            problems: at least one.
        """
        first = problems[0]
        where = f"line {first.line}: " if first.line is not None else ""
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        super().__init__(f"{where}{first.message} [{first.code}]{more}")
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Scan:
    """What reading a whole file showed."""

    rows: int
    """Rows that are in order."""
    problems: list[RowProblem] = field(default_factory=list)
    """The first problems, at most `max_problems`, by line."""
    warnings: list[RowProblem] = field(default_factory=list)
    """The first warnings, at most `max_problems`, by line."""
    problem_count: int = 0
    """How many problems there are in all."""
    warning_count: int = 0
    """How many warnings there are in all."""
    kind: Literal["chat", "completion"] | None = None
    """Which kind of rows the file holds; None when none is in order."""

    @property
    def ok(self) -> bool:
        """Whether the file can be used."""
        return self.problem_count == 0


def scan(path: Path, *, max_problems: int = 100, min_rows: int = 1) -> Scan:
    """Check every line of a file.

    Args:
        path: a JSONL file, UTF-8.
        max_problems: how many problems, and how many warnings, are kept; all are counted.
        min_rows: least number of rows.

    Returns:
        Counts, problems and warnings; memory does not grow with the file.

    Raises:
        OSError: the file cannot be read.
    """
    walk = _Walk(max_problems)
    for row in walk.rows(path):
        walk.good += 1
        walk.kind = row.kind
    if walk.seen == 0:
        walk.add([RowProblem(None, "empty_file", "the file holds no rows; write one JSON object per line")], [])
    elif walk.seen < min_rows:
        text = f"the file holds {walk.seen} rows; at least {min_rows} are needed"
        walk.add([RowProblem(None, "too_few_examples", text)], [])
    elif walk.seen < FEW_ROWS:
        text = f"the file holds {walk.seen} rows; fewer than {FEW_ROWS} rarely teach a model anything"
        walk.add([], [RowProblem(None, "few_examples", text)])
    return Scan(walk.good, walk.problems, walk.warnings, walk.problem_count, walk.warning_count, walk.kind)


def rows(path: Path) -> Iterator[Row]:
    """Read the rows of a file that is in order.

    Args:
        path: a JSONL file, UTF-8.

    Yields:
        Row: the rows in the order of the file.

    Raises:
        DataError: at the first line with a problem, or at the end of a file without rows.
        OSError: the file cannot be read.
    """
    walk = _Walk(1)
    for row in walk.rows(path):
        if walk.problems:
            break
        yield row
    if walk.seen == 0:
        raise DataError([RowProblem(None, "empty_file", "the file holds no rows; write one JSON object per line")])
    if walk.problems:
        raise DataError(walk.problems)


class _Walk:
    """One pass over a file, with bounded lists of what was found."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.seen = self.good = self.problem_count = self.warning_count = 0
        self.kind: Literal["chat", "completion"] | None = None
        self.problems: list[RowProblem] = []
        self.warnings: list[RowProblem] = []

    def rows(self, path: Path) -> Iterator[Row]:
        checker = Checker()
        for line in read_lines(path):
            if line.data is None:
                self.seen += 1
                text = f"the line is longer than {MAX_LINE_BYTES} bytes"
                self.add([RowProblem(line.number, "line_too_long", text)], [])
                continue
            if not line.data.strip(b" \t\r"):
                self.add([], [RowProblem(line.number, "blank_line", "the line is blank and is skipped")])
                continue
            self.seen += 1
            row = checker.check(line.number, line.data)
            self.add(checker.problems, checker.warnings)
            checker.problems.clear()
            checker.warnings.clear()
            if row is not None:
                yield row

    def add(self, problems: list[RowProblem], warnings: list[RowProblem]) -> None:
        self.problem_count += len(problems)
        self.warning_count += len(warnings)
        self.problems += problems[: max(0, self.limit - len(self.problems))]
        self.warnings += warnings[: max(0, self.limit - len(self.warnings))]
