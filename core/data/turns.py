"""Where each message's text begins in a rendered conversation, from one rendering instead of one for each answer.

Rendering every beginning of a conversation takes time in the square of its length. A template that goes through the
messages once, forwards, writes each beginning of a conversation as a beginning of the whole: it is watched while
it fetches one message after the other. What a template does that could look ahead (a length, a last message, a second
pass) ends the attempt, and the caller renders each beginning after all.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

# Jinja's ways to know of later messages that do not go through the list itself.
AHEAD = re.compile(r"\b(last|nextitem|revindex0?|length|count|recursive|generation)\b")


class LooksAhead(Exception):
    """The template asks for more than the next message."""


def beginnings(turns: list[dict[str, str]], template: str, variables: dict[str, Any]) -> tuple[list[int], str] | None:
    """Render once and note where each message begins.

    Args:
        turns: the messages as the template gets them.
        template: Jinja's text.
        variables: all else that the template gets.

    Returns:
        For each message, and (last) for what follows them, how many characters were written before the template fetched
        it; and the text. None where the template may look ahead.
    """
    if AHEAD.search(template):
        return None
    from transformers.utils.chat_template_utils import _compile_jinja_template

    watched = _Watched(turns)
    pieces: list[str] = []
    try:
        for piece in _compile_jinja_template(template).generate(messages=watched, **variables):
            pieces.append(piece)
            watched.written += len(piece)
    except Exception:  # the caller renders in the plain way, which then says what is wrong, if anything is
        return None
    starts = watched.starts
    if len(starts) != len(turns) + 1 or any(a >= b for a, b in itertools.pairwise(starts)):
        return None  # messages that leave no text, or were fetched in advance
    return starts, "".join(pieces)


class _Watched:
    """A conversation that can be gone through once, forwards, from its first or a later message."""

    def __init__(self, turns: list[dict[str, str]]) -> None:
        self.written = 0
        self.starts: list[int] = []
        self._turns = turns
        self._passed = False

    def __bool__(self) -> bool:
        return bool(self._turns)

    def __getitem__(self, index: Any) -> Any:
        if index == 0 and isinstance(index, int):
            return self._turns[0]
        if isinstance(index, slice) and index.start in (0, 1, None) and index.stop is None and index.step in (1, None):
            return _Rest(self, index.start or 0)
        raise LooksAhead

    def __iter__(self) -> Iterator[dict[str, str]]:
        return self.walk(0)

    def walk(self, start: int) -> Iterator[dict[str, str]]:
        """Fetch the messages from one on, noting what has been written before each."""
        if self._passed:
            raise LooksAhead
        self._passed = True
        self.starts += [-1] * start  # never before the first: it is part of what precedes the others
        for turn in self._turns[start:]:
            self.starts.append(self.written)
            yield turn
        self.starts.append(self.written)


class _Rest:
    """What is behind the first message."""

    def __init__(self, whole: _Watched, start: int) -> None:
        self._whole, self._start = whole, start

    def __bool__(self) -> bool:
        raise LooksAhead

    def __iter__(self) -> Iterator[dict[str, str]]:
        return self._whole.walk(self._start)
