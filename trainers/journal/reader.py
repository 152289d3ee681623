"""Reading a journal: as far as its chain holds, and never beyond."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from trainers.journal.header import DIGEST, Header, decode
from trainers.journal.record import MARK, TAG, Layout, Record, link
from trainers.journal.seal import SIZE, Seal, unpack


@dataclass(frozen=True, slots=True)
class Journal:
    """The good part of a journal: a header, and the records of step 1 to step ``len(journal)``."""

    header: Header
    """What holds for all records."""
    data: bytes
    """The records as they lie in the file, tags included; the chain over them holds."""
    root: bytes
    """The chain's value before the first of them, 32 bytes: the header's digest."""
    chain: bytes
    """The chain's value after the last of them, 32 bytes."""
    seal: Seal | None
    """Says that the run is finished; None when it is not, or when that is not certain."""
    end: int
    """Bytes of the file that are good: header, records and seal."""
    cut: str | None
    """Why the file is not read further than that; None when it ends there."""

    @property
    def layout(self) -> Layout:
        """How the records lie in the file."""
        return layout_of(self.header)

    @property
    def sealed(self) -> bool:
        """Whether this is all of a finished run."""
        return self.seal is not None

    @property
    def cut_at(self) -> int | None:
        """The offset of the first byte that was not believed; None when all were."""
        return None if self.cut is None else self.end

    @property
    def label(self) -> str:
        """What a model made from it may be called."""
        state = "finished" if self.sealed else "unfinished"
        where = "" if self.cut is None else f" (cut at byte {self.end}: {self.cut})"
        return f"step {len(self)}, {state}{where}"

    def __len__(self) -> int:
        """Steps."""
        return len(self.data) // self.layout.size

    def __iter__(self) -> Iterator[Record]:
        """The records, from step 1 on."""
        layout = self.layout
        return (layout.unpack(body) for body in self.bodies())

    def bodies(self) -> Iterator[bytes]:
        """The records' bytes without their tags, from step 1 on."""
        layout = self.layout
        starts = range(0, len(self.data), layout.size)
        return (self.data[start : start + layout.body] for start in starts)

    def record(self, step: int) -> Record:
        """One record.

        Args:
            step: Its number, from 1.

        Returns:
            What the step did.

        Raises:
            ValueError: There is none of that number.
        """
        if not 1 <= step <= len(self):
            raise ValueError(f"the journal holds the steps 1 to {len(self)}, not {step}")
        layout = self.layout
        start = (step - 1) * layout.size
        return layout.unpack(self.data[start : start + layout.body])

    def chain_at(self, step: int) -> bytes:
        """The chain's value after a step, 32 bytes; that of step 0 is the header's digest."""
        chain = self.root
        for body in islice(self.bodies(), step):
            chain = link(chain, body)
        return chain


def read(path: Path) -> Journal:
    """Reads a journal; it may be one that is being written.

    Args:
        path: The file.

    Returns:
        Its good part, and where and why it was cut.

    Raises:
        ValueError: This is no journal, or its header is damaged: then nothing of it can be believed.
        OSError: The file cannot be read.
    """
    try:
        return scan(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def scan(file: bytes) -> Journal:
    """As ``read``, from a file's bytes.

    Args:
        file: All of them.

    Returns:
        The good part.

    Raises:
        ValueError: The header is damaged.
    """
    header, begin = decode(file)
    layout = layout_of(header)
    root = chain = file[begin - DIGEST : begin]
    end, count = begin, 0
    seal: Seal | None = None
    cut: str | None = None
    while end < len(file) and cut is None and seal is None:
        body = file[end : end + layout.body]
        tag = file[end + layout.body : end + layout.size]
        if body[:4] == MARK.to_bytes(4, "little"):
            seal, cut = _seal(file[end : end + SIZE], count, chain)
        elif len(tag) < TAG:
            cut = f"the record of step {count + 1} is not whole"
        else:
            following = link(chain, body)
            cut = _damage(layout, body, tag, count + 1, following)
            if cut is None:
                chain, end, count = following, end + layout.size, count + 1
    if seal is not None:
        end += SIZE
        if end < len(file):
            cut = f"{len(file) - end} bytes follow the seal"
    return Journal(header, file[begin : begin + count * layout.size], root, chain, seal, end, cut)


def layout_of(header: Header) -> Layout:
    """How the records under a header lie in the file."""
    return Layout(header.slots, seeded=header.seed is None)


def _damage(layout: Layout, body: bytes, tag: bytes, step: int, chain: bytes) -> str | None:
    if tag != chain[:TAG]:
        return f"the record of step {step} is damaged"
    try:
        record = layout.unpack(body)
        if layout.pack(record) != body or record.step != step:
            return f"the record in the place of step {step} is that of step {record.step}"
    except ValueError as error:
        return str(error)
    return None


def _seal(data: bytes, count: int, chain: bytes) -> tuple[Seal | None, str | None]:
    try:
        seal = unpack(data)
    except ValueError as error:
        return None, str(error)
    if (seal.steps, seal.chain) != (count, chain):
        return None, "the seal is that of other records"
    return seal, None
