"""SIGTERM and SIGINT ask for a stop at the next micro-batch."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class StopSignals:
    """While entered, SIGTERM and SIGINT set ``requested``; a second SIGINT interrupts at once.

    Enter it before torch is imported, so that a signal during start-up ends in an orderly stop too. Handlers run
    between bytecodes, on the main thread.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
