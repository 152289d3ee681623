"""A writing process is killed again and again: no step that it spoke of is lost, and none is there twice or changed."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.trainers.journal.helpers import TENSORS, bits, header, records
from trainers.journal import Journal, Writer, read

ROOT = Path(__file__).parents[4]
KILLS, LAST = 20, 100_000


def _start(what: str, path: Path, last: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.unit.trainers.journal.kill_worker", what, str(path), str(last)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)


def _kill(what: str, path: Path, draw: random.Random) -> Journal:
    """Lets a worker go on for a while and kills it; checks what it left."""
    with _start(what, path, LAST) as process:
        assert process.stdout is not None
        for _ in range(draw.randrange(1, 30)):
            said = int(process.stdout.readline())
        time.sleep(draw.uniform(0, 0.004))
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().splitlines()
        said = int(rest[-1]) if rest else said
    assert process.returncode == -signal.SIGKILL
    journal = read(path)
    assert said <= len(journal) <= said + 1, "what was said is there, and beside it at most the step under way"
    assert not journal.sealed
    return journal


def _finish(what: str, path: Path, last: int) -> None:
    with _start(what, path, last) as process:
        process.communicate(timeout=60)
    assert process.returncode == 0


def test_twenty_kills_at_random_points(tmp_path: Path) -> None:
    draw = random.Random(3)
    path = tmp_path / "run.journal"
    for _ in range(KILLS):
        journal = _kill("write", path, draw)
        assert bits(journal) == bits(records(len(journal)))
    last = len(journal) + 10
    _finish("write", path, last)
    with Writer.create(tmp_path / "straight", header(), first=records(last)) as writer:
        writer.seal(TENSORS)
    assert path.read_bytes() == (tmp_path / "straight").read_bytes()


@pytest.mark.slow
def test_a_real_run_that_is_killed_twenty_times_is_one_that_never_stopped(tmp_path: Path) -> None:
    """Slow: every start imports torch, and takes all earlier steps again."""
    from tests.unit.trainers.journal.runs import Run, start
    from trainers.journal.replay import rebuild, replay
    from trainers.journal.tensors import digest

    draw = random.Random(4)
    path = tmp_path / "run.journal"
    for _ in range(KILLS):
        journal = _kill("tune", path, draw)
        tensors = start()
        replay(journal, rebuild(journal.header, tensors), tensors)
        straight = Run(tmp_path / f"straight-{len(journal)}").go(len(journal))
        assert digest(tensors) == straight.hashes[-1]
        straight.writer.close()
    last = len(journal) + 10
    _finish("tune", path, last)
    Run(tmp_path / "straight").go(last).seal()
    assert path.read_bytes() == (tmp_path / "straight").read_bytes()
