"""What commands print: JSON for programs, tables for people; notes go to stderr so that pipes stay clean."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

Columns = Mapping[str, str]


def out() -> Console:
    """The console for results. Made on each use: tests and pipes may have replaced stdout."""
    return Console(file=sys.stdout, highlight=False, soft_wrap=True)


def err() -> Console:
    """The console for notes, progress and errors."""
    return Console(file=sys.stderr, highlight=False, soft_wrap=True)


def note(message: str) -> None:
    """A line on stderr for the person watching."""
    err().print(Text(message, style="dim"))


def emit(value: Any, *, indent: int | None = 2) -> None:
    """A value as JSON on stdout."""
    print(json.dumps(value, indent=indent, ensure_ascii=False), flush=True)


def when(seconds: int | float | None) -> str:
    """Epoch seconds in local time, or a dash."""
    if not seconds:
        return "-"
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def size(count: int | None) -> str:
    """Bytes for people: 12.3 MiB."""
    if count is None:
        return "-"
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def cell(key: str, value: Any) -> str:
    """One value of an object as a table shows it: times by the name of their field, bytes as sizes."""
    if value is None or value == "":
        return "-"
    if isinstance(value, int | float) and (key.endswith("_at") or key == "created" or key.startswith("estimated_")):
        return when(value)
    if key == "bytes" and isinstance(value, int):
        return size(value)
    if isinstance(value, list):
        return ", ".join(cell("", entry) for entry in value) or "-"
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def table(rows: Sequence[Mapping[str, Any]], columns: Columns, *, empty: str) -> None:
    """Objects as lines; ``columns`` maps a field to its heading, ``empty`` says what to do when there is nothing."""
    if not rows:
        note(empty)
        return
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for number, heading in enumerate(columns.values()):
        # Ids are there to be copied: the first column never wraps.
        grid.add_column(heading, no_wrap=number == 0, overflow="fold")
    for row in rows:
        grid.add_row(*(Text(cell(key, row.get(key))) for key in columns))
    console = out()
    if not console.is_terminal:
        console = Console(file=sys.stdout, highlight=False, width=400)
    console.print(grid)


def fields(value: Mapping[str, Any], *, skip: frozenset[str] = frozenset({"object"})) -> None:
    """One object, a line for each field that says something; nested settings get a line each."""
    flat: list[tuple[str, str]] = []
    for key, entry in value.items():
        if key in skip or entry is None or entry == {} or entry == []:
            continue
        flat.extend(_flatten(key, entry))
    width = max((len(key) for key, _ in flat), default=0)
    console = out()
    for key, text in flat:
        console.print(Text.assemble((f"{key:<{width}}  ", "bold"), text))


def _flatten(key: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        return [pair for inner, entry in value.items() for pair in _flatten(f"{key}.{inner}", entry)]
    return [(key, cell(key.rpartition(".")[2], value))]
