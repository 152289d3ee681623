"""Server-sent events, read line by line. Covers ids, event names, comments and data over several lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a stream: its id (or None), its name and its data as text."""

    id: str | None
    name: str
    data: str

    def json(self) -> dict[str, Any] | None:
        """The data as a JSON object, or None when it is none (``[DONE]``)."""
        try:
            value = json.loads(self.data)
        except ValueError:
            return None
        return value if isinstance(value, dict) else None


def parse(lines: Iterable[str]) -> Iterator[Event]:
    """Events out of lines without their line ends. An event that was not closed by an empty line is dropped: it may
    have been cut off by a broken connection."""
    identifier: str | None = None
    name, data = "message", list[str]()
    for line in lines:
        if not line:
            if data:
                yield Event(identifier, name, "\n".join(data))
            name, data = "message", []
            continue
        if line.startswith(":"):
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            data.append(value)
        elif field == "event":
            name = value
        elif field == "id" and "\0" not in value:
            identifier = value
