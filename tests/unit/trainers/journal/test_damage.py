"""Whatever happens to a journal's bytes: it is refused, or what is read is what was written, up to the damage."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.unit.trainers.journal.helpers import TENSORS, bits, header, records
from trainers.journal import Journal, Writer, read
from trainers.journal.reader import scan
from trainers.journal.record import link

COUNT, DRAWS = 60, 200
LAYOUTS = [
    pytest.param({"slots": 1, "seeded": False}, id="one"),
    pytest.param({"slots": 3, "seeded": True}, id="three-seeded"),
]


class Sample:
    """A sealed journal, and where everything in it lies."""

    def __init__(self, path: Path, *, slots: int, seeded: bool, draw: int = 1) -> None:
        head = header(slots=slots, seed=None if seeded else draw)
        self.records = records(COUNT, slots=slots, seeded=seeded)
        with Writer.create(path, head, first=self.records) as writer:
            writer.seal(TENSORS)
        self.data = path.read_bytes()
        self.begin = len(head.encode())
        self.size = (28 if seeded else 20) + slots * 17
        self.seal = self.begin + COUNT * self.size
        assert len(self.data) == self.seal + 108

    def check(self, data: bytes, good: int, folder: Path) -> Journal:
        """Exactly the first ``good`` records are read, nothing is finished, and a writer goes on after them."""
        path = folder / "damaged"
        path.write_bytes(data)
        journal = read(path)
        assert bits(journal) == bits(self.records[:good])
        assert not journal.sealed
        assert journal.label.startswith(f"step {good}, unfinished")
        end = self.begin + good * self.size
        assert journal.end == end
        assert (journal.cut is None) is (len(data) == end)
        assert journal.cut_at == (None if len(data) == end else end)
        with Writer.reopen(path, journal.header) as writer:
            assert path.read_bytes() == data[:end] == self.data[:end], "cut at the last good record, and not before"
            assert (writer.step, writer.cut) == (good, journal.cut)
            for record in self.records[good:]:
                writer.append(record)
            writer.seal(TENSORS)
        assert path.read_bytes() == self.data, "what went on is what never stopped"
        kept = list(folder.glob("damaged.cut-*"))
        assert [one.read_bytes() for one in kept] == ([] if len(data) == end else [data[end:]])
        for one in kept:
            one.unlink()
        path.unlink()
        return journal


@pytest.fixture(params=LAYOUTS)
def sample(request: pytest.FixtureRequest, tmp_path: Path) -> Sample:
    return Sample(tmp_path / "whole", **request.param)


def test_a_file_cut_anywhere_gives_the_whole_records_before_the_cut(sample: Sample, tmp_path: Path) -> None:
    draw = random.Random(0)
    borders = {sample.begin + step * sample.size for step in range(COUNT + 1)}
    near = {border + by for border in draw.sample(sorted(borders), 20) for by in (-1, 1)}
    ends = borders | near | {0, 8, 12, sample.begin - 1, len(sample.data) - 1}
    ends |= set(draw.sample(range(len(sample.data)), DRAWS))
    assert len(ends) > DRAWS
    for end in sorted(ends):
        if end < sample.begin:
            with pytest.raises(ValueError, match="journal"):
                scan(sample.data[:end])
        else:
            sample.check(sample.data[:end], min((end - sample.begin) // sample.size, COUNT), tmp_path)


def test_a_flipped_bit_anywhere_is_refused_or_cut(sample: Sample, tmp_path: Path) -> None:
    draw = random.Random(1)
    regions = [range(sample.begin), range(sample.begin, sample.seal), range(sample.seal, len(sample.data))]
    places = [draw.choice(regions[number % 3]) for number in range(DRAWS)]
    # The tag of the first and of the last record, and the mark of the seal, are where a reader is most easily wrong.
    places += [sample.begin + sample.size - 1, sample.seal - 1, sample.seal, sample.seal + 3]
    for place in places:
        data = bytearray(sample.data)
        data[place] ^= 1 << draw.randrange(8)
        if place < sample.begin:
            with pytest.raises(ValueError, match="journal"):
                scan(bytes(data))
        else:
            sample.check(bytes(data), min((place - sample.begin) // sample.size, COUNT), tmp_path)


def test_every_bit_of_a_record_and_of_the_seal_is_covered(tmp_path: Path) -> None:
    sample = Sample(tmp_path / "whole", slots=1, seeded=False)
    for start, size, good in ((sample.seal - sample.size, sample.size, COUNT - 1), (sample.seal, 108, COUNT)):
        for bit in range(8 * size):
            data = bytearray(sample.data)
            data[start + bit // 8] ^= 1 << bit % 8
            journal = scan(bytes(data))
            assert (len(journal), journal.sealed, journal.cut_at) == (good, False, sample.begin + good * sample.size)


def test_records_that_change_places_are_cut(sample: Sample, tmp_path: Path) -> None:
    size, at = sample.size, sample.begin + 10 * sample.size
    before, one, two, rest = (
        sample.data[:at],
        sample.data[at : at + size],
        sample.data[at + size : at + 2 * size],
        sample.data[at + 2 * size :],
    )
    swapped, dropped, doubled = before + two + one + rest, before + two + rest, before + one + one + two + rest
    sample.check(swapped, 10, tmp_path)
    sample.check(dropped, 10, tmp_path)
    assert sample.check(doubled, 11, tmp_path).cut == "the record of step 12 is damaged"


def test_records_and_seals_of_another_journal_are_cut(tmp_path: Path) -> None:
    sample = Sample(tmp_path / "whole", slots=1, seeded=False)
    other = Sample(tmp_path / "other", slots=1, seeded=False, draw=2)
    assert sample.begin == other.begin
    at = sample.begin + 10 * sample.size
    sample.check(sample.data[:at] + other.data[at:], 10, tmp_path)
    journal = sample.check(sample.data[: sample.seal] + other.data[other.seal :], COUNT, tmp_path)
    assert journal.cut == "the seal is that of other records"
    early = sample.check(sample.data[:at] + sample.data[sample.seal :], 10, tmp_path)
    assert early.cut == "the seal is that of other records"


@pytest.mark.parametrize(
    "tail", [b"\0" * 4096, b"\xff" * 4096, b"\xff\xff\xff", b"\xff" * 107], ids=["0", "f", "3", "107"]
)
def test_what_a_power_cut_leaves_behind_the_records_is_cut(tail: bytes, tmp_path: Path) -> None:
    sample = Sample(tmp_path / "whole", slots=1, seeded=False)
    sample.check(sample.data[: sample.seal] + tail, COUNT, tmp_path)


def test_bytes_behind_a_good_seal_change_nothing_and_are_reported(tmp_path: Path) -> None:
    sample = Sample(tmp_path / "whole", slots=1, seeded=False)
    journal = scan(sample.data + b"more")
    assert journal.sealed
    assert bits(journal) == bits(sample.records)
    assert journal.cut == "4 bytes follow the seal"
    assert journal.cut_at == len(sample.data)


@pytest.mark.parametrize(
    ("step", "lr", "flags", "applied", "said"),
    [
        (3, 1.0, 0, 1.0, "that of step 3"),
        (1, float("nan"), 0, 1.0, "learning rate"),
        (1, 1.0, 4, 1.0, "flags 4"),
        (1, 1.0, 2, 1.0, "is skipped"),
        (1, 1.0, 3, 0.0, "is skipped"),
    ],
)
def test_what_no_writer_writes_is_cut_even_when_it_is_chained(
    step: int, lr: float, flags: int, applied: float, said: str
) -> None:
    import struct

    begin = header().encode()
    body: Any = struct.pack("<IdBdd", step, lr, flags, 1.0, applied)
    journal = scan(begin + body + link(begin[-32:], body)[:8])
    assert len(journal) == 0
    assert journal.cut_at == len(begin)
    assert journal.cut is not None
    assert said in journal.cut


def test_records_are_asked_for_by_their_steps(tmp_path: Path) -> None:
    sample = Sample(tmp_path / "whole", slots=3, seeded=True)
    journal = scan(sample.data)
    assert bits([journal.record(1), journal.record(COUNT)]) == bits([sample.records[0], sample.records[-1]])
    for step in (0, COUNT + 1, -1):
        with pytest.raises(ValueError, match=f"steps 1 to {COUNT}, not {step}"):
            journal.record(step)
