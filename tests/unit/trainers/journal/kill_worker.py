"""Goes on with a journal to a last step and seals it; says each step when it is in the journal. Made to be killed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.unit.trainers.journal.helpers import TENSORS, header, record
from trainers.journal import Writer


def main(path: Path, last: int) -> None:
    """Reads the journal's name and the last step from the command line."""
    writer = Writer.reopen(path, header()) if path.exists() else Writer.create(path, header())
    for step in range(writer.step + 1, last + 1):
        writer.append(record(step))
        os.write(1, f"{step}\n".encode())
    writer.seal(TENSORS)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
