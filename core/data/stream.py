"""The order of training: steps of rows, shuffled by seed and epoch, that any process can take up anywhere.

The rows of a step depend on the number of rows in a global step alone (batch size x accumulation x processes), not
on how it is split: so one process with batch 8, one with 1 x 8 and two with 4 see the same steps. Every row comes once
an epoch; the last step of an epoch holds what is left.

Rows that share a step have similar lengths when `bucket` is on, so that little is padding; the order of the steps
stays random. With `pack`, short rows share a place of `max_length` tokens; which ones is the same in every epoch.
"""

from __future__ import annotations

import array
import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from core.data.batch import pack as pack_examples
from core.data.example import IGNORED, Example

WINDOW_STEPS = 50
"""How many steps' rows are sorted by length together; more is less padding and less mixing."""


class Stream(Iterator[list[list[Example]]]):
    """Endless steps; each is this process's list of micro-batches, and each micro-batch a list of examples.

    All processes get the same number of micro-batches in a step, none empty: where rows run out, a process gets a
    filler that trains nothing. Divide by the trained tokens of the whole step, never by rows.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        accumulation: int = 1,
        seed: int = 0,
        bucket: bool = True,
        pack: bool = False,
        max_length: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Set the stream to the first step of the first epoch.

        Args:
            examples: the whole training set, the same in every process.
            batch_size: rows in a micro-batch of one process (packed rows, with `pack`).
            accumulation: micro-batches in a step.
            seed: of the order.
            bucket: put rows of similar length into a step.
            pack: let short rows share a place of `max_length` tokens.
            max_length: tokens in a packed row; required by `pack`.
            rank: number of this process, from 0.
            world: how many processes there are.

        Raises:
            ValueError: no examples, or a number out of range.
        """
        if not examples:
            raise ValueError("there are no examples to train on")
        if batch_size < 1 or accumulation < 1 or not 0 <= rank < world:
            raise ValueError(
                "batch_size and accumulation must be at least 1 and rank from 0 to world - 1; "
                f"got {batch_size}, {accumulation} and {rank} of {world}"
            )
        if pack and max_length is None:
            raise ValueError("packing needs max_length, the tokens in a packed row")
        rows = sum(len(example.segments) or 1 for example in examples)
        self._examples = pack_examples(examples, max_length) if pack and max_length is not None else list(examples)
        self.rows = rows
        """Rows of the training set in one epoch, before packing."""
        self.batch_size, self.accumulation, self.rank, self.world = batch_size, accumulation, rank, world
        self.seed, self.bucket = seed, bucket
        self.epoch = 0
        """Epoch of the next step, from 0."""
        self.position = 0
        """Steps already given out in that epoch."""
        self._order: tuple[int, list[list[int]]] | None = None
        self._digest: str | None = None

    @property
    def places(self) -> int:
        """Rows in a global step: batch size x accumulation x processes."""
        return self.batch_size * self.accumulation * self.world

    @property
    def steps_per_epoch(self) -> int:
        """Steps in an epoch, the same in every epoch."""
        return -(-len(self._examples) // self.places)

    @property
    def examples(self) -> Sequence[Example]:
        """What steps are made of: the given examples, or the packed ones."""
        return self._examples

    def __next__(self) -> list[list[Example]]:
        """Give out the next step of this process, and move on."""
        step = self._steps()[self.position]
        self.position += 1
        if self.position == self.steps_per_epoch:
            self.epoch, self.position = self.epoch + 1, 0
        return self._share(step)

    def state(self) -> dict[str, Any]:
        """Take down where the stream stands, and what order it belongs to.

        Returns:
            JSON data for `restore`.
        """
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "places": self.places,
            "bucket": self.bucket,
            "examples": len(self._examples),
            "data": self._fingerprint(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to where another stream stood; the steps that follow are exactly those that it would have given.

        Args:
            state: what `state` returned, on the same data; batch size, accumulation and processes may differ as long
                as their product is the same.

        Raises:
            ValueError: the state belongs to other data or another order, or its position does not exist.
        """
        mine = self.state()
        if other := [name for name in mine.keys() - {"epoch", "position"} if mine[name] != state.get(name)]:
            pairs = ", ".join(f"{name} was {state.get(name)!r} and is {mine[name]!r}" for name in sorted(other))
            raise ValueError(
                f"this position belongs to another order of the data: {pairs}; start anew or undo the change"
            )
        epoch, position = state.get("epoch"), state.get("position")
        if type(epoch) is not int or type(position) is not int or epoch < 0 or not 0 <= position < self.steps_per_epoch:
            raise ValueError(f"there is no position {position!r} in epoch {epoch!r}")
        self.epoch, self.position = epoch, position

    def _steps(self) -> list[list[int]]:
        """Rows of each step of the current epoch: a pure function of seed, epoch, places and the rows' lengths."""
        if self._order is None or self._order[0] != self.epoch:
            self._order = (
                self.epoch,
                _arrange(
                    [len(example.input_ids) for example in self._examples],
                    places=self.places,
                    seed=f"{self.seed}/{self.epoch}",
                    bucket=self.bucket,
                ),
            )
        return self._order[1]

    def _share(self, step: Sequence[int]) -> list[list[Example]]:
        """Deal the rows of a global step: longest first, in turn, so that no process waits long for another."""
        rows = sorted(step, key=lambda index: -len(self._examples[index].input_ids)) if self.bucket else list(step)
        width = self.batch_size * self.world
        result = []
        for start in range(0, len(rows), width):
            mine = [self._examples[index] for index in rows[start : start + width][self.rank :: self.world]]
            result.append(mine or [_filler(self._examples[rows[start]])])
        return result

    def _fingerprint(self) -> str:
        if self._digest is None:
            digest = hashlib.sha256()
            for example in self._examples:
                for part in (example.input_ids, example.labels, example.segments):
                    digest.update(array.array("q", (len(part), *part)).tobytes())
            self._digest = digest.hexdigest()
        return self._digest


def _arrange(lengths: Sequence[int], *, places: int, seed: str, bucket: bool) -> list[list[int]]:
    order = _shuffled(range(len(lengths)), random.Random(f"rows/{seed}"))
    whole = len(order) - len(order) % places
    if not bucket:
        return [order[start : start + places] for start in range(0, len(order), places)]
    steps = []
    for start in range(0, whole, places * WINDOW_STEPS):
        window = sorted(order[start : min(whole, start + places * WINDOW_STEPS)], key=lambda index: lengths[index])
        steps += [window[at : at + places] for at in range(0, len(window), places)]
    steps = [steps[index] for index in _shuffled(range(len(steps)), random.Random(f"steps/{seed}"))]
    return steps + ([order[whole:]] if whole < len(order) else [])


def _shuffled(items: range, rng: random.Random) -> list[int]:
    # Python promises the sequence of random() for a seed across versions, but not that of shuffle().
    return [item for _, item in sorted((rng.random(), item) for item in items)]


def _filler(example: Example) -> Example:
    return Example(0, example.input_ids[:1], [IGNORED], total=1)
