"""How a run ends early, and the exit codes that tell."""

from __future__ import annotations

SUCCEEDED = 0
"""The artifact is there."""
CRASHED = 1
"""Something broke; a retry may succeed."""
USER_ERROR = 2
"""An ``error`` event says what to change; a retry cannot succeed."""
STOPPED = 3
"""Stopped at a checkpoint because SIGTERM or SIGINT asked for it; the same command goes on from there."""


class RunError(ValueError):
    """A run that cannot succeed as it is configured."""

    def __init__(self, message: str, *, code: str, param: str | None = None) -> None:
        """Keeps what the ``error`` event will say.

        Args:
            message: What is wrong and what to do.
            code: Machine-readable reason.
            param: Setting at fault.
        """
        super().__init__(message)
        self.code = code
        self.param = param


class Interrupted(Exception):
    """A stop was asked for in the middle of a step or an evaluation."""
