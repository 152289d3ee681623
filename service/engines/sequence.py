"""One request in the batch: what it has generated, and what its client may see of that."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from service.engines.base import Chunk, FinishReason, Receipt, Request, TokenLogprob, TopLogprob
from service.engines.detokenise import Texts
from service.engines.sampling import Sampler
from service.engines.text import TextStream
from steering.apply import RowState


@dataclass(frozen=True, slots=True)
class Logprob:
    """Numbers of one chosen token: natural-log probability before temperature, and the likeliest tokens, best first."""

    value: float
    top: tuple[tuple[int, float], ...]


class Sequence:
    """A request from its prompt to its last token.

    Args:
        request: what was asked.
        prompt: its tokens.
        limit: the most tokens to generate.
        texts: text of tokens.
        eos: tokens that end an answer.
        steering: state of its steering, or None.
    """

    def __init__(
        self,
        request: Request,
        prompt: list[int],
        *,
        limit: int,
        texts: Texts,
        eos: frozenset[int],
        steering: RowState | None = None,
    ) -> None:
        self.request = request
        self.prompt = prompt
        self.limit = limit
        self.steering = steering
        self.adapter: str | None = None  # its name in the model, while it is held
        self.sampler = Sampler(request.sampling)
        self.output: list[int] = []
        self.finish: FinishReason | None = None
        self.cancelled = False
        self.broken = False  # its numbers are no numbers any more
        self._texts = texts
        self._eos = eos
        self._pieces = texts.stream()
        self._stream: TextStream[TokenLogprob] = TextStream(request.sampling.stop)

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.id

    @property
    def over(self) -> bool:
        """Whether it generates nothing more."""
        return self.finish is not None or self.broken

    @property
    def need(self) -> int:
        """Columns of the cache that it may come to use; the last token is never fed."""
        return len(self.prompt) + self.limit - 1

    def push(self, token: int, logprob: Logprob | None) -> Chunk | None:
        """Add the token that was chosen.

        Args:
            token: its id.
            logprob: its numbers, if they were asked for.

        Returns:
            What the client may see now; None if that is nothing. ``finish`` is set if it was the last token, or
            ``broken`` if its steering cannot be told in numbers.
        """
        self.output.append(token)
        if token in self._eos:
            return self._end("stop", "", [])
        piece = self._pieces.push(token)
        text, notes = self._stream.push(piece, self._named(token, logprob) if logprob else None)
        if self._stream.stopped:
            return self._end("stop", text, notes)
        if len(self.output) >= self.limit:
            return self._end("length", text, notes)
        if not text and not notes:
            return None
        return Chunk(text, tuple(notes), None, len(self.prompt), len(self.output))

    def _end(self, finish: FinishReason, text: str, notes: list[TokenLogprob]) -> Chunk | None:
        if not self._stream.stopped:
            more, rest = self._stream.push(self._pieces.flush(), None)
            text, notes = text + more, notes + rest
        if not self._stream.stopped:
            more, rest = self._stream.flush()
            text, notes = text + more, notes + rest
        else:
            finish = "stop"
        self.finish = finish
        receipt = None
        if self.steering is not None:
            made = self.steering.receipt()
            if not math.isfinite(made.mean_relative_shift):
                self.broken = True
                return None
            receipt = Receipt(made.layers, made.tokens, made.mean_relative_shift)
        return Chunk(text, tuple(notes), finish, len(self.prompt), len(self.output), receipt)

    def _named(self, token: int, logprob: Logprob) -> TokenLogprob:
        text, data = self._texts.get(token)
        top = []
        for other, value in logprob.top:
            name, raw = self._texts.get(other)
            top.append(TopLogprob(name, list(raw), value))
        return TokenLogprob(text, list(data), logprob.value, tuple(top), self._stream.end)


def logprobs(logits: Tensor, tokens: list[int], wanted: list[int | None]) -> list[Logprob | None]:
    """Log-probabilities of the chosen tokens under the raw distribution.

    Args:
        logits: (B, V).
        tokens: B chosen ids.
        wanted: how many alternatives each row asked for; None asks for nothing.

    Returns:
        One for each row that asked, None for the others.
    """
    rows = [row for row, count in enumerate(wanted) if count is not None]
    made: list[Logprob | None] = [None] * len(tokens)
    if not rows:
        return made
    table = torch.log_softmax(logits[rows], -1)
    values = table.gather(1, torch.tensor([[tokens[row]] for row in rows])).squeeze(1).tolist()
    most = max(wanted[row] or 0 for row in rows)
    top, ids = table.topk(most, -1)
    for row, value, best, names in zip(rows, values, top.tolist(), ids.tolist(), strict=True):
        count = wanted[row] or 0
        made[row] = Logprob(value, tuple(zip(names[:count], best[:count], strict=True)))
    return made
