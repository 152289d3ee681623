"""Prompts become tokens on a thread of their own, so that the batch goes on meanwhile, and vectors are read there.

The tokenizer works outside the interpreter's lock. A prompt that several requests share, as the choices of one request
do, is encoded once; a request that was cancelled while it waited here is not encoded at all.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from service.engines import wire
from service.engines.base import EngineError, EngineUnavailable, Message, Request, Steering
from service.engines.prompts import encode

if TYPE_CHECKING:
    from steering.spec import RowSpec

Inbox = queue.SimpleQueue[dict[str, Any]]

log = logging.getLogger("gradhelm.engine")


class Encoder:
    """Takes ``generate`` messages and puts ``encoded`` ones into the worker's inbox, in the same order.

    Args:
        inbox: of the worker; gets ``{"op": "encoded", "id", "request", "prompt", "spec"}``, the prompt being tokens or
            an error, the spec its steering with the vectors in it, if it has any.
    """

    def __init__(self, inbox: Inbox) -> None:
        self._tokenizer: Any = None
        self._spec: Callable[[Steering], RowSpec] | None = None
        self._context = 0
        self._inbox = inbox
        self._queue: Inbox = queue.SimpleQueue()
        self._pending: set[str] = set()
        self._cancelled: set[str] = set()
        self._last: tuple[tuple[Message, ...] | str, list[int]] | None = None

    def start(self, tokenizer: Any, context: int, spec: Callable[[Steering], RowSpec] | None = None) -> None:
        """Encode from now on, as long as the process lives.

        Args:
            tokenizer: of the base.
            context: tokens that prompt and answer may have together.
            spec: reads a request's vectors; called on the encoder's thread only.
        """
        self._tokenizer, self._context, self._spec = tokenizer, context, spec
        threading.Thread(target=self._run, daemon=True, name="encoder").start()

    def put(self, message: dict[str, Any]) -> None:
        """Take a ``generate`` message."""
        self._pending.add(message["request"]["id"])
        self._queue.put(message)

    def cancel(self, request_id: str) -> bool:
        """Forget a request.

        Args:
            request_id: of any request.

        Returns:
            Whether it was here; if not, the batch may have it.
        """
        if request_id not in self._pending:
            return False
        self._cancelled.add(request_id)
        return True

    def release(self, request_id: str) -> bool:
        """Let go of an encoded request: it is the batch's from here on.

        Args:
            request_id: of an ``encoded`` message.

        Returns:
            Whether it is still wanted.
        """
        wanted = request_id not in self._cancelled
        self._pending.discard(request_id)
        self._cancelled.discard(request_id)
        return wanted

    def encode(self, message: dict[str, Any]) -> dict[str, Any]:
        """One ``generate`` message's ``encoded`` message; what goes wrong becomes the request's answer."""
        name = message["request"]["id"]
        if name in self._cancelled:
            return {"op": "encoded", "request": None, "id": name, "prompt": [], "spec": None}
        request = wire.request_from_json(message["request"])
        prompt: list[int] | EngineError
        spec = None
        try:
            prompt = self._ids(request)
            if request.steering is not None and self._spec is not None:
                spec = self._spec(request.steering)
        except EngineError as error:
            prompt = error
        except Exception:  # one request must not end the others
            log.exception("request %s could not be taken", name)
            prompt = EngineUnavailable("The engine could not take the request.")
        # Encoded it is: the text is not needed any more, and may be long.
        return {"op": "encoded", "request": replace(request, prompt=""), "id": name, "prompt": prompt, "spec": spec}

    def _ids(self, request: Request) -> list[int]:
        if self._last is not None and self._last[0] == request.prompt:
            return list(self._last[1])
        ids = encode(request, self._tokenizer, self._context)
        self._last = (request.prompt, ids)
        return list(ids)

    def _run(self) -> None:
        while True:
            self._inbox.put(self.encode(self._queue.get()))
