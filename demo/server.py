"""A server of the demo's own: started on a free port, found again and ended after a demo that was interrupted."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

START_SECONDS = 60.0
STOP_SECONDS = 30.0


@dataclass
class Server:
    """A running ``gradhelm serve``: its address, admin key and process."""

    home: Path
    process: subprocess.Popen[str]
    url: str
    key: str

    @classmethod
    def start(cls, home: Path) -> Server:
        """Start ``gradhelm serve --port 0`` on ``home`` and wait until it is ready."""
        log = (home / "server.log").open("a", encoding="utf-8")
        begin = log.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "service.cli", "serve", "--port", "0", "--home", str(home)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,  # Ctrl-C reaches the demo alone, which then ends the server in order
        )
        log.close()
        (home / "demo.json").write_text(
            json.dumps({"pid": process.pid, "created": psutil.Process(process.pid).create_time()}), encoding="utf-8"
        )
        assert process.stdout is not None
        url = None
        for line in process.stdout:
            if found := re.search(r"https?://\S+:\d+", line):
                url = found.group()
                break
        if url is None:
            process.stdout.close()
            process.wait()
            said = last_words(home / "server.log", begin)
            beside = " Beside another server: GRADHELM_DEMO_HOME=FOLDER make demo." if "in use" in said else ""
            raise SystemExit(f"The server did not start: {said}{beside}")
        # In a session of its own, so that Ctrl-C does not end it before the server has said its last words.
        # The server's log goes on to stdout: let it run into the file instead of a pipe that fills up.
        drain = subprocess.Popen(
            ["cat"], stdin=process.stdout, stdout=(home / "server.log").open("a"), start_new_session=True
        )
        process.stdout.close()
        server = cls(home, process, url, "")
        server.wait_ready(begin)
        server.key = (home / "admin.key").read_text(encoding="utf-8").strip()
        del drain
        return server

    def wait_ready(self, begin: int) -> None:
        """Poll ``/readyz`` until it answers 200; ``begin`` is where its part of the log begins."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise SystemExit(f"The server ended at its start: {last_words(self.home / 'server.log', begin)}")
            try:
                if httpx.get(f"{self.url}/readyz", timeout=2).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise SystemExit(f"The server was not ready within {START_SECONDS:.0f} s; see {self.home / 'server.log'}.")

    def kill(self) -> None:
        """End the server the hard way (SIGKILL), as a crash would."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """End the server in order (SIGTERM), then by force if it does not answer."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()


def last_words(log: Path, begin: int) -> str:
    """What a server that did not start said last, without its routine lines and tracebacks, and where all of it is.

    Args:
        log: the server's log.
        begin: byte at which this server's part begins.
    """
    with log.open("rb") as file:
        file.seek(begin)
        lines = [line.rstrip() for line in file.read().decode("utf-8", "replace").splitlines()]
    said: list[str] = []
    for line in reversed(lines):
        if len(said) == 3 or line.startswith("Traceback"):
            break
        if line and not line.startswith((" ", "{", "usage:")):
            said.insert(0, line)
    return "\n".join([*said, f"(all of it: {log})"]) if said else f"it said nothing, see {log}"


@contextmanager
def alone(home: Path) -> Iterator[None]:
    """Hold the data folder's ``demo.lock`` as long as the demo lives, however it ends: two would kill each other.

    Raises:
        SystemExit: another demo holds it; the message names its process.
    """
    home.mkdir(parents=True, exist_ok=True)
    with (home / "demo.lock").open("a+", encoding="utf-8") as lock:  # no child inherits it: it ends with this process
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise SystemExit(
                f"A demo is running on {home} already: process {lock.read().strip() or 'unknown'}. Wait for it, stop "
                "it with Ctrl-C, or run this one elsewhere: GRADHELM_DEMO_HOME=FOLDER make demo"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def end_leftover(home: Path) -> None:
    """End the server of an earlier demo that was interrupted, if it still runs. Only under ``alone``: no demo lives."""
    try:
        record = json.loads((home / "demo.json").read_text(encoding="utf-8"))
        process = psutil.Process(record["pid"])
        if abs(process.create_time() - record["created"]) < 1:
            process.terminate()
            process.wait(STOP_SECONDS)
    except (OSError, ValueError, KeyError, psutil.NoSuchProcess):
        return


def processes_of(home: Path) -> list[psutil.Process]:
    """Every process whose environment or command line names this data folder, apart from this one and its parents."""
    mine = {os.getpid(), *(p.pid for p in psutil.Process().parents())}
    return [p for p in psutil.process_iter() if p.pid not in mine and str(home) in _names(p)]


def _names(process: psutil.Process) -> str:
    try:
        return " ".join([*process.cmdline(), process.environ().get("GRADHELM_HOME", "")])
    except (psutil.Error, OSError):
        return ""


@contextmanager
def running(home: Path) -> Iterator[Server]:
    """A server for the length of the block; it is ended however the block ends."""
    home.mkdir(parents=True, exist_ok=True)
    end_leftover(home)
    server = Server.start(home)
    try:
        yield server
    finally:
        server.stop()
