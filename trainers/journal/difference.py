"""Where two journals part."""

from __future__ import annotations

from itertools import zip_longest
from typing import NamedTuple

from trainers.journal.header import differing
from trainers.journal.reader import Journal
from trainers.journal.record import Record


class Difference(NamedTuple):
    """What two journals do not share."""

    header: tuple[str, ...]
    """Fields of the header that differ and matter; with any, equal records may mean different things."""
    step: int | None
    """The first step that is not bitwise the same in both, or that only one has; None when all are."""
    left: Record | None
    """That step in the first journal; None when it has none."""
    right: Record | None
    """That step in the second one; None when it has none."""
    sealed: bool
    """Whether one is sealed and the other is not, or with other tensors."""

    @property
    def equal(self) -> bool:
        """Whether both tell of the same run."""
        return not self.header and self.step is None and not self.sealed


def difference(left: Journal, right: Journal) -> Difference:
    """Compares two journals: headers, then steps bit for bit, then seals.

    Args:
        left: One.
        right: The other.

    Returns:
        What differs. Of two with other ``slots``, or with the seeds elsewhere, the first step differs.
    """
    step = next(
        (
            number
            for number, (one, other) in enumerate(zip_longest(left.bodies(), right.bodies()), start=1)
            if one != other
        ),
        None,
    )
    return Difference(
        differing(left.header, right.header),
        step,
        left.record(step) if step is not None and step <= len(left) else None,
        right.record(step) if step is not None and step <= len(right) else None,
        (left.seal and left.seal.tensors) != (right.seal and right.seal.tensors),
    )
