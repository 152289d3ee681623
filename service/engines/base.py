"""What every engine answers to: one request in, an asynchronous stream of chunks out. No torch here."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "length"]
Positions = Literal["all", "prompt", "generated"]


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message; the role ``developer`` is rendered as ``system``."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. ``temperature`` 0 is greedy; ``seed`` None draws one; ``logprobs`` None asks for none.

    ``max_tokens`` None means: up to the end of the model's context, bounded by the engine's own limit.
    ``logprobs`` is the number of alternatives per token, 0 to 20. Penalties count generated tokens only.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class SteeringTerm:
    """One vector file on this machine, a plain multiplier, and where it acts (0-based blocks; None: all it has)."""

    path: str
    strength: float
    layers: tuple[int, ...] | None = None
    positions: Positions = "all"


@dataclass(frozen=True, slots=True)
class Steering:
    """Terms add in order; then ``preserve_norm`` acts once."""

    terms: tuple[SteeringTerm, ...]
    preserve_norm: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """One completion. ``base`` and ``adapter`` are directories; ``prompt`` is a chat or a text to be continued."""

    id: str
    base: str
    prompt: tuple[Message, ...] | str
    adapter: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    steering: Steering | None = None


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One alternative: its text, its bytes (0-255 each), its natural-log probability under the raw distribution."""

    token: str
    bytes: list[int]
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A generated token, its natural-log probability before temperature, and the likeliest alternatives, best first.

    ``offset``: characters of the answer's text before what this token added to it.
    """

    token: str
    bytes: list[int]
    logprob: float
    top: tuple[TopLogprob, ...] = ()
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Receipt:
    """What steering did: blocks hit, tokens touched (each counted once), mean of |dh| / |h| over both."""

    layers: tuple[int, ...]
    tokens: int
    mean_relative_shift: float


@dataclass(frozen=True, slots=True)
class Chunk:
    """New text (may be empty) with the log-probabilities of the tokens that it ends; the counts are running totals.

    ``finish_reason`` is set on the last chunk and only there, ``receipt`` on the last chunk of a steered request.
    """

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    receipt: Receipt | None = None


class EngineError(Exception):
    """An answer with an HTTP status (400, 422, 429, 503): before the first chunk or, at a death, between chunks."""

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after


class BadRequest(EngineError):
    """400: the request can never succeed as it is."""

    def __init__(self, code: str, message: str, *, param: str | None = None) -> None:
        super().__init__(400, code, message, param=param)


class ContextLengthExceeded(BadRequest):
    """400: prompt and answer do not fit the model's context."""

    def __init__(self, context: int, prompt_tokens: int, max_tokens: int | None, *, more: bool = False) -> None:
        asked = f"{'more than ' if more else ''}{prompt_tokens} tokens in the prompt"
        if max_tokens is not None and not more:
            asked = (
                f"{prompt_tokens + max_tokens} tokens ({prompt_tokens} in the prompt, {max_tokens} in the completion)"
            )
        super().__init__(
            "context_length_exceeded",
            f"This model's maximum context length is {context} tokens, but you asked for {asked}. "
            "Shorten the prompt or lower max_tokens.",
            param="messages",
        )


TOO_STRONG = "The steering is so strong that the model's numbers overflow: lower the strength."


class SteersNothing(EngineError):
    """422: the steering was understood and cannot touch any token or layer."""

    def __init__(self, message: str) -> None:
        super().__init__(422, "steering_touches_nothing", message, param="steering")


class EngineBusy(EngineError):
    """429: the queue is full; try again after ``retry_after`` seconds."""

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(429, "engine_overloaded", message, retry_after=retry_after)


class EngineUnavailable(EngineError):
    """503: the engine's process died, could not start, or has no room; try again after ``retry_after`` seconds."""

    def __init__(self, message: str, *, retry_after: int = 2) -> None:
        super().__init__(503, "engine_unavailable", message, retry_after=retry_after)


class Engine(Protocol):
    """An engine. ``generate`` is started by its first ``__anext__``; closing the generator frees the request's row."""

    def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """Stream the completion. Only a death and numbers that overflow come after the first chunk."""
        ...

    async def close(self) -> None:
        """End every request and every child process."""
        ...

    async def drop(self, directory: str) -> None:
        """Let go of a model that was deleted, if it is loaded and idle.

        Args:
            directory: where it lay.
        """
        ...

    async def health(self) -> dict[str, Any]:
        """``{"ok": bool, ...}`` plus counts that are worth a metric."""
        ...
