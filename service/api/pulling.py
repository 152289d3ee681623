"""Bringing a base model here, in a child process: conversion needs torch, and the API process never imports it.

As a program: ``python -m service.api.pulling REF``; the answer is one JSON line on stdout. Its home is $GRADHELM_HOME.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from core.models.catalog import CATALOG
from core.models.ref import ModelRef, parse_ref
from core.models.resolve import arriving, local_directory
from core.nearest import choices
from service.api.drain import Draining
from service.api.errors import APIError, bad_request, busy
from service.log import logger

log = logger(__name__)
SILENT_SECONDS = 1800.0
"""A pull of which nothing arrives for so long is ended; one that goes on may take as long as it does."""
_LOOK_SECONDS = 5.0


async def pull(name: str, home: Path, draining: Draining) -> str:
    """Pull a base model and return its name.

    Args:
        name: A catalog name or ``org/name[@revision]``.
        home: The data folder.
        draining: A stopping server ends the child; a later pull of a Hub model keeps the files that arrived whole.

    Returns:
        The name under which the model can be used.

    Raises:
        APIError: 400 for what is no such name or what the policy refuses, 502 when it cannot be fetched, 503 when the
            server stops.
    """
    try:
        ref = parse_ref(name)
    except ValueError as error:
        raise bad_request(f"{error}.", param="model", code="invalid_model") from None
    if ref.kind == "catalog" and ref.name not in CATALOG:
        message = (
            f"The catalog has no model {ref.name!r}; {choices(ref.name, CATALOG)}. Models of the Hub are org/name."
        )
        raise bad_request(message, param="model", code="invalid_model")
    if ref.kind not in ("catalog", "hub"):
        message = "Only catalog names and Hub ids (org/name[@revision]) are pulled over the API, never paths."
        raise bad_request(message, param="model", code="invalid_model")
    if await asyncio.to_thread(local_directory, ref, home) is not None:
        return str(ref)
    answer = await _child(ref, home, draining)
    if answer.get("ok"):
        return str(ref)
    refused = answer.get("kind") == "refused"
    message = str(answer.get("message", "The model could not be fetched; the server's log has the cause."))
    raise APIError(400 if refused else 502, message, code="model_refused" if refused else "pull_failed", param="model")


async def _child(ref: ModelRef, home: Path, draining: Draining) -> dict[str, Any]:
    name = str(ref)
    environment = {**os.environ, "GRADHELM_HOME": str(home), "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "service.api.pulling",
        name,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
        start_new_session=True,  # it has a child of its own, which must end with it
    )
    work = asyncio.create_task(process.communicate())
    stop = asyncio.create_task(draining.begun.wait())
    try:
        here, since = -1, time.monotonic()
        while not work.done() and not stop.done() and time.monotonic() - since < SILENT_SECONDS:
            await asyncio.wait((work, stop), timeout=_LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            before, here = here, await asyncio.to_thread(arriving, ref, home)
            since = since if here == before else time.monotonic()
        if not work.done():
            reason = "The server is stopping" if stop.done() else "Nothing has arrived for half an hour"
            kept = "files of a Hub model that have arrived whole are kept"
            raise busy(f"{reason}; pull again: {kept}.", seconds=5, code="pull_interrupted")
        out, err = work.result()
    finally:
        stop.cancel()
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
            work.cancel()
    lines = out.decode("utf-8", "replace").splitlines()
    try:
        answer = json.loads(lines[-1]) if lines else {}
    except ValueError:
        answer = {}
    if not isinstance(answer, dict) or "ok" not in answer:
        log.error("pull_failed", model=name, exit=process.returncode, tail=err.decode("utf-8", "replace")[-2000:])
        return {"ok": False, "kind": "failed"}
    return answer


def main(argv: list[str]) -> int:
    """Resolve one reference and say how it went, as one JSON line.

    Args:
        argv: The reference.

    Returns:
        Exit code: 0 whenever there is an answer.
    """
    from core.models.resolve import NotFetched, resolve

    answer: dict[str, Any] = {"ok": True}
    try:
        resolve(argv[0])
    except NotFetched as error:
        answer = {"ok": False, "kind": "failed", "message": f"The model could not be fetched: {error}"[:1000]}
    except ValueError as error:
        answer = {"ok": False, "kind": "refused", "message": f"{error}"}
    except Exception as error:
        answer = {"ok": False, "kind": "failed", "message": f"The model could not be fetched: {error}"[:1000]}
    sys.stdout.write(f"{json.dumps(answer)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
