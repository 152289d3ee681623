"""The log's absolute offsets survive rotation, quota, restart and a full disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.jobs import logs
from service.jobs.logs import LogWriter


def read_all(directory: Path, offset: int = 0, limit: int = 1000) -> tuple[int, bytes]:
    data, first = b"", None
    while piece := logs.read(directory, offset, limit).data:
        first = logs.read(directory, offset, limit).offset if first is None else first
        data += piece
        offset = logs.read(directory, offset, limit).next
    return first or 0, data


@settings(max_examples=50, deadline=None)
@given(chunks=st.lists(st.binary(max_size=9000), max_size=30), reopen=st.integers(0, 30), limit=st.integers(100, 5000))
def test_what_is_read_is_the_tail_of_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, chunks: list[bytes], reopen: int, limit: int
) -> None:
    directory = tmp_path_factory.mktemp("log")
    writer = LogWriter(directory, quota=40_000)
    for index, chunk in enumerate(chunks):
        if index == reopen:
            writer.close()
            writer = LogWriter(directory, quota=40_000)
        writer.write(chunk)
    writer.close()
    written = b"".join(chunks)
    first, end = logs.span(directory)
    assert end == len(written)
    assert end - first <= 40_000
    assert end - first >= min(len(written), 40_000 - 2 * 5000)
    offset, data = read_all(directory, limit=limit)
    assert data == written[first:]
    assert offset == first or not data


def test_offsets_stay_when_the_file_changes(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path, quota=1 << 20)
    writer.write(b"a" * 131_072 + b"NEXT")
    assert len(logs.segments(tmp_path)) == 2
    assert logs.read(tmp_path, 131_070, 6).data == b"aaNEXT"
    assert logs.read(tmp_path, 131_076).data == b""
    writer.write(b"!")
    assert logs.read(tmp_path, 131_076).data == b"!"
    writer.close()


def test_bytes_that_are_gone_are_skipped_visibly(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path, quota=40_000)
    writer.write(b"x" * 100_000)
    writer.close()
    piece = logs.read(tmp_path, 5, 10)
    assert piece.offset == logs.span(tmp_path)[0] > 60_000 - 5000
    assert piece.end == 100_000


def test_nothing_yet(tmp_path: Path) -> None:
    assert logs.span(tmp_path / "none") == (0, 0)
    piece = logs.read(tmp_path, 0)
    assert (piece.data, piece.end, piece.next) == (b"", 0, 0)


def test_a_full_disk_is_counted_and_told_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = LogWriter(tmp_path)
    writer.write(b"before\n")
    real = os.write

    def full(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    writer.write(b"lost 1\n")
    writer.write(b"lost 2\n")
    monkeypatch.setattr(os, "write", real)
    assert writer.lost == 14
    writer.write(b"after\n")
    writer.close()
    text = logs.read(tmp_path).data
    assert text.startswith(b"before\n") and text.endswith(b"after\n")
    assert b"[14 bytes of output were lost: the disk was full]" in text
