"""One engine process as seen from the service: its birth, its socket, the streams that wait for it, its death."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from service.engines import wire
from service.engines.base import BadRequest, Chunk, EngineError, EngineUnavailable, Request
from service.engines.options import EngineOptions

Inbox = asyncio.Queue[Chunk | EngineError]

LOG_BYTES = 4 << 20  # a log larger than this is put aside at the next start
TAIL = 2000  # bytes of the log that an error at start quotes from


class Child:
    """A running process. Made by ``start``; useless once ``dead``.

    Args:
        process: the process.
        reader: from its socket.
        writer: to its socket.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.process = process
        self.dead = False
        self.stats: dict[str, Any] = {}
        self.ready: dict[str, Any] = {}
        self.inboxes: dict[str, Inbox] = {}
        self._numbers = itertools.count(1)
        self._reader = reader
        self._writer = writer
        self._task: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, base: str, merge: str | None, options: EngineOptions) -> Child:
        """Start a process and wait until its model is loaded.

        Must run on a thread that outlives the process: the kernel's parent-death signal is the thread's.

        Args:
            base: directory of the model.
            merge: directory of an adapter to be merged into it, or None.
            options: what it may take.

        Returns:
            A child that is ready for requests.

        Raises:
            EngineError: 400 if the model is refused; 503 if the process does not get ready in time.
        """
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        log = _log_path(base, merge, options)
        with theirs, contextlib.ExitStack() as stack:
            stderr = stack.enter_context(log.open("ab")) if log else None
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "service.engines.worker"),
                    *(str(theirs.fileno()), str(os.getpid()), _options(base, merge, options)),
                ],
                env=_environment(options.threads),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=stderr if log else sys.stderr.fileno() if _has_fileno() else subprocess.DEVNULL,
                stderr=stderr,
            )
        reader, writer = await asyncio.open_connection(sock=ours, limit=wire.LIMIT)
        child = cls(process, reader, writer)
        try:
            async with asyncio.timeout(options.start_seconds):
                child.ready = await child._receive()
        except (TimeoutError, asyncio.IncompleteReadError, OSError) as error:
            await child.end(grace=0)
            late = isinstance(error, TimeoutError)
            why = f"did not start within {options.start_seconds:g} s" if late else "ended while it started"
            raise EngineUnavailable(f"The engine {why}.{_quote(log)}", retry_after=5) from None
        except BaseException:
            await child.end(grace=0)
            raise
        if child.ready["op"] == "failed":
            await child.end()
            message = str(child.ready["message"])
            if child.ready["user"]:
                raise BadRequest("model_not_usable", f"The model cannot be used: {message}", param="model")
            raise EngineUnavailable(f"The engine could not load the model: {message}", retry_after=5)
        child._task = asyncio.create_task(child._listen())
        return child

    def submit(self, request: Request) -> tuple[str, Inbox]:
        """Send a request.

        Args:
            request: its id need not be its own alone.

        Returns:
            A name for ``forget``, and the inbox into which its chunks and at most one error come.

        Raises:
            EngineUnavailable: if the process has died.
        """
        if self.dead:
            raise EngineUnavailable("The engine's process has just ended. Try again.")
        name = f"{request.id}#{next(self._numbers)}"
        inbox: Inbox = asyncio.Queue()
        self.inboxes[name] = inbox
        self._send({"op": "generate", "request": wire.request_to_json(replace(request, id=name))})
        return name, inbox

    def forget(self, name: str, *, cancel: bool) -> None:
        """Close an inbox; ``cancel`` tells the process, which frees the row before its next step."""
        if self.inboxes.pop(name, None) is not None and cancel and not self.dead:
            self._send({"op": "cancel", "id": name})

    async def end(self, *, grace: float = 5.0) -> None:
        """Hang up, wait ``grace`` seconds, then kill; what is in flight fails with 503."""
        self._writer.close()
        try:
            async with asyncio.timeout(grace):
                while self.process.poll() is None:
                    await asyncio.sleep(0.01)
        except TimeoutError:
            self.process.kill()
        await asyncio.to_thread(self.process.wait)
        self._die()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _listen(self) -> None:
        try:
            while True:
                message = await self._receive()
                self.stats = message["stats"]
                for event in message["events"]:
                    inbox = self.inboxes.get(event["id"])
                    if inbox is not None:
                        error = event.get("error")
                        inbox.put_nowait(wire.error_from_json(error) if error else wire.chunk_from_json(event["chunk"]))
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self._die()
            self._writer.close()
        if self.process.poll() is None:
            self.process.kill()  # hung up but alive: of no use, and it holds memory
        await asyncio.to_thread(self.process.wait)

    def _die(self) -> None:
        self.dead = True
        for inbox in self.inboxes.values():
            inbox.put_nowait(
                EngineUnavailable("The engine's process ended while it answered. Try again.", retry_after=2)
            )
        self.inboxes.clear()

    async def _receive(self) -> dict[str, Any]:
        size = wire.length(await self._reader.readexactly(wire.HEAD.size))
        message: dict[str, Any] = json.loads(await self._reader.readexactly(size))
        return message

    def _send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # its death is seen by the listener
            self._writer.write(wire.frame(message))


def _options(base: str, merge: str | None, options: EngineOptions) -> str:
    names = ("threads", "dtype", "device", "rows", "waiting", "cache_bytes", "prefill_tokens", "default_max_tokens")
    chosen = {name: getattr(options, name) for name in (*names, "adapters")}
    return json.dumps(chosen | {"base": base, "merge": merge})


def _environment(threads: int) -> dict[str, str]:
    fixed = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **fixed, **quiet}


def log_name(base: str, merge: str | None = None) -> str:
    """What a process's log is called: every folder has its own, and every job's is ``artifact``.

    Args:
        base: directory of the model.
        merge: directory of an adapter to be merged into it, or None.

    Returns:
        The job and the folder's name, for people, and a hash of the whole, for the log to be of this model alone.
    """
    told = [part for path in (base, merge) if path for part in (_job_of(path), Path(path).name) if part]
    digest = hashlib.sha256("\0".join((base, merge or "")).encode("utf-8", "surrogateescape")).hexdigest()
    return "-".join(("-".join(told)[:150], digest[:8]))


def _job_of(path: str) -> str | None:
    return next((part for part in Path(path).parts if part.startswith("ftjob-")), None)


def _log_path(base: str, merge: str | None, options: EngineOptions) -> Path | None:
    if options.log_directory is None:
        return None
    options.log_directory.mkdir(parents=True, exist_ok=True)
    path = options.log_directory / f"engine-{log_name(base, merge)}.log"
    if path.exists() and path.stat().st_size > LOG_BYTES:
        path.replace(path.with_suffix(".log.1"))
    return path


def _quote(log: Path | None) -> str:
    if log is None:
        return ""
    lines = log.read_bytes()[-TAIL:].decode("utf-8", "replace").strip().splitlines()
    return f" Its last words: {lines[-1][:300]}" if lines else ""


def _has_fileno() -> bool:
    try:
        sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):
        return False
    return True
