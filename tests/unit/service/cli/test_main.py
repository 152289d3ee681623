"""The command as a whole: exit codes, and what its process does not load."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from tests.unit.service.cli.conftest import Run, Script

LOADED = """
import sys
import service.cli, service.cli.checks, core.models.catalog
heavy = {"torch", "transformers", "peft", "accelerate", "numpy", "fastapi", "uvicorn"} & set(sys.modules)
assert not heavy, heavy
"""


def test_nothing_heavy_is_imported() -> None:
    subprocess.run([sys.executable, "-c", LOADED], check=True, timeout=60)


def test_wrong_usage_is_2(run: Run) -> None:
    for arguments in (["nope"], ["jobs", "get"], ["files", "list", "--limit", "0"], ["jobs", "create", "--nope"]):
        assert run(*arguments).code == 2
    assert run("jobs", "create", "--model", "m", "--file", "file-1", "--set", "rank").code == 2


def test_help_is_0_and_names_the_exit_codes(run: Run) -> None:
    result = run("--help")
    assert result.code == 0
    assert "130" in result.out
    for group in ("serve", "doctor", "models", "files", "jobs", "vectors", "chat", "keys"):
        assert group in result.out


def test_a_file_that_is_not_there_is_wrong_usage(run: Run, script: Script, tmp_path: Path) -> None:
    result = run("files", "upload", tmp_path / "missing.jsonl", "--url", script.url)
    assert result.code == 2
    assert "missing.jsonl" in result.err
    assert script.asked == []


def test_ctrl_c_is_130_without_a_traceback(script: Script, tmp_path: Path) -> None:
    environment = os.environ | {"GRADHELM_HOME": str(tmp_path)}
    argv = [sys.executable, "-m", "service.cli", "jobs", "follow", "ftjob-1", "--url", "http://127.0.0.1:9"]
    # A shell ignores Ctrl-C for what it starts in the background, and processes inherit that: as in the foreground.
    listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=listening)
    assert process.stderr is not None
    assert "Trying again" in process.stderr.readline()
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert "the job goes on" in rest and "gradhelm jobs cancel ftjob-1" in rest


def test_the_version_and_the_short_help(run: Run) -> None:
    told = run("--version")
    assert told.code == 0 and re.fullmatch(r"gradhelm \d\S*\n", told.out)
    for arguments in (["-h"], ["jobs", "-h"], ["jobs", "create", "-h"]):
        result = run(*arguments)
        assert result.code == 0 and "Usage" in result.out


def test_a_closed_pipe_is_quiet(tmp_path: Path) -> None:
    environment = os.environ | {"GRADHELM_HOME": str(tmp_path)}
    shell = f"{sys.executable} -m service.cli --help | head -c 1"
    done = subprocess.run(
        ["bash", "-c", shell], capture_output=True, text=True, env=environment, timeout=60, check=True
    )
    assert "Traceback" not in done.stderr
