"""A journal that begins as another one and goes its own way."""

from __future__ import annotations

import dataclasses
from itertools import islice
from pathlib import Path
from typing import Any

from trainers.journal.header import Parent
from trainers.journal.reader import Journal
from trainers.journal.writer import Writer

CHANGEABLE = frozenset({"about", "kernels"})
"""Fields of the header that say how derivatives were measured, not what they do: a fork may measure otherwise."""


def fork(journal: Journal, path: Path, step: int, **changes: Any) -> Writer:
    """Begins a journal with the first steps of another one; its header names that one and the step.

    The steps are copied bit for bit and chained anew, since the header is another.

    Args:
        journal: Where it begins.
        path: The new file; its folder exists. It is whole when this returns, and not there when this raises.
        step: The last step to copy; 0 copies none.
        **changes: Fields of the header that are others from there on: those in ``CHANGEABLE``.

    Returns:
        A writer that expects step ``step + 1``.

    Raises:
        ValueError: There is no such step, the file exists, or a field cannot change.
        OSError: The file cannot be written.
    """
    if not 0 <= step <= len(journal):
        raise ValueError(f"the journal holds the steps 1 to {len(journal)}: it cannot be forked at step {step}")
    if fixed := changes.keys() - CHANGEABLE:
        raise ValueError(f"a fork cannot change {', '.join(sorted(fixed))}: the copied steps would mean something else")
    parent = Parent(step, journal.chain_at(step).hex())
    header = dataclasses.replace(journal.header, **changes, parent=parent)
    return Writer.create(path, header, first=islice(journal, step))
