"""The bytes of a journal are those that docs/journal.md describes, and stay so."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.trainers.journal.helpers import TENSORS, bits, header, records
from tests.unit.trainers.journal.oracles import journal as oracle
from trainers.journal import Parent, TensorEntry, Writer, read
from trainers.journal.header import MAGIC, MAX_BYTES, decode
from trainers.journal.reader import scan
from trainers.journal.record import Layout, Record, Slot

ROOT = Path(__file__).parents[4]
LAYOUTS = [
    pytest.param({"slots": 1, "seeded": False}, id="one"),
    pytest.param({"slots": 3, "seeded": True}, id="three-seeded"),
]


def write(path: Path, count: int, *, slots: int = 1, seeded: bool = False, seal: bool = True, **changes: Any) -> bytes:
    """A journal of ``count`` steps, as a writer makes it."""
    head = header(slots=slots, seed=None if seeded else 7, **changes)
    with Writer.create(path, head) as writer:
        for record in records(count, slots=slots, seeded=seeded):
            writer.append(record)
        if seal:
            writer.seal(TENSORS)
    return path.read_bytes()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seal", [True, False])
@pytest.mark.parametrize("count", [0, 1, 20])
def test_a_reader_made_from_the_specification_reads_what_is_written(
    tmp_path: Path, layout: dict[str, Any], seal: bool, count: int
) -> None:
    data = write(tmp_path / "j", count, seal=seal, **layout)
    head, found, end = oracle.read(data)
    ours = read(tmp_path / "j")
    assert found == bits(records(count, **layout))
    assert bits(ours) == bits(records(count, **layout))
    assert head["epsilon"] == [0.1 + 0.2]
    assert head["tensors"] == [["a.scales", "float32", [3, 2]], ["b.scales", "float32", [4]]]
    assert ours.header == header(slots=layout["slots"], seed=None if layout["seeded"] else 7)
    assert ours.cut is None
    assert ours.sealed is (end is not None) is seal
    if end is not None:
        assert end == {"count": count, "chain": ours.chain, "tensors": TENSORS, "expected": ours.chain}
    assert ours.label == f"step {count}, {'finished' if seal else 'unfinished'}"


@pytest.mark.parametrize(
    ("seed", "slots", "known"),
    [
        (None, (Slot(2.5, 1.0, clipped=True),), "49d5ed4b512426caf16f598738e47caeeff86da57860430b09cda86b94a12e64"),
        (
            7,
            (Slot(-0.1, -0.1), Slot(float("inf"), 0.0, skipped=True)),
            "14d31f1319d57271cae95a119532f15dbcd28e9b2f266db4a1723c7aa192ebcd",
        ),
    ],
    ids=["seeded", "two"],
)
def test_the_format_has_not_changed(tmp_path: Path, seed: int | None, slots: tuple[Slot, ...], known: str) -> None:
    """Journals that exist must stay readable: another digest here needs another format name, and a reader of both."""
    with Writer.create(tmp_path / "j", header(seed=seed, slots=len(slots))) as writer:
        writer.append(Record(1, 1e-3, slots, 1 << 63 if seed is None else None))
        writer.append(Record(2, 5e-4, slots, 0 if seed is None else None))
        writer.seal(TENSORS)
    assert hashlib.sha256((tmp_path / "j").read_bytes()).hexdigest() == known


def test_twenty_thousand_steps_take_less_than_a_megabyte(tmp_path: Path) -> None:
    names = [f"model.layers.{block}.self_attn.q_proj_{one}.scales" for block in range(30) for one in range(7)]
    head = header(tensors=tuple(TensorEntry(name, "float32", (1536, 24)) for name in names))
    assert Layout(slots=1, seeded=False).size == 37
    Writer.create(tmp_path / "j", head, first=records(20_000)).close()
    size = (tmp_path / "j").stat().st_size
    assert size == len(head.encode()) + 20_000 * 37
    assert size < 760_000


def test_the_page_names_every_field_of_the_header() -> None:
    page = (ROOT / "docs" / "journal.md").read_text(encoding="utf-8")
    rows = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `") and "`n`" not in line]
    written = json.loads(header().encode()[12:-32])
    assert sorted(name for name in rows if name.isidentifier()) == sorted(written)


def test_a_header_comes_back_as_it_was() -> None:
    made = header(
        seed=None,
        slots=4096,
        epsilon=(1, 5e-324),
        quantiser={"scheme": "nf4", "nested": {"list": (1, 2.5, None)}},
        about={"model": "größe"},
        parent=Parent(7, "e" * 64),
    )
    found, size = decode(made.encode() + b"more")
    assert found == made
    assert found.parent == Parent(7, "e" * 64)
    assert found.quantiser == {"scheme": "nf4", "nested": {"list": [1, 2.5, None]}}
    assert found.tensors[0] == TensorEntry("a.scales", "float32", (3, 2))
    assert size == len(made.encode())


def _file(content: dict[str, Any], **style: Any) -> bytes:
    """A journal with a header that somebody else wrote."""
    text = json.dumps(content, **style).encode()
    start = MAGIC + len(text).to_bytes(4, "little") + text
    return start + hashlib.sha256(start).digest()


def test_a_header_that_another_program_wrote_is_read_and_forked_from(tmp_path: Path) -> None:
    content = json.loads(header().encode()[12:-32])
    data = _file(dict(reversed(content.items())), indent=1)
    assert data != header().encode()
    journal = scan(data)
    assert journal.header == header()
    assert journal.root == journal.chain == journal.chain_at(0) == data[-32:]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "gradhelm-journal/2"}, "this version reads"),
        ({"format": None}, "this version reads"),
        ({"more": 1}, "its keys differ"),
        ({"slots": 0}, "slots"),
        ({"slots": 1 << 40}, "slots"),
        ({"slots": True}, "slots"),
        ({"seed": 1 << 64}, "seed"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"base": ""}, "base"),
        ({"base": 3}, "base"),
        ({"initial": "0" * 63}, "initial"),
        ({"initial": "G" * 64}, "initial"),
        ({"quantiser": []}, "quantiser"),
        ({"tensors": []}, "tensors"),
        ({"tensors": [["a", "float32", [1]], ["a", "float32", [1]]]}, "each once"),
        ({"tensors": [["a", "int8", [1]]]}, "dtype"),
        ({"tensors": [["a", "float32", [-1]]]}, "shape"),
        ({"tensors": [["a", "float32"]]}, "format"),
        ({"tensors": 3}, "format"),
        ({"epsilon": []}, "epsilon"),
        ({"epsilon": [1.0, 1.0, 1.0]}, "epsilon"),
        ({"epsilon": [0.0]}, "epsilon"),
        ({"epsilon": ["1"]}, "epsilon"),
        ({"parent": [1]}, "format"),
        ({"parent": [-1, "0" * 64]}, "parent"),
        ({"parent": [1, "0"]}, "parent"),
    ],
    ids=str,
)
def test_a_header_that_makes_no_sense_is_refused(change: dict[str, Any], said: str) -> None:
    content = json.loads(header().encode()[12:-32])
    assert scan(_file(content)).header == header()
    with pytest.raises(ValueError, match=said):
        scan(_file(content | change))


@pytest.mark.parametrize(
    "data",
    [b"", MAGIC[:5], MAGIC, MAGIC + b"\0\0", MAGIC + b"\xff\xff\xff\xff", b"PK\3\4" + bytes(100), MAGIC + bytes(40)],
)
def test_what_is_no_journal_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="journal"):
        scan(data)


@pytest.mark.parametrize("text", [b"[" * 100_000, b"[]", b"3", b"{}", b"\xff\xfe", b'{"format":{}}'])
def test_a_header_that_is_no_object_of_ours_is_refused(text: bytes) -> None:
    start = MAGIC + len(text).to_bytes(4, "little") + text
    with pytest.raises(ValueError, match="journal's header"):
        scan(start + hashlib.sha256(start).digest())


def test_a_text_longer_than_the_limit_is_not_written() -> None:
    with pytest.raises(ValueError, match="bytes, more than"):
        header(about={"x": "y" * MAX_BYTES}).encode()


@pytest.mark.parametrize("name", ["quantiser", "estimator", "about"])
def test_what_json_cannot_hold_is_refused(name: str) -> None:
    for value in (float("nan"), object()):
        with pytest.raises(ValueError, match=f"{name} is not JSON"):
            header(**{name: {"x": value}})


LAYOUT = Layout(slots=1, seeded=False)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (Record(0, 1.0, (Slot(1.0, 1.0),)), "not 0"),
        (Record(0xFFFFFFFF, 1.0, (Slot(1.0, 1.0),)), "not 4294967295"),
        (Record(1, float("nan"), (Slot(1.0, 1.0),)), "learning rate"),
        (Record(1, 1.0, ()), "0 derivatives"),
        (Record(1, 1.0, (Slot(1.0, 1.0),) * 2), "2 derivatives"),
        (Record(1, 1.0, (Slot(1.0, 1.0, skipped=True),)), "is skipped"),
        (Record(1, 1.0, (Slot(1.0, 0.0, clipped=True, skipped=True),)), "is skipped"),
        (Record(1, 1.0, (Slot(1.0, 1.0),), 1), "either the header"),
    ],
)
def test_numbers_that_mean_nothing_are_not_written(record: Record, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LAYOUT.pack(record)


def test_seeds_have_their_range_and_their_place() -> None:
    seeded = Layout(slots=1, seeded=True)
    for seed, said in ((None, "either"), (1 << 64, "not in"), (-1, "not in")):
        with pytest.raises(ValueError, match=said):
            seeded.pack(Record(1, 1.0, (Slot(1.0, 1.0),), seed))
    top = Record(1, 1.0, (Slot(1.0, 1.0),), (1 << 64) - 1)
    assert seeded.unpack(seeded.pack(top)) == top


def test_the_highest_step_and_every_flag_come_back() -> None:
    for slot in (Slot(2.0, 1.0, clipped=True), Slot(2.0, 0.0, skipped=True), Slot(2.0, 2.0)):
        record = Record(0xFFFFFFFE, 1.0, (slot,))
        assert LAYOUT.unpack(LAYOUT.pack(record)) == record


def test_reading_and_writing_need_no_torch() -> None:
    code = "import sys, trainers.journal; print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
