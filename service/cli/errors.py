"""What ends a command early: a message for the user and an exit code, never a traceback."""

from __future__ import annotations


class CliError(Exception):
    """The command cannot go on.

    Args:
        message: what happened and what to do about it, one or more lines.
        exit_code: 1 when the server (or the machine) said no, 2 when the command was asked wrongly.
    """

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code


class UsageProblem(CliError):
    """The command line itself is wrong: exit code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=2)


class ServerGone(CliError):
    """No server answers, or the connection broke: the caller may try again."""


class ServerRefused(CliError):
    """The server answered with an error.

    Args:
        message: what the server said.
        status: the HTTP status.
        code: the wire's error code, or None.
        retry_after: seconds that the server asked us to wait, or None.
    """

    def __init__(self, message: str, *, status: int, code: str | None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after = retry_after
