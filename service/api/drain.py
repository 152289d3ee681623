"""How a stop reaches what is in flight: first everybody is told, then, after a grace, generations end."""

from __future__ import annotations

import asyncio


class Draining:
    """Two moments of a graceful stop, as events of the running loop.

    Args:
        grace_seconds: Time between the two.
    """

    def __init__(self, grace_seconds: float) -> None:
        self.grace_seconds = grace_seconds
        self.begun = asyncio.Event()
        """Not ready any more; event streams send a last event and close; new generations are refused."""
        self.expired = asyncio.Event()
        """Generations still in flight end now, with an error that says to retry."""
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Start the stop; called in the loop, once or more."""
        if not self.begun.is_set():
            self.begun.set()
            self._timer = asyncio.get_running_loop().call_later(self.grace_seconds, self.expired.set)

    def finish(self) -> None:
        """Everything is over: drop the timer."""
        self.begun.set()
        self.expired.set()
        if self._timer is not None:
            self._timer.cancel()
