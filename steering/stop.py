"""How a fit ends early: SIGTERM and SIGINT ask for it, and the exit codes tell. Torch-free."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SUCCEEDED = 0
"""The vector is there."""
CRASHED = 1
"""Something broke; a retry may succeed."""
USER_ERROR = 2
"""An `error` event says what to change; a retry cannot succeed."""
STOPPED = 3
"""Stopped on SIGTERM or SIGINT; nothing was written. The same command starts from scratch: a fit takes one pass."""


class StoppedError(Exception):
    """A signal asked for the end."""


class StopSignals:
    """Whether a stop was asked for; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        """Nobody has asked yet."""
        self.requested = False

    def check(self) -> None:
        """Give way to a stop, between two batches.

        Raises:
            StoppedError: One was asked for.
        """
        if self.requested:
            raise StoppedError

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note a signal; runs on the main thread.

        Args:
            number: Which signal.
            frame: Not used.

        Raises:
            KeyboardInterrupt: At the second SIGINT.
        """
        del frame
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Listen for SIGTERM and SIGINT; enter it before torch is imported, so that start-up can be stopped too.

    Yields:
        What has been asked for.
    """
    stop = StopSignals()
    previous = {number: signal.signal(number, stop.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def every(seconds: float, call: Callable[[], object]) -> Iterator[None]:
    """Call something now and every so many seconds, from a thread, until left.

    Args:
        seconds: Between two calls.
        call: What to call.

    Yields:
        Nothing.
    """
    ended = threading.Event()

    def run() -> None:
        call()
        while not ended.wait(seconds):
            call()

    thread = threading.Thread(target=run, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
