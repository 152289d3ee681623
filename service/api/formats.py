"""How a generation looks on the wire: OpenAI's chat and text objects, whole and in pieces."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from service.api import generation
from service.api.generation import Collected
from service.api.schemas.generation import ChatRequest, CompletionRequest, GenerationRequest
from service.engines.base import Chunk, TokenLogprob, TopLogprob


class Format(ABC):
    """How a generation looks on the wire; one value a request."""

    prefix = ""
    whole = ""
    part = ""

    def __init__(self, wanted: GenerationRequest) -> None:
        self.model = wanted.model
        self.usage = wanted.stream_options is not None and wanted.stream_options.include_usage
        self.id = f"{self.prefix}{uuid4().hex}"
        self.created = int(time.time())

    def envelope(self, kind: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What every object of this answer has in common."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": list(choices)}

    def answer(self, collected: Sequence[Collected]) -> dict[str, Any]:
        """The whole answer."""
        choices = [self._settled(index, choice) for index, choice in enumerate(collected)]
        return {**self.envelope(self.whole, choices), "usage": generation.usage(collected).model_dump()}

    def _settled(self, index: int, choice: Collected) -> dict[str, Any]:
        made = {"index": index, **self.full(choice), "finish_reason": choice.finish_reason}
        receipt = generation.receipt(choice.receipt)
        return made if receipt is None else {**made, "steering": receipt.model_dump()}

    @abstractmethod
    def full(self, choice: Collected) -> dict[str, Any]:
        """The choice's text and log-probabilities."""

    @abstractmethod
    def opening(self, index: int) -> list[dict[str, Any]]:
        """What a stream says about a choice before its first text."""

    @abstractmethod
    def delta(self, index: int, chunk: Chunk) -> dict[str, Any]:
        """New text of a choice."""

    def closing(self, index: int, chunk: Chunk) -> dict[str, Any]:
        """The choice's last word, with the receipt."""
        empty = Chunk("", (), chunk.finish_reason)
        receipt = generation.receipt(chunk.receipt)
        last = {**self.delta(index, empty), "finish_reason": chunk.finish_reason}
        return last if receipt is None else {**last, "steering": receipt.model_dump()}


class ChatFormat(Format):
    prefix, whole, part = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, wanted: ChatRequest) -> None:
        super().__init__(wanted)
        self.logprobs = bool(wanted.logprobs)

    def full(self, choice: Collected) -> dict[str, Any]:
        """The message."""
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(choice.logprobs)}

    def opening(self, index: int) -> list[dict[str, Any]]:
        """The role."""
        first = {"role": "assistant", "content": "", "refusal": None}
        return [{"index": index, "delta": first, "logprobs": None, "finish_reason": None}]

    def delta(self, index: int, chunk: Chunk) -> dict[str, Any]:
        """A message's delta."""
        delta = {"content": chunk.text} if chunk.text or chunk.logprobs else {}
        logprobs = self._logprobs(chunk.logprobs) if chunk.logprobs else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        content = [
            {
                "token": token.token,
                "bytes": token.bytes,
                "logprob": token.logprob,
                "top_logprobs": [{"token": t.token, "bytes": t.bytes, "logprob": t.logprob} for t in token.top],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}


class TextFormat(Format):
    prefix, whole, part = "cmpl-", "text_completion", "text_completion"

    def __init__(self, wanted: CompletionRequest) -> None:
        super().__init__(wanted)
        self.logprobs = wanted.logprobs is not None

    def full(self, choice: Collected) -> dict[str, Any]:
        """The text."""
        return {"text": choice.text, "logprobs": self._logprobs(choice.logprobs)}

    def opening(self, index: int) -> list[dict[str, Any]]:  # noqa: ARG002 - a text has no role to announce
        """Nothing."""
        return []

    def delta(self, index: int, chunk: Chunk) -> dict[str, Any]:
        """A piece of text, its tokens' offsets counted from the choice's beginning."""
        logprobs = self._logprobs(chunk.logprobs)
        return {"index": index, "text": chunk.text, "logprobs": logprobs, "finish_reason": None}

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        tops: list[dict[str, float]] = []
        for token in tokens:
            top: dict[str, float] = {}
            for other in token.top:  # best first: should two still have one name, the likelier one keeps it
                top.setdefault(_name(other), other.logprob)
            tops.append(top)
        return {
            "tokens": [_name(token) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": tops,
            "text_offset": [token.offset for token in tokens],
        }


def _name(token: TokenLogprob | TopLogprob) -> str:
    """A token's text; for one that is no whole text, OpenAI's name of its bytes, such as ``bytes:\\xe2\\x96``."""
    data = bytes(token.bytes)
    try:
        data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(chr(b) if 32 <= b < 127 and b != 92 else f"\\x{b:02x}" for b in data)
    return token.token
