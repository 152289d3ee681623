"""events.jsonl: nothing lost, nothing doubled, nothing half-read."""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core import events
from core.events import EventLog, read


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """A real failing write: the kernel refuses to let any file grow beyond `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def read_all(path: Path) -> list[dict[str, Any]]:
    found, offset = [], 0
    while True:
        some, after = read(path, offset)
        found += some
        if after == offset:
            return found
        offset = after


def test_what_is_emitted_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "events.jsonl"
    with EventLog(path) as log:
        first = log.emit("metric", step=1, train_loss=0.5)
        second = log.emit("artifact", artifact="checkpoint", path=Path("/a/b"), step=1, layers=(1, 2))
    got, offset = read(path)
    assert got == [first, second]
    assert [event["seq"] for event in got] == [1, 2]
    assert got[0]["kind"] == "metric" and got[0]["train_loss"] == 0.5
    assert got[1]["path"] == "/a/b" and got[1]["layers"] == [1, 2]
    assert offset == path.stat().st_size
    assert read(path, offset) == ([], offset)


def test_a_missing_file_reads_as_empty(tmp_path: Path) -> None:
    assert read(tmp_path / "none.jsonl", 0) == ([], 0)


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    with EventLog(tmp_path / "e.jsonl") as log:
        log.emit("metric", step=1, train_loss=math.nan, grad_norm=math.inf, nested={"x": [-math.inf, 1.0]})
    line = (tmp_path / "e.jsonl").read_text()

    def refuse(text: str) -> Any:
        raise AssertionError(f"{text} is not strict JSON")

    event = json.loads(line, parse_constant=refuse)
    assert event["train_loss"] is None and event["grad_norm"] is None and event["nested"] == {"x": [None, 1.0]}


def test_text_cannot_break_lines(tmp_path: Path) -> None:
    text = 'a\nb\r\u2028\u0085"\\\x00 \ud800'
    with EventLog(tmp_path / "e.jsonl") as log:
        log.emit("message", level="info", message=text)
        log.emit("heartbeat")
    assert (tmp_path / "e.jsonl").read_bytes().count(b"\n") == 2
    assert read(tmp_path / "e.jsonl")[0][0]["message"] == text


@pytest.mark.parametrize(
    ("kind", "data", "says"),
    [
        ("metrics", {}, "unknown event kind 'metrics'.*metric"),
        ("metric", {"seq": 3}, "seq"),
        ("metric", {"time": 3}, "time"),
        ("message", {"message": {"a": object()}}, "message.a is a object"),
        ("message", {"message": b"x"}, "message is a bytes"),
        ("message", {"message": "x" * events.MAX_LINE_BYTES}, "over the limit"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path: Path, kind: str, data: dict[str, Any], says: str) -> None:
    with EventLog(tmp_path / "e.jsonl") as log:
        with pytest.raises(ValueError, match=says):
            log.emit(kind, **data)
        assert log.emit("heartbeat")["seq"] == 1
    assert len(read(tmp_path / "e.jsonl")[0]) == 1


def test_reopening_counts_on(tmp_path: Path) -> None:
    for expected in (1, 2, 3):
        with EventLog(tmp_path / "e.jsonl") as log:
            assert log.emit("heartbeat")["seq"] == expected


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cut=st.integers(min_value=0), sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=8))
def test_a_cut_anywhere_loses_at_most_the_line_it_hits(
    tmp_path_factory: pytest.TempPathFactory, cut: int, sizes: list[int]
) -> None:
    path = tmp_path_factory.mktemp("cut") / "e.jsonl"
    with EventLog(path) as log:
        for size in sizes:
            log.emit("message", level="info", message="x" * size)
    raw = path.read_bytes()
    cut %= len(raw) + 1
    path.write_bytes(raw[:cut])
    whole = raw[:cut].count(b"\n")

    before, offset = read(path)
    assert len(before) == whole and offset == raw[:cut].rfind(b"\n") + 1
    with EventLog(path) as log:
        assert log.emit("heartbeat")["seq"] == whole + 1
    # A reader that had stopped at the half line goes on without noticing.
    assert [event["kind"] for event in read(path, offset)[0]] == ["heartbeat"]
    assert [event["seq"] for event in read_all(path)] == list(range(1, whole + 2))


@pytest.mark.parametrize("tail", [b"\x00" * 5000, b"\x00" * 300_000, b"\x00" * 100 + b"\n", b"[1]\nnot json\n{}\n"])
def test_garbage_at_the_end_does_not_reset_the_count(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "e.jsonl"
    with EventLog(path) as log:
        for _ in range(3):
            log.emit("heartbeat")
    with open(path, "ab") as file:
        file.write(tail)
    with EventLog(path) as log:
        assert log.emit("message", level="info", message="on")["seq"] == 4
    assert [event["seq"] for event in read_all(path)] == [1, 2, 3, 4]


def test_a_file_of_nothing_but_half_a_line_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    path.write_bytes(b'{"seq": 1, "kind"')
    with EventLog(path) as log:
        assert log.emit("heartbeat")["seq"] == 1
    assert len(read_all(path)) == 1


def test_a_hostile_line_costs_no_memory_and_is_stepped_over(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    path.write_bytes(b"x" * (events.READ_BYTES + 100) + b"\n" + b"[" * 50_000 + b"\n")
    with EventLog(path) as log:
        log.emit("heartbeat")
    got, offset = read(path)
    assert got == [] and offset == events.READ_BYTES
    assert [event["kind"] for event in read_all(path)] == ["heartbeat"]


def test_threads_share_a_log(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    with EventLog(path) as log:
        threads = [threading.Thread(target=lambda: [log.emit("heartbeat") for _ in range(200)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [event["seq"] for event in read_all(path)] == list(range(1, 801))


def test_a_full_disk_leaves_whole_lines_and_the_log_recovers(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    with EventLog(path) as log:
        log.emit("heartbeat")
        size = path.stat().st_size
        with file_size_limit(size + 10), pytest.raises(OSError, match="too large"):
            log.emit("message", level="info", message="does not fit")
        assert path.stat().st_size == size
        assert log.emit("heartbeat")["seq"] == 2
    assert [event["seq"] for event in read_all(path)] == [1, 2]


def test_a_closed_log_says_so(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "e.jsonl")
    log.close()
    log.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        log.emit("heartbeat")


def test_a_killed_writer_leaves_whole_events(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    code = (
        "import sys; from pathlib import Path; from core.events import EventLog\n"
        "log = EventLog(Path(sys.argv[1])); print('ready', flush=True)\n"
        "while True: log.emit('message', level='info', message='x' * 500)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    try:
        child.stdout.readline()
        while not path.exists() or path.stat().st_size < 50_000:
            assert child.poll() is None
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    seen = [event["seq"] for event in read_all(path)]
    assert seen == list(range(1, len(seen) + 1)) and len(seen) > 50
    with EventLog(path) as log:
        assert log.emit("heartbeat")["seq"] in (len(seen), len(seen) + 1)


def test_the_module_does_not_import_torch() -> None:
    code = "import sys, core.events, core.config, core.home; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=os.environ).returncode == 0
