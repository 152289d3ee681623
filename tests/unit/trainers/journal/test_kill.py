"""A writing process is killed again and again: no step that it spoke of is lost, and none is there twice or changed."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.unit.trainers.journal.helpers import TENSORS, bits, header, records
from trainers.journal import Writer, read

ROOT = Path(__file__).parents[4]
KILLS, LAST = 20, 100_000


def _start(path: Path, last: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.unit.trainers.journal.kill_worker", str(path), str(last)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)


def test_twenty_kills_at_random_points(tmp_path: Path) -> None:
    draw = random.Random(3)
    path = tmp_path / "run.journal"
    said = 0
    for _ in range(KILLS):
        with _start(path, LAST) as process:
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
        assert bits(journal) == bits(records(len(journal)))
        assert not journal.sealed
    last = len(read(path)) + 10
    with _start(path, last) as process:
        process.communicate(timeout=60)
    assert process.returncode == 0
    with Writer.create(tmp_path / "straight", header(), first=records(last)) as writer:
        writer.seal(TENSORS)
    assert path.read_bytes() == (tmp_path / "straight").read_bytes()
