"""Writing: at the end alone, by one alone, on the disk when it says so, whole or not at all."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.unit.trainers.journal.helpers import TENSORS, bits, header, record, records
from trainers.journal import Writer, read


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.journal"


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """A real failing write: the kernel lets no file grow beyond ``limit`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_steps_come_one_after_the_other(path: Path) -> None:
    with Writer.create(path, header()) as writer:
        writer.append(record(1))
        for wrong in (1, 3, 0):
            with pytest.raises(ValueError, match=r"goes on with step 2, not"):
                writer.append(record(wrong))
        with pytest.raises(ValueError, match="derivatives"):
            writer.append(record(2, slots=2))
        writer.append(record(2))
        assert writer.step == 2
    assert bits(read(path)) == bits(records(2))


def test_a_record_is_in_the_file_when_append_returns(path: Path) -> None:
    with Writer.create(path, header(), sync_every=1000) as writer:
        for step in range(1, 6):
            writer.append(record(step))
            assert bits(read(path)) == bits(records(step))


def test_a_closed_writer_says_so(path: Path) -> None:
    writer = Writer.create(path, header())
    writer.append(record(1))
    writer.close()
    writer.close()
    for act in (lambda: writer.append(record(2)), writer.sync, lambda: writer.seal(TENSORS)):
        with pytest.raises(ValueError, match="is closed: reopen it"):
            act()
    assert writer.step == 1
    assert bits(read(path)) == bits(records(1))


def test_going_on_is_the_same_as_never_stopping(path: Path, tmp_path: Path) -> None:
    Writer.create(path, header(), first=records(3)).close()
    for step in range(4, 8):
        with Writer.reopen(path, header(about={"another": "machine"})) as writer:
            assert (writer.step, writer.cut) == (step - 1, None)
            writer.append(record(step))
    with Writer.create(tmp_path / "straight", header()) as writer:
        for one in records(7):
            writer.append(one)
    assert path.read_bytes() == (tmp_path / "straight").read_bytes()


@pytest.mark.parametrize(
    ("name", "value"),
    [("base", "sha256:" + "b" * 64), ("epsilon", (0.3,)), ("seed", 8), ("estimator", {}), ("kernels", "int8")],
)
def test_the_journal_of_another_run_is_not_gone_on_with(path: Path, name: str, value: Any) -> None:
    Writer.create(path, header(), first=records(2)).close()
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"with other {name}: give a fresh output_dir"):
        Writer.reopen(path, header(**{name: value}))
    assert path.read_bytes() == before


def test_a_sealed_journal_is_gone_on_with_only_when_asked(path: Path, tmp_path: Path) -> None:
    with Writer.create(path, header(), first=records(2)) as writer:
        writer.seal(TENSORS)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="is sealed"):
        Writer.reopen(path)
    assert path.read_bytes() == before
    with Writer.reopen(path, unseal=True) as writer:
        assert not read(path).sealed
        writer.append(record(3))
        writer.seal(TENSORS)
    with Writer.create(tmp_path / "straight", header(), first=records(3)) as writer:
        writer.seal(TENSORS)
    assert path.read_bytes() == (tmp_path / "straight").read_bytes()
    assert not list(path.parent.glob("*.cut-*")), "a seal that was taken off is no damage"


def test_a_damaged_header_is_refused_and_the_file_left_alone(path: Path) -> None:
    Writer.create(path, header(), first=records(2)).close()
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    for act in (read, Writer.reopen):
        with pytest.raises(ValueError, match=r"run\.journal: the journal's header is damaged"):
            act(path)
    assert path.read_bytes() == data


def test_one_writer_at_a_time(path: Path) -> None:
    writer = Writer.create(path, header())
    with pytest.raises(ValueError, match="is being written by another process"):
        Writer.reopen(path)
    code = "import sys, pathlib; from trainers.journal import Writer; Writer.reopen(pathlib.Path(sys.argv[1]))"
    root = Path(__file__).parents[4]
    command = [sys.executable, "-c", code, str(path)]
    refused = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=60)
    assert "is being written by another process" in refused.stderr
    writer.append(record(1))
    writer.close()
    assert subprocess.run(command, cwd=root, check=False, timeout=60).returncode == 0
    with Writer.reopen(path) as again:
        with pytest.raises(ValueError, match="is being written"):
            Writer.reopen(path)
        again.append(record(2))


def test_a_name_that_is_taken_is_left_alone(path: Path) -> None:
    path.write_text("somebody's")
    with pytest.raises(ValueError, match="exists already"):
        Writer.create(path, header())
    assert path.read_text() == "somebody's"
    assert os.listdir(path.parent) == [path.name]


def test_a_journal_appears_whole_or_not_at_all(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with file_size_limit(len(header().encode()) + 5 * 37 - 1), pytest.raises(OSError, match="too large"):
        Writer.create(path, header(), first=records(5))
    assert os.listdir(path.parent) == []

    def killed(source: Any, target: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", killed)
    with pytest.raises(KeyboardInterrupt):
        Writer.create(path, header(), first=records(5))
    assert os.listdir(path.parent) == []


def test_a_full_disk_leaves_the_last_whole_record_and_lets_go_on(path: Path) -> None:
    with Writer.create(path, header(), first=records(2)) as writer:
        whole = path.read_bytes()
        with file_size_limit(len(whole) + 36):
            for _ in range(2):
                with pytest.raises(OSError, match="too large"):
                    writer.append(record(3))
                assert path.read_bytes() == whole
            with pytest.raises(OSError, match="too large"):
                writer.seal(TENSORS)
            assert path.read_bytes() == whole
        assert writer.step == 2
        writer.append(record(3))
    assert bits(read(path)) == bits(records(3))


@pytest.mark.parametrize(("every", "lost"), [(1, 0), (3, 2)])
def test_syncs_bound_what_a_power_cut_takes(path: Path, monkeypatch: pytest.MonkeyPatch, every: int, lost: int) -> None:
    """What was in the file at the last sync is what a power cut leaves."""
    safe = 0

    def fsync(descriptor: int) -> None:
        nonlocal safe
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            safe = os.fstat(descriptor).st_size

    monkeypatch.setattr(os, "fsync", fsync)
    begin = len(header().encode())
    with Writer.create(path, header(), sync_every=every) as writer:
        for step in range(1, 11):
            writer.append(record(step))
            durable = (safe - begin) // 37
            assert step - lost <= durable <= step
            assert every == 1 or durable == step - step % every, "no sync without need"
    assert safe == path.stat().st_size, "closing syncs"
    with Writer.reopen(path, sync_every=every) as writer:
        writer.append(record(11))
        writer.sync()
        assert safe == path.stat().st_size
        writer.seal(TENSORS)
    assert safe == path.stat().st_size, "the seal is synced"


def test_a_new_journal_is_on_the_disk_with_its_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []

    def fsync(descriptor: int) -> None:
        found = os.fstat(descriptor)
        synced.append(("folder", path.exists()) if stat.S_ISDIR(found.st_mode) else ("file", found.st_size))

    monkeypatch.setattr(os, "fsync", fsync)
    Writer.create(path, header()).close()
    assert synced[:2] == [("file", len(header().encode())), ("folder", True)]


def test_after_a_failed_sync_only_a_reopened_journal_goes_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer.create(path, header())

    def broken(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(OSError, match="Input/output"):
            writer.append(record(1))
    with pytest.raises(ValueError, match="is closed"):
        writer.append(record(2))
    with Writer.reopen(path) as again:
        again.append(record(again.step + 1))
