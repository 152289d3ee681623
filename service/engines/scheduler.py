"""The continuous batch: requests join and leave between decode steps.

A step does at most one bounded piece of prefill (the oldest waiting requests that fit, together; a long prompt in
chunks) and then one decode forward over all rows. Prefill runs in a cache of its own, whose rows then join the batch.
Requests are taken in the order in which they came; one that does not fit yet holds back those behind it.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from service.engines.adapters import AdapterStuck, PlacesTaken
from service.engines.base import TOO_STRONG, BadRequest, Chunk, EngineBusy, EngineError, EngineUnavailable, Request
from service.engines.cache import BLOCK, RowCache
from service.engines.detokenise import Texts
from service.engines.model import Row, TransformersModel
from service.engines.prompts import encode, limit
from service.engines.sampling import choose
from service.engines.sequence import Sequence, logprobs
from service.engines.vectors import Vectors, as_engine_error
from steering.spec import RowSpec, SteeringError

log = logging.getLogger("gradhelm.engine")

Event = tuple[str, Chunk | EngineError]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a batch may take.

    Attributes:
        rows: requests that generate at once.
        waiting: requests that may wait for a row.
        cache_bytes: of keys and values, all rows at the length that they may reach.
        prefill_tokens: of prompts in one step (padding counted): what a decode step may be delayed by.
        default_max_tokens: where a request gives no ``max_tokens``.
    """

    rows: int = 16
    waiting: int = 64
    cache_bytes: int = 2 << 30
    prefill_tokens: int = 256
    default_max_tokens: int = 1024


@dataclass(slots=True)
class _Prefill:
    """Requests whose prompts are being read."""

    sequences: list[Sequence]
    cache: RowCache
    done: int = 0  # tokens read so far; more than one sequence is read in one go


class Scheduler:
    """Owns the waiting requests, the prefill and the batch of one model.

    Args:
        model: the one function that runs it.
        limits: what it may take.
    """

    def __init__(self, model: TransformersModel, limits: Limits) -> None:
        self.model = model
        self.limits = limits
        self.context = min(model.context, limits.cache_bytes // model.token_bytes)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.steps = 0
        self._prefill: _Prefill | None = None
        self._cache = model.new_cache(0)
        self._texts = Texts(model.tokenizer)
        self.vectors = Vectors()

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self.running or self._prefill)

    def stats(self) -> dict[str, Any]:
        """Counts for health and metrics."""
        prefill = self._prefill
        return {
            "rows": len(self.running),
            "prefilling": len(prefill.sequences) if prefill else 0,
            "waiting": len(self.waiting),
            "cache_bytes": self._cache.nbytes + (prefill.cache.nbytes if prefill else 0),
            "adapters": len(self.model.adapters),
            "steps": self.steps,
        }

    def submit(self, request: Request, prompt: list[int] | None = None, spec: RowSpec | None = None) -> None:
        """Check a request wholly and put it in the queue.

        Args:
            request: for this model's base.
            prompt: its prompt's tokens, where they are known.
            spec: its steering with the vectors read, where they are.

        Raises:
            EngineError: 400, 422 or 429; nothing of the request is kept.
        """
        held = len(self.waiting) + len(self.running) + (len(self._prefill.sequences) if self._prefill else 0)
        if held >= self.limits.rows + self.limits.waiting:
            raise EngineBusy(f"{held} requests are being answered or waiting, the most allowed. Try again shortly.")
        if prompt is None:
            prompt = encode(request, self.model.tokenizer, self.context)
        most = limit(request, len(prompt), self.context, self.limits.default_max_tokens)
        steering = None
        if request.steering is not None:
            spec = self.vectors.spec(request.steering) if spec is None else spec
            try:
                steering = self.model.steering.open(spec, prompt_length=len(prompt), max_tokens=most)
            except SteeringError as error:
                raise as_engine_error(error) from None
        self.waiting.append(
            Sequence(request, prompt, limit=most, texts=self._texts, eos=self.model.eos, steering=steering)
        )

    def cancel(self, request_id: str) -> None:
        """Forget a request wherever it is; unknown ids are ignored."""
        for sequence in self.waiting:
            if sequence.id == request_id:
                self.waiting.remove(sequence)
                return
        for row, sequence in enumerate(self.running):
            if sequence.id == request_id:
                self._leave(row)
                return
        if self._prefill is not None:
            for sequence in self._prefill.sequences:
                sequence.cancelled |= sequence.id == request_id
            if all(s.cancelled for s in self._prefill.sequences):
                for sequence in self._prefill.sequences:
                    self._let_go(sequence)
                self._prefill = None

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Do one bounded piece of work.

        Returns:
            (request id, chunk or error) in order; an error, or a chunk with a finish reason, is a request's last.
        """
        self.steps += 1
        events: list[Event] = []
        if self._prefill is None:
            events += self._admit()
        if self._prefill is not None:
            events += self._guarded(self._read_prompts, self._prefill.sequences)
        if self.running:
            events += self._guarded(self._decode, self.running)
        return events

    def _admit(self) -> list[Event]:
        """Start the prefill of the oldest waiting requests that fit: one, or several that fit into one step."""
        events: list[Event] = []
        chosen: list[Sequence] = []
        while self.waiting and len(self.running) + len(chosen) < self.limits.rows:
            sequence = self.waiting[0]
            longest = max([len(s.prompt) for s in chosen] + [len(sequence.prompt)])
            if chosen and (len(chosen) + 1) * longest > self.limits.prefill_tokens:
                break
            if not self._fits([*self.running, *chosen, sequence]):
                break
            if sequence.request.adapter is not None:
                try:
                    sequence.adapter = self.model.adapters.acquire(sequence.request.adapter)
                except PlacesTaken as error:
                    if self.running or chosen:
                        break  # a place comes free when a row leaves
                    events.append((self.waiting.popleft().id, error))
                    continue
                except EngineError as error:
                    events.append((self.waiting.popleft().id, error))
                    continue
                except AdapterStuck:
                    raise  # no forward of this process can be trusted any more: a new one takes its place
                except Exception as error:  # whatever it is, other requests must not pay for it
                    log.exception("the adapter %s could not be loaded", sequence.request.adapter)
                    message = f"The adapter could not be loaded ({type(error).__name__}); the engine's log says why."
                    events.append((self.waiting.popleft().id, EngineUnavailable(message)))
                    continue
            chosen.append(self.waiting.popleft())
        return events + self._begin(chosen)

    def _begin(self, chosen: list[Sequence]) -> list[Event]:
        """Make the cache that these requests' prompts are read into."""
        if not chosen:
            return []
        try:
            self._cache.trim()  # what the batch no longer uses is what these were found to fit into
            self._prefill = _Prefill(chosen, self.model.new_cache(len(chosen)))
        except Exception as error:
            log.exception("no cache for %d requests", len(chosen))
            for sequence in chosen:
                self._let_go(sequence)
            message = f"The engine has no room for the request ({type(error).__name__}). Try again shortly."
            return [(s.id, EngineUnavailable(message)) for s in chosen]
        return []

    def _fits(self, sequences: list[Sequence]) -> bool:
        """Whether these rows, at the greatest lengths that they may reach, stay within the cache's bytes."""
        columns = -(-max(s.need for s in sequences) // BLOCK) * BLOCK
        tokens = len(sequences) * columns
        return len(sequences) == 1 or tokens * self.model.token_bytes <= self.limits.cache_bytes

    def _read_prompts(self) -> list[Event]:
        prefill = self._prefill
        assert prefill is not None
        sequences, start = prefill.sequences, prefill.done
        stop = start + self.limits.prefill_tokens if len(sequences) == 1 else None
        room = min(max(s.need for s in sequences), max(len(s.prompt) for s in sequences) + BLOCK)
        tokens = [s.prompt[start:stop] for s in sequences]
        logits = self.model.logits(tokens, prefill.cache, [Row(s.adapter, s.steering) for s in sequences], room=room)
        if stop is not None and stop < len(sequences[0].prompt):
            prefill.done = stop
            return []
        events = self._choose(logits, sequences)
        self._prefill = None  # from here on a failure may have touched the batch
        if not self.running and not any(s.over or s.cancelled for s in sequences):
            self._cache, self.running = prefill.cache, list(sequences)
            return events
        for row, sequence in enumerate(sequences):
            if sequence.over or sequence.cancelled:
                self._let_go(sequence)
            else:
                self._cache.take(prefill.cache, row)
                self.running.append(sequence)
        return events

    def _decode(self) -> list[Event]:
        tokens = [[s.output[-1]] for s in self.running]
        logits = self.model.logits(tokens, self._cache, [Row(s.adapter, s.steering) for s in self.running])
        events = self._choose(logits, self.running)
        for row in reversed(range(len(self.running))):
            if self.running[row].over:
                self._leave(row)
        return events

    def _choose(self, logits: Tensor, sequences: list[Sequence]) -> list[Event]:
        tokens = choose(logits, [s.sampler for s in sequences])
        numbers = logprobs(logits, tokens, [s.request.sampling.logprobs for s in sequences])
        events: list[Event] = []
        broken = _not_numbers(logits)
        for row, (sequence, token, number) in enumerate(zip(sequences, tokens, numbers, strict=True)):
            if row in broken:
                sequence.broken = True
                events.append((sequence.id, _broken(sequence)))
                continue
            chunk = sequence.push(token, number)
            if sequence.broken:
                events.append((sequence.id, _broken(sequence)))
            if chunk is not None and not sequence.cancelled:
                events.append((sequence.id, chunk))
        return events

    def _guarded(self, work: Any, sequences: list[Sequence]) -> list[Event]:
        """Run a forward; if it fails, end the requests that were in it and keep the engine going."""
        members = list(sequences)
        try:
            events: list[Event] = work()
            return events
        except Exception as error:  # whatever it is, other requests must not pay for it
            log.exception("a forward of %d requests failed", len(members))
            if self._prefill is not None and self._prefill.sequences == members:
                self._prefill = None
            else:  # the batch itself cannot be trusted any more
                members += [s for s in self.running if s not in members]
                self.running, self._cache = [], self.model.new_cache(0)
            for sequence in members:
                self._let_go(sequence)
            message = f"The model failed: {str(error)[:200] or type(error).__name__}"
            return [(s.id, EngineUnavailable(message)) for s in members]

    def _leave(self, row: int) -> None:
        """Take a row out of the batch; the last row takes its place, here as in the cache."""
        self._let_go(self.running[row])
        self._cache.drop(row, wipe=self.running[row].broken)
        last = self.running.pop()
        if row < len(self.running):
            self.running[row] = last

    def _let_go(self, sequence: Sequence) -> None:
        if sequence.adapter is not None:
            self.model.adapters.release(sequence.adapter)
            sequence.adapter = None


def _not_numbers(logits: Tensor) -> set[int]:
    """Rows that hold NaN; one sum says that there is none."""
    if not bool(logits.sum().isnan()):
        return set()
    return set(torch.nonzero(logits.isnan().any(-1)).flatten().tolist())


def _broken(sequence: Sequence) -> EngineError:
    if sequence.steering is not None:
        return BadRequest("steering_too_strong", TOO_STRONG, param="steering")
    return EngineUnavailable("The model's numbers overflow on this prompt.")
