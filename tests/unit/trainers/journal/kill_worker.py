"""Goes on with a journal to a last step and seals it; says each step when it is in the journal. Made to be killed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.unit.trainers.journal.helpers import TENSORS, header, record
from trainers.journal import Writer


def write(path: Path, last: int) -> None:
    """Records that are made up."""
    writer = Writer.reopen(path, header()) if path.exists() else Writer.create(path, header())
    for step in range(writer.step + 1, last + 1):
        writer.append(record(step))
        os.write(1, f"{step}\n".encode())
    writer.seal(TENSORS)


def tune(path: Path, last: int) -> None:
    """The steps of a real run, from where its journal ends."""
    from tests.unit.trainers.journal.runs import Run

    run = Run(path)
    for step in range(run.optimizer.steps + 1, last + 1):
        run.go(step)
        os.write(1, f"{step}\n".encode())
    run.seal()


if __name__ == "__main__":
    {"write": write, "tune": tune}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
