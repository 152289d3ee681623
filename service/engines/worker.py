"""The engine's process: ``python -m service.engines.worker FD PARENT_PID OPTIONS``, started by ``transformers_engine``.

The main thread runs the batch. A second thread reads requests and cancellations from the socket, so that they are seen
between two steps, and ends the process at once when the parent is gone. A third makes tokens of the requests' prompts
and reads their vectors.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import queue
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any

from service.engines import wire
from service.engines.base import EngineError, EngineUnavailable
from service.engines.encoder import Encoder, Inbox

if TYPE_CHECKING:
    from service.engines.scheduler import Event, Scheduler

PR_SET_PDEATHSIG = 1
log = logging.getLogger("gradhelm.engine")


def follow_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, also in the moments before the socket is read."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def read_frames(connection: socket.socket, encoder: Encoder, inbox: Inbox) -> None:
    """Take messages until the parent hangs up; then end the process, whatever it is doing.

    Requests go to the encoder, which puts them into the inbox when they are tokens; cancellations overtake them there.
    """
    try:
        with connection.makefile("rb") as stream:
            while head := stream.read(wire.HEAD.size):
                message = json.loads(stream.read(wire.length(head)))
                if message["op"] == "generate":
                    encoder.put(message)
                else:
                    inbox.put(message)
    finally:
        os._exit(0)


def build(options: dict[str, Any]) -> Scheduler:
    """Load the model and make its scheduler; torch is imported here."""
    from pathlib import Path

    import torch

    from core.models.load import load
    from service.engines.adapters import merged
    from service.engines.model import TransformersModel
    from service.engines.scheduler import Limits, Scheduler

    torch.set_num_threads(options["threads"])
    loaded = load(options["base"], dtype=options["dtype"])
    if options["merge"] is not None:
        loaded = merged(loaded, Path(options["merge"]))
    loaded.model.to(_device(options["device"]))
    names = ("rows", "waiting", "cache_bytes", "prefill_tokens", "default_max_tokens")
    limits = Limits(**{name: options[name] for name in names})
    return Scheduler(TransformersModel(loaded, max_adapters=options["adapters"]), limits)


def _device(wanted: str) -> str:
    import torch

    return wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def serve(scheduler: Scheduler, connection: socket.socket, encoder: Encoder, inbox: Inbox) -> None:
    """Run the batch for ever; waits without using the processor while there is nothing to do."""
    while True:
        events: list[Event] = []
        idle = not scheduler.busy
        while idle or not inbox.empty():
            take(scheduler, encoder, inbox.get(), events)
            idle = False
        if scheduler.busy:
            events += scheduler.step()
        if events or not scheduler.busy:
            connection.sendall(wire.frame(report(scheduler, events)))


def take(scheduler: Scheduler, encoder: Encoder, message: dict[str, Any], events: list[Event]) -> None:
    """Do what a message asks; what goes wrong becomes that request's answer."""
    if message["op"] == "cancel":
        if not encoder.cancel(message["id"]):
            scheduler.cancel(message["id"])
        return
    if not encoder.release(message["id"]):
        return
    request, prompt = message["request"], message["prompt"]
    try:
        if isinstance(prompt, EngineError):
            raise prompt
        scheduler.submit(request, prompt, message["spec"])
    except EngineError as error:
        events.append((request.id, error))
    except Exception:  # one request must not end the others
        log.exception("request %s could not be taken", request.id)
        events.append((request.id, EngineUnavailable("The engine could not take the request.")))


def report(scheduler: Scheduler, events: list[Event]) -> dict[str, Any]:
    """The message for a step's events."""
    made = []
    for request_id, what in events:
        if isinstance(what, EngineError):
            made.append({"id": request_id, "error": wire.error_to_json(what)})
        else:
            made.append({"id": request_id, "chunk": wire.chunk_to_json(what)})
    return {"op": "events", "events": made, "stats": scheduler.stats()}


def main(argv: list[str]) -> None:
    """Start: read the options, load, say so, serve."""
    follow_parent(int(argv[1]))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole group: the parent drains, then hangs up
    connection = socket.socket(fileno=int(argv[0]))
    inbox: Inbox = queue.SimpleQueue()
    encoder = Encoder(inbox)
    threading.Thread(target=read_frames, args=(connection, encoder, inbox), daemon=True).start()
    try:
        scheduler = build(json.loads(argv[2]))
    except Exception as error:
        message = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        connection.sendall(wire.frame({"op": "failed", "user": isinstance(error, ValueError), "message": message}))
        raise
    ready = {"op": "ready", "context": scheduler.context, "token_bytes": scheduler.model.token_bytes}
    connection.sendall(wire.frame(ready))
    encoder.start(scheduler.model.tokenizer, scheduler.context, scheduler.vectors.spec)
    serve(scheduler, connection, encoder, inbox)


if __name__ == "__main__":
    main(sys.argv[1:])
