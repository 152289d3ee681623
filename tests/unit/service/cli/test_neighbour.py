"""What stands in the way of `gradhelm serve`, told apart: our own server, another one of ours, another program."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.cli import checks, neighbour
from service.jobs.lock import FolderLock
from tests.unit.service.cli.conftest import Reply, Run, Script

OURS = Reply({"status": "ok", "service": "gradhelm"})
TAKEN = OSError(errno.EADDRINUSE, "Address already in use")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def held(home: Path) -> Iterator[int]:
    """The data folder's lock, held by this process, which is also the scripted server's."""
    lock = FolderLock(home)
    lock.acquire()
    yield os.getpid()
    lock.release()


def port_of(script: Script) -> int:
    return int(script.url.rpartition(":")[2])


@pytest.mark.parametrize(
    "reply",
    [
        Reply({"status": "ok"}),
        Reply({"service": "other"}),
        Reply(b"[]"),
        Reply(b"\xff"),
        Reply(b"{" * 100_000),
        Reply(b"<html>", status=404),
    ],
)
def test_another_program_is_not_ours(script: Script, reply: Reply) -> None:
    script.on("GET /healthz", reply)
    assert not neighbour.is_ours("127.0.0.1", port_of(script))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", ""])
def test_our_server_says_so_and_is_asked_on_the_loopback_under_a_name_that_it_takes(script: Script, host: str) -> None:
    script.on("GET /healthz", OURS)
    assert neighbour.is_ours(host, port_of(script))
    assert script.sent("GET /healthz")[0].headers["Host"] == f"127.0.0.1:{port_of(script)}"


def test_silence_and_a_free_port_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbour, "SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        number = silent.getsockname()[1]
        assert not neighbour.is_ours("127.0.0.1", number)
    assert not neighbour.is_ours("127.0.0.1", number)


def test_a_port_of_another_program(run: Run, script: Script) -> None:
    result = run("serve", "--port", port_of(script))
    assert result.code == 1
    assert "no Gradhelm server that answers" in result.err and "--port 0" in result.err


def test_a_port_of_a_server_of_another_folder(run: Run, script: Script, home: Path) -> None:
    script.on("GET /healthz", OURS)
    result = run("serve", "--port", port_of(script))
    assert result.code == 1
    assert f"another data folder than {home}" in result.err.replace("\n", " ")
    assert script.url in result.err and "--port 0" in result.err


def test_a_port_of_this_folders_own_server(run: Run, script: Script, held: int, home: Path) -> None:
    script.on("GET /healthz", OURS)
    result = run("serve", "--port", port_of(script))
    text = result.err.replace("\n", " ")
    assert result.code == 1
    assert f"{script.url} is this data folder's own server already: process {held} serves {home}" in text
    assert f"kill {held}" in text and "--home FOLDER" in text


def test_this_folders_server_on_another_port_does_not_make_this_port_its_own(
    script: Script, held: int, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.on("GET /healthz", OURS)
    monkeypatch.setattr(neighbour, "listens", lambda pid: [("127.0.0.1", 1)])
    assert "another data folder" in neighbour.about_port(TAKEN, "127.0.0.1", port_of(script), home)


def test_an_address_that_is_not_ours_to_take_is_not_asked(script: Script, home: Path) -> None:
    script.on("GET /healthz", OURS)
    away = OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
    message = neighbour.about_port(away, "192.0.2.1", port_of(script), home)
    assert "--host" in message and "not this machine's" in message
    assert script.asked == []


def test_a_folder_in_use_names_the_address_of_its_server(
    script: Script, held: int, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ("127.0.0.1", port_of(script)) in neighbour.listens(held)
    # This process may have servers of other tests, too.
    monkeypatch.setattr(neighbour, "listens", lambda pid: [("127.0.0.1", port_of(script))] if pid == held else [])
    assert "answers nowhere" in neighbour.about_folder(home, held)
    script.on("GET /healthz", OURS)
    message = neighbour.about_folder(home, held)
    assert f"process {held}, a Gradhelm server at {script.url}" in message
    assert f"--url {script.url}" in message and "--home FOLDER" in message
    assert "another process" in neighbour.about_folder(home, None)


def test_the_doctor_knows_our_server(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADHELM_PORT", str(port_of(script)))
    assert checks.port().level == "warn"
    script.on("GET /healthz", OURS)
    finding = checks.port()
    assert finding.level == "ok" and "Gradhelm server" in finding.found
