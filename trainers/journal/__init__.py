"""The journal of a zeroth-order run: what each step did, in a few numbers, chained by checksum.

A step of such a method is a seed, a rate and a derivative, so the weights of a run are a pure function of its base and
its journal. docs/journal.md specifies every byte. Reading, writing, forking and comparing need the standard library
alone; ``replay`` needs torch.
"""

from __future__ import annotations

from trainers.journal.difference import Difference, difference
from trainers.journal.fork import fork
from trainers.journal.header import Header, Parent, TensorEntry
from trainers.journal.reader import Journal, read
from trainers.journal.record import Record, Slot
from trainers.journal.seal import Seal
from trainers.journal.writer import Writer

__all__ = [
    "Difference",
    "Header",
    "Journal",
    "Parent",
    "Record",
    "Seal",
    "Slot",
    "TensorEntry",
    "Writer",
    "difference",
    "fork",
    "read",
]
