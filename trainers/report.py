"""What a run says: events for the service, lines for a terminal; only the main process speaks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from core.events import EventLog


class Reporter:
    """Emits events to a log and, as they come, to a listener."""

    def __init__(self, log: EventLog | None, listener: Callable[[str, dict[str, Any]], None] | None = None) -> None:
        """Args are kept open for the run's life.

        Args:
            log: Where events go; None on every process but the main one, which makes this silent.
            listener: Called with kind and data of each event but heartbeats.
        """
        self._log = log
        self._listener = listener

    def emit(self, kind: str, **data: Any) -> None:
        """Writes one event."""
        if self._log is None:
            return
        self._log.emit(kind, **data)
        if self._listener is not None and kind != "heartbeat":
            self._listener(kind, data)

    def message(self, level: str, message: str, **data: Any) -> None:
        """Writes a ``message`` event.

        Args:
            level: info, warn or error.
            message: One sentence.
            **data: More fields.
        """
        self.emit("message", level=level, message=message, **data)

    @contextmanager
    def heartbeat(self, seconds: float) -> Iterator[None]:
        """Emits a heartbeat now and every so many seconds, from a thread, until left."""
        ended = threading.Event()

        def beat() -> None:
            self.emit("heartbeat")
            while not ended.wait(seconds):
                self.emit("heartbeat")

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
