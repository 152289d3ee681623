"""Text of a stream: stop strings across token boundaries, and the tokens whose text has really been let go."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class TextStream(Generic[T]):
    """Pieces of text go in with a note each; text that cannot become part of a stop string comes out, with its notes.

    A stop string itself never comes out, nor does anything after it. A note comes out once its whole piece is out; the
    note of a piece that a stop string cuts comes out if the piece starts before the cut.
    """

    def __init__(self, stop: tuple[str, ...] = ()) -> None:
        self.stop = tuple(s for s in stop if s)
        self.stopped = False
        self._held = ""
        self._out = 0  # characters let go so far
        self._notes: deque[tuple[int, int, T]] = deque()  # (start, end, note), absolute characters

    @property
    def end(self) -> int:
        """Characters pushed so far, let go or held: where the next piece starts."""
        return self._out + len(self._held)

    def push(self, piece: str, note: T | None = None) -> tuple[str, list[T]]:
        """Add a piece.

        Args:
            piece: the next text, possibly empty.
            note: what belongs to it, or None.

        Returns:
            The text let go by this piece, and the notes that it completes. ``stopped`` is set at a stop string.
        """
        assert not self.stopped, "pushed after a stop string"
        start = self.end
        self._held += piece
        if note is not None:
            self._notes.append((start, start + len(piece), note))
        found = [i for i in (self._held.find(s) for s in self.stop) if i >= 0]
        if found:
            cut = min(found)
            text, self._held, self.stopped = self._held[:cut], "", True
            end = self._out = self._out + cut
            notes = [note for start, _, note in self._notes if start < end]
            self._notes.clear()
            return text, notes
        keep = self._suffix()
        return self._release(len(self._held) - keep)

    def flush(self) -> tuple[str, list[T]]:
        """Let everything go: no more pieces will come.

        Returns:
            The text that was held back, and the remaining notes.
        """
        return self._release(len(self._held))

    def _suffix(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = 0
        for s in self.stop:
            for n in range(min(len(s) - 1, len(self._held)), longest, -1):
                if self._held.endswith(s[:n]):
                    longest = n
                    break
        return longest

    def _release(self, count: int) -> tuple[str, list[T]]:
        text, self._held = self._held[:count], self._held[count:]
        self._out += count
        notes = []
        while self._notes and self._notes[0][1] <= self._out:
            notes.append(self._notes.popleft()[2])
        return text, notes
