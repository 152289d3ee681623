"""Who stands in the way of a start: on the port, or on the data folder; and what to do about it."""

from __future__ import annotations

import errno
import http.client
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import psutil

SECONDS = 1.0
"""Longest wait for an answer: what has the port may be anything."""
_ANSWER_BYTES = 1024
_ANYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - asked, not listened on


def is_ours(host: str, port: int) -> bool:
    """Whether a Gradhelm server answers at an address of this machine.

    Args:
        host: what is listened on there; a wildcard is asked on the loopback.
        port: its port.

    Returns:
        True only for an answer that says so; False for silence and for other programs.
    """
    connection = http.client.HTTPConnection(_ANYWHERE.get(host, host), port, timeout=SECONDS)
    try:
        # A Host that every server of ours takes, whatever it listens on.
        connection.request("GET", "/healthz", headers={"Host": f"127.0.0.1:{port}", "Connection": "close"})
        answer = json.loads(connection.getresponse().read(_ANSWER_BYTES))
    except (OSError, http.client.HTTPException, ValueError):
        return False
    finally:
        connection.close()
    return isinstance(answer, dict) and answer.get("service") == "gradhelm"


def url(host: str, port: int) -> str:
    """The address of a listening socket."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def holder(home: Path) -> int | None:
    """The process that holds a data folder's lock, read without trying the lock: that could get in a server's way.

    Args:
        home: the data folder.

    Returns:
        Its process id, or None when nobody holds it, or that cannot be seen.
    """
    lock = home / "server.lock"
    try:
        pid = json.loads(lock.read_text(encoding="utf-8"))["pid"]
        return pid if isinstance(pid, int) and _held(lock) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _held(path: Path) -> bool:
    inode = str(path.stat().st_ino)
    for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
        fields = line.split()
        if "FLOCK" in fields and any(field.rpartition(":")[2] == inode for field in fields if field.count(":") == 2):
            return True
    return False


def listens(pid: int) -> list[tuple[str, int]]:
    """Where a process listens, as (address, port); nothing if it is gone or another user's."""
    try:
        found = psutil.Process(pid).net_connections("tcp")
    except psutil.Error:
        return []
    return [(one.laddr.ip, one.laddr.port) for one in found if one.status == psutil.CONN_LISTEN]


def folder_behind(port: int) -> Path | None:
    """The data folder of the server that listens on a port of this machine, by the lock that it holds open.

    Nothing is asked of the server, which tells nobody where its data are; the system tells of this user's processes.

    Args:
        port: where it listens.

    Returns:
        The folder, or None when nothing of ours listens there, or that cannot be seen.
    """
    try:
        sockets = psutil.net_connections("tcp")
    except (psutil.Error, OSError):
        return None
    for pid in {one.pid for one in sockets if one.pid and _listening(one.status, one.laddr, port)}:
        for folder in served_by(pid):
            return folder
    return None


def served_by(pid: int) -> list[Path]:
    """Data folders whose lock a process holds open: one for a server, none for a process of another user."""
    try:
        opened = [Path(file.path) for file in psutil.Process(pid).open_files()]
    except (psutil.Error, OSError):
        return []
    return [path.parent for path in opened if path.name == "server.lock"]


def _listening(status: str, address: Sequence[str | int], port: int) -> bool:
    return status == psutil.CONN_LISTEN and address[1] == port


def other_folder(host: str, port: int, home: Path) -> str | None:
    """What to tell who works in one data folder and talks to the server of another.

    Args:
        host: loopback address of the server.
        port: its port.
        home: the data folder in which commands look for the key, and in which they make keys.

    Returns:
        Both folders, as far as they can be seen, and what to do; None when there is no Gradhelm server, when the folder
        is its own, and when that cannot be told (a server in a container).
    """
    if not is_ours(host, port):
        return None
    theirs = folder_behind(port)
    if theirs is None:
        pid = holder(home)
        places = [] if pid is None else listens(pid)
        if pid is not None and (not places or any(number == port for _, number in places)):
            return None
    elif theirs == home:
        return None
    which, named = ("", "FOLDER (`gradhelm serve` printed it)") if theirs is None else (f" ({theirs})", "")
    return (
        f"The server at {url(host, port)} uses another data folder{which} than {home}, where this command looks: "
        f"`export GRADHELM_HOME={named or shlex.quote(str(theirs))}` in this terminal, or pass a key of that server as "
        "--key."
    )


def about_port(error: OSError, host: str, port: int, home: Path) -> str:
    """What to tell who wanted to listen where that is not possible.

    Args:
        error: why it is not possible.
        host: the address that was wanted.
        port: the port that was wanted.
        home: the data folder that was to be served.

    Returns:
        What has the port, as far as it can be seen, and what to do.
    """
    where, other = url(_ANYWHERE.get(host, host), port), "--port 0 (any free one)"
    if error.errno != errno.EADDRINUSE:
        return (
            f"Cannot listen on {host}:{port} ({error.strerror}): the address is not this machine's, or the port needs "
            f"rights. Take another address with --host, another port with {other}."
        )
    if not is_ours(host, port):
        return (
            f"Cannot listen on {host}:{port} ({error.strerror}): another program, no Gradhelm server that answers, has "
            f"it. Take another with --port, or {other}."
        )
    pid = holder(home)
    if pid is not None and any(number == port for _, number in listens(pid)):
        return (
            f"{where} is this data folder's own server already: process {pid} serves {home}. Use it as it is, or stop "
            f"it (kill {pid}) and start again. A second server needs a port and a data folder of its own: {other} "
            "--home FOLDER."
        )
    return (
        f"Cannot listen on {host}:{port} ({error.strerror}): a Gradhelm server of another data folder than {home} "
        f"answers there. Use that one at {where}, or take another port for this one: {other}."
    )


def about_folder(home: Path, pid: int | None) -> str:
    """What to tell who wanted to serve a data folder that a server holds.

    Args:
        home: the data folder.
        pid: the process that holds it, if known.

    Returns:
        Where that server answers, if it does, and what to do.
    """
    own = "start this one on a folder of its own: --home FOLDER"
    if pid is None:
        return f"The data folder {home} is in use by another process. Stop that server, or {own}."
    for host, port in listens(pid):
        if is_ours(host, port):
            where = url(_ANYWHERE.get(host, host), port)
            return (
                f"The data folder {home} is in use by process {pid}, a Gradhelm server at {where}. Use that one "
                f"(--url {where}), stop it (kill {pid}), or {own}."
            )
    return (
        f"The data folder {home} is in use by process {pid}, which answers nowhere on this machine: it may be starting "
        f"or stopping. Wait and try again, stop it (kill {pid}), or {own}."
    )
