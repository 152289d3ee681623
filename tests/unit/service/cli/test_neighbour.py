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


@pytest.fixture(autouse=True)
def no_servers_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that other tests run in this process, which is the scripted server's too, hold locks of their own."""
    look, theirs = neighbour.served_by, neighbour.served_by(os.getpid())
    monkeypatch.setattr(neighbour, "served_by", lambda pid: [folder for folder in look(pid) if folder not in theirs])


@pytest.fixture
def held(home: Path) -> Iterator[int]:
    """The data folder's lock, held by this process, which is also the scripted server's."""
    lock = FolderLock(home)
    lock.acquire()
    yield os.getpid()
    lock.release()


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """Another data folder with a blank in its name, served by this process: the scripted server's."""
    folder = tmp_path / "the other"
    lock = FolderLock(folder)
    lock.acquire()
    yield folder
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


def test_the_doctor_knows_our_server(script: Script, held: int, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADHELM_PORT", str(port_of(script)))
    monkeypatch.setenv("GRADHELM_HOME", str(home))
    assert checks.port().level == "warn"
    script.on("GET /healthz", OURS)
    finding = checks.port()
    assert finding.level == "ok" and "Gradhelm server" in finding.found


KEY = Reply({"error": {"message": "A key.", "code": "invalid_api_key"}}, 401)


@pytest.mark.parametrize("key", [[], ["--key", "gh-made-in-the-wrong-folder"]])
def test_a_refused_key_names_the_folder_that_the_server_uses_instead_of_sending_to_make_keys_here(
    run: Run, script: Script, elsewhere: Path, home: Path, key: list[str]
) -> None:
    script.on("GET /healthz", OURS)
    script.on("GET /v1/files", KEY)
    result = run("files", "list", "--url", script.url, *key)
    assert result.code == 1
    assert f"{script.url} uses another data folder ({elsewhere}) than {home}" in result.err
    assert f"export GRADHELM_HOME='{elsewhere}'" in result.err and "--key" in result.err
    assert "keys create" not in result.err and not home.exists()


def test_a_refused_key_of_a_server_whose_folder_cannot_be_seen(
    run: Run, script: Script, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbour, "folder_behind", lambda _: None)
    script.on("GET /healthz", OURS)
    script.on("GET /v1/files", KEY)
    result = run("files", "list", "--url", script.url)
    assert f"uses another data folder than {home}" in result.err and "export GRADHELM_HOME=FOLDER" in result.err


def test_a_refused_key_of_this_folders_own_server_is_made_here(
    run: Run, script: Script, held: int, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.on("GET /healthz", OURS)
    script.on("GET /v1/files", KEY)
    assert neighbour.folder_behind(port_of(script)) == home
    assert "gradhelm keys create" in run("files", "list", "--url", script.url).err
    monkeypatch.setattr(neighbour, "folder_behind", lambda _: None)
    assert "gradhelm keys create" in run("files", "list", "--url", script.url).err, "the folder's lock tells it too"
    monkeypatch.setattr(neighbour, "listens", lambda _: [])
    assert "gradhelm keys create" in run("files", "list", "--url", script.url).err, "its holder is in a container"


def test_a_key_for_another_folder_than_the_servers_is_warned_of(
    run: Run, script: Script, elsewhere: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.on("GET /healthz", OURS)
    monkeypatch.setenv("GRADHELM_URL", script.url)
    made = run("keys", "create")
    assert made.code == 0 and f"made in {home / 'gradhelm.db'}" in made.err
    assert f"uses another data folder ({elsewhere}) than {home}" in made.err


def test_the_doctor_connects_a_server_and_its_folder(
    script: Script, elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADHELM_PORT", str(port_of(script)))
    monkeypatch.setenv("GRADHELM_HOME", str(tmp_path / "home"))
    script.on("GET /healthz", OURS)
    finding = checks.port()
    assert finding.level == "warn" and f"GRADHELM_HOME='{elsewhere}'" in finding.advice
    monkeypatch.setenv("GRADHELM_HOME", str(elsewhere))
    assert checks.port().level == "ok"
