"""`gradhelm serve` as a process: the address, one server a folder, a quick and clean end, no torch."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from service.db.engine import connect, migrate
from tests.unit.service.cli.conftest import Run

SERVE = [sys.executable, "-m", "service.cli", "serve", "--port", "0"]


@contextmanager
def server(home: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running server and its address."""
    argv = [*SERVE, "--home", str(home), *options]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=dict(os.environ))
    try:
        assert process.stdout is not None
        seen = []
        for line in process.stdout:
            seen.append(line)
            if found := re.match(r"Gradhelm listens on (http://\S+)", line):
                break
        else:
            raise AssertionError("".join(seen))
        yield process, found[1]
    finally:
        process.kill()
        process.wait(timeout=20)
        assert process.stdout is not None
        process.stdout.close()


def test_the_whole_life_of_a_server(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    with server(home, "--allowed-host", "models.example") as (process, url):
        assert httpx.get(f"{url}/readyz").json() == {"status": "ready"}
        named = httpx.get(f"{url}/readyz", headers={"Host": "models.example"})
        foreign = httpx.get(f"{url}/readyz", headers={"Host": "evil.example"})
        assert (named.status_code, foreign.status_code) == (200, 403)
        assert (home / "admin.key").stat().st_mode & 0o777 == 0o600
        assert run("files", "list", "--json", "--url", url).json == [], "the admin key is found by itself"

        made = run("keys", "create", "--name", "reader", "--scope", "read", "--json").json
        assert run("files", "list", "--url", url, "--key", made["key"]).code == 0
        refused = run("files", "delete", "file-1", "--url", url, "--key", made["key"])
        assert "[insufficient_scope]" in refused.err
        assert run("keys", "revoke", made["id"]).code == 0
        assert run("files", "list", "--url", url, "--key", made["key"]).code == 1

        maps = Path(f"/proc/{process.pid}/maps").read_text()
        assert "libtorch" not in maps

        second = subprocess.run(
            [*SERVE, "--home", str(home)], capture_output=True, text=True, timeout=60, check=False, env=dict(os.environ)
        )
        assert second.returncode == 1
        text = second.stderr.replace("\n", " ")
        assert f"process {process.pid}, a Gradhelm server at {url}." in text and "--home FOLDER" in text
        again = subprocess.run(
            [*SERVE[:-1], url.rpartition(":")[2], "--home", str(home)],
            capture_output=True, text=True, timeout=60, check=False, env=dict(os.environ),
        )  # fmt: skip
        assert again.returncode == 1
        assert f"own server already: process {process.pid} serves" in again.stderr.replace("\n", " ")
        assert "Traceback" not in second.stdout + second.stderr

        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0
        log = (process.stdout.read() if process.stdout else "").splitlines()
        assert all(json.loads(line) for line in log), "the log is JSON lines"
        assert made["key"] not in "\n".join(log)


def test_a_taken_port_is_said_before_anything_is_loaded(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run("serve", "--port", taken.getsockname()[1])
    assert result.code == 1
    assert "--port 0" in result.err


def test_wrong_settings_are_wrong_usage(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("serve", "--config", tmp_path / "missing.yaml").code == 2
    file = tmp_path / "service.yaml"
    file.write_text("no_such_setting: 1\n")
    result = run("serve", "--config", file)
    assert result.code == 2
    assert "no_such_setting" in result.err
    file.write_text("prot: 1\n")
    assert "did you mean port?" in run("serve", "--config", file).err
    monkeypatch.setenv("GRADHELM_PORTT", "9000")
    for command in ("serve", "--port", "0"), ("keys", "list"):
        result = run(*command)
        assert result.code == 2 and "did you mean GRADHELM_PORT?" in result.err, command


def test_a_database_of_a_newer_version_is_told_in_one_line(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    engine = connect(home / "gradhelm.db")
    migrate(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    engine.dispose()
    ended = subprocess.run([*SERVE, "--home", str(home)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and "newer version of gradhelm (schema 9999" in ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
