"""Forks share their beginning bit for bit; a comparison finds where two journals part."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.unit.trainers.journal.helpers import TENSORS, bits, header, record, records
from trainers.journal import Journal, Parent, Record, Writer, difference, fork, read


def make(path: Path, steps: list[Record], *, seal: bytes | None = None, **changes: Any) -> Journal:
    with Writer.create(path, header(**changes), first=steps) as writer:
        if seal is not None:
            writer.seal(seal)
    return read(path)


@pytest.mark.parametrize("step", [0, 1, 6, 10])
def test_a_fork_has_the_first_steps_and_names_where_they_come_from(tmp_path: Path, step: int) -> None:
    whole = make(tmp_path / "whole", records(10), seal=TENSORS)
    before = (tmp_path / "whole").read_bytes()
    with fork(whole, tmp_path / "fork", step, about={"why": "another rate"}) as writer:
        assert writer.step == step
        writer.append(record(step + 1)._replace(lr=0.25))
    found = read(tmp_path / "fork")
    assert bits(list(found)[:step]) == bits(records(step))
    assert (len(found), found.record(step + 1).lr, found.sealed) == (step + 1, 0.25, False)
    assert found.header.about == {"why": "another rate"}
    assert found.header.parent == Parent(step, make(tmp_path / "half", records(step)).chain.hex())
    assert (tmp_path / "whole").read_bytes() == before
    apart = difference(whole, found)
    assert (apart.header, apart.step, apart.right) == ((), step + 1, found.record(step + 1))
    assert bits([apart.left]) == bits([record(step + 1)]) if step < 10 else apart.left is None


def test_a_fork_of_a_fork_names_the_fork(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", records(10))
    fork(whole, tmp_path / "one", 8).close()
    one = read(tmp_path / "one")
    fork(one, tmp_path / "two", 5).close()
    assert read(tmp_path / "two").header.parent == Parent(5, one.chain_at(5).hex())
    assert one.chain_at(8) == one.chain
    assert one.chain_at(5) != whole.chain_at(5)


def test_what_cannot_be_forked_leaves_no_file(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", records(3))
    for step in (-1, 4):
        with pytest.raises(ValueError, match=f"cannot be forked at step {step}"):
            fork(whole, tmp_path / "fork", step)
    for change in ({"seed": 1}, {"epsilon": (1.0,)}, {"estimator": {}}, {"base": "other"}, {"parent": None}):
        with pytest.raises(ValueError, match=f"a fork cannot change {next(iter(change))}"):
            fork(whole, tmp_path / "fork", 1, **change)
    with pytest.raises(ValueError, match="exists already"):
        fork(whole, tmp_path / "whole", 1)
    assert os.listdir(tmp_path) == ["whole"]
    assert len(read(tmp_path / "whole")) == 3


def test_journals_of_the_same_run_are_equal(tmp_path: Path) -> None:
    one = make(tmp_path / "one", records(5), seal=TENSORS)
    two = make(tmp_path / "two", records(5), seal=TENSORS, about={"on": "another machine"})
    assert difference(one, two).equal
    assert difference(one, one).equal


def test_seals_headers_lengths_and_bits_all_make_a_difference(tmp_path: Path) -> None:
    one = make(tmp_path / "one", records(5), seal=TENSORS)
    unsealed = difference(one, make(tmp_path / "2", records(5)))
    assert (unsealed.equal, unsealed.sealed, unsealed.step) == (False, True, None)
    resealed = difference(one, make(tmp_path / "3", records(5), seal=bytes(32)))
    assert (resealed.equal, resealed.sealed) == (False, True)
    other = difference(one, make(tmp_path / "4", records(5), seal=TENSORS, kernels="int8", seed=3))
    assert (other.equal, other.header, other.step) == (False, ("kernels", "seed"), None)
    longer = difference(make(tmp_path / "5", records(4)), one)
    assert (longer.step, longer.left, bits([longer.right])) == (5, None, bits([record(5)]))
    steps = records(5)
    slot = steps[2].slots[0]
    steps[2] = steps[2]._replace(slots=(slot._replace(d_raw=0.0),))
    minus = list(steps)
    minus[2] = minus[2]._replace(slots=(slot._replace(d_raw=-0.0),))
    zeros = difference(make(tmp_path / "6", steps), make(tmp_path / "7", minus))
    assert zeros.step == 3, "compared bit for bit: equal numbers may have other bits"


def test_journals_of_other_layouts_part_at_once(tmp_path: Path) -> None:
    one = make(tmp_path / "one", records(2))
    two = make(tmp_path / "two", records(2, slots=2), slots=2)
    found = difference(one, two)
    assert (found.step, found.header) == (1, ("slots",))
    assert found.right == two.record(1)
