"""Folders that appear whole or not at all."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.models.lock import appearing, arriving, once

ROOT = Path(__file__).parents[4]

KILLED = """
import os, signal, sys
from pathlib import Path
from core.models.lock import once
with once(Path(sys.argv[1])) as fresh:
    (fresh / "config.json").write_text("half")
    print(fresh.name, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""

HOLDS = """
import sys
from pathlib import Path
from core.models.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
    Path(sys.argv[2]).write_text("written under the lock")
"""

WAITS = """
import sys
from pathlib import Path
from core.models.lock import locked
print("asking", flush=True)
with locked(Path(sys.argv[1])):
    print("got" if Path(sys.argv[2]).exists() else "too early")
"""


def test_a_folder_appears_at_the_end_and_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "x"
    for text in ("one", "two"):
        with appearing(target) as fresh:
            (fresh / "sub").mkdir()
            (fresh / "sub" / "file").write_text(text)
            assert not target.exists() or (target / "sub" / "file").read_text() == "one"
        assert (target / "sub" / "file").read_text() == text
        assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert target.stat().st_mode & 0o777 == 0o755


def test_after_an_error_the_old_one_is_untouched(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(OSError, match="disk full"), appearing(target) as fresh:
        (fresh / "new").write_text("new")
        raise OSError("disk full")
    assert [path.name for path in target.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_what_a_killed_process_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "model"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(target)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / done.stdout.strip() / "config.json").exists()
    assert not target.exists()
    with once(target) as fresh:
        assert fresh is not None
        (fresh / "config.json").write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.lock", "model"]
    with once(target) as fresh:
        assert fresh is None
    assert (target / "config.json").read_text() == "whole"


def test_what_is_kept_is_there_for_the_next_one_after_an_error(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with pytest.raises(OSError, match="line went dead"), once(target, keep=True) as fresh:
        assert fresh is not None
        (fresh / "first").write_text("arrived")
        assert arriving(target) == len("arrived")
        raise OSError("line went dead")
    assert not target.exists()
    with once(target, keep=True) as fresh:
        assert fresh is not None and (fresh / "first").read_text() == "arrived"
        (fresh / "config.json").write_text("whole")
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "first"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.lock", "model"]
    assert arriving(target) == 0


def test_what_another_one_makes_beside_it_is_left_alone(tmp_path: Path) -> None:
    """``m@v1`` begins while ``m@v1.0`` is on its way."""
    with once(tmp_path / "m@v1.0") as longer:
        assert longer is not None
        (longer / "config.json").write_text("longer")
        with once(tmp_path / "m@v1") as shorter:
            assert shorter is not None
            (shorter / "config.json").write_text("shorter")
        assert (longer / "config.json").read_text() == "longer"
    assert (tmp_path / "m@v1.0" / "config.json").read_text() == "longer"
    assert (tmp_path / "m@v1" / "config.json").read_text() == "shorter"


def start(script: str, *arguments: Path) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    lock, written = tmp_path / "lock", tmp_path / "written"
    with start(HOLDS, lock, written) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with start(WAITS, lock, written) as waiter:
            assert waiter.stdout is not None and waiter.stdout.readline() == "asking\n"
            time.sleep(0.3)
            assert waiter.poll() is None
            holder.communicate("go\n", timeout=60)
            assert waiter.communicate(timeout=60)[0] == "got\n"
