"""Which runs come next: a pure function of those that are finished, so that a study cut off anywhere goes on alike.

Order: the rates of arms named in claims, then their first seeds; the same of the variants; of the other arms; then
more seeds for the claims. A variant is tuned like any arm; the best of them on dev (tuning seed) is compared with its
parent, which for that comparison is tuned further, with as many runs as were spent on all variants of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.optimizers import rates
from benchmarks.optimizers.runs import TUNING_SEED, Result, Run

Done = Mapping[Run, Result]
HEAVIER = 1.01
"""Bytes that a variant may hold, as a multiple of its parent's."""


@dataclass(frozen=True)
class Subject:
    """An arm as the plan sees it."""

    name: str
    centre: float
    """Published learning rate."""
    claimed: bool = False
    """Whether a claim names it."""
    parent: str | None = None
    """Of a variant: what it must beat."""


@dataclass(frozen=True)
class Plan:
    """A study: arms, grids and seeds."""

    subjects: Sequence[Subject]
    count: int
    """Rates of a grid before it is widened."""
    factor: float
    """Between neighbouring rates."""
    seeds: Sequence[int]
    """Seeds of every arm, at its chosen rate."""
    more_seeds: Sequence[int] = ()
    """Further seeds of the arms that claims are about."""

    def next_runs(self, done: Done) -> list[Run]:
        """All runs that can be known by now and are not finished, most wanted first, each once."""
        wanted = dict.fromkeys(self._wanted(done))
        return [run for run in wanted if run not in done]

    def _wanted(self, done: Done) -> Iterator[Run]:
        claimed = [s for s in self.subjects if s.claimed]
        variants = [s for s in self.subjects if s.parent]
        for subject in claimed:
            yield from self._tuning(subject, done)
        yield from self._tested([s.name for s in claimed], self.seeds, done)
        for subject in variants:
            yield from self._tuning(subject, done)
        yield from self._refinement(done)
        compared = self._compared(done)
        yield from (Run(*pair, seed) for seed in self.seeds for pair in compared)
        for subject in self.subjects:
            if not (subject.claimed or subject.parent):
                yield from self._tuning(subject, done)
        yield from self._tested([s.name for s in self.subjects], self.seeds, done)
        yield from (Run(*pair, seed) for seed in self.more_seeds for pair in compared)
        yield from self._tested([s.name for s in claimed], self.more_seeds, done)

    def _tested(self, arms: Sequence[str], seeds: Sequence[int], done: Done) -> Iterator[Run]:
        """Runs at the chosen rate of those arms whose rate is settled."""
        chosen = [(arm, rate) for arm in arms if (rate := self.rate(arm, done)) is not None]
        yield from (Run(*pair, seed) for seed in seeds for pair in chosen)

    def _tuning(self, subject: Subject, done: Done) -> Iterator[Run]:
        for rate in rates.missing(subject.centre, self.scores(subject, done), count=self.count, factor=self.factor):
            yield Run(subject.name, rate, TUNING_SEED)

    def _refinement(self, done: Done) -> Iterator[Run]:
        variant = self.variant(done)
        if variant is None:
            return
        parent = self.subject(str(variant.parent))
        if self.rate(parent.name, done) is None or self.settled(parent, done):
            return
        yield Run(parent.name, rates.between(_tried(parent.name, done), self.factor), TUNING_SEED)

    def _compared(self, done: Done) -> list[tuple[str, float]]:
        """The best variant and its parent, at the rates they are compared at, as far as known."""
        variant = self.variant(done)
        if variant is None:
            return []
        tuned = self.tuned_rate(self.subject(str(variant.parent)), done)
        pairs = [(variant.name, self.rate(variant.name, done)), (str(variant.parent), tuned)]
        return [(arm, rate) for arm, rate in pairs if rate is not None]

    def subject(self, name: str) -> Subject:
        """The arm of that name."""
        return next(s for s in self.subjects if s.name == name)

    def scores(self, subject: Subject, done: Done) -> dict[float, float]:
        """Dev loss of each rate tried on the arm's grid."""
        tried = _tried(subject.name, done)
        return {
            r: s for r, s in tried.items() if rates.on_grid(r, subject.centre, count=self.count, factor=self.factor)
        }

    def rate(self, name: str, done: Done) -> float | None:
        """The rate chosen on dev from the arm's grid, once that is settled."""
        subject = self.subject(name)
        scores = self.scores(subject, done)
        if rates.missing(subject.centre, scores, count=self.count, factor=self.factor):
            return None
        return rates.best(scores)

    def state_bytes(self, name: str, done: Done) -> int:
        """What the arm's state was measured to be; it is the same in every run of an arm."""
        return max(result.state_bytes for run, result in done.items() if run.arm == name)

    def variant(self, done: Done) -> Subject | None:
        """The variant that is best against its parent on dev, once all and their parents are tuned.

        One that holds more than its parent (beyond ``HEAVIER``) is out: the comparison is at equal bytes.
        """
        variants = [s for s in self.subjects if s.parent]
        if any(self.rate(name, done) is None for s in variants for name in (s.name, str(s.parent))):
            return None

        def gain(subject: Subject) -> float:
            parent = self.scores(self.subject(str(subject.parent)), done)
            return min(parent.values()) - min(self.scores(subject, done).values())

        fair = [
            s for s in variants if self.state_bytes(s.name, done) <= HEAVIER * self.state_bytes(str(s.parent), done)
        ]
        return max(fair, key=gain, default=None)

    def settled(self, parent: Subject, done: Done) -> bool:
        """Whether as many runs were spent on a parent's rate as on the rates of all its variants."""
        children = [s.name for s in self.subjects if s.parent == parent.name]
        return len(_tried(parent.name, done)) >= sum(len(_tried(name, done)) for name in children)

    def tuned_rate(self, parent: Subject, done: Done) -> float | None:
        """The parent's best rate of all that were tried, refinements included, once it is settled."""
        if self.rate(parent.name, done) is None or not self.settled(parent, done):
            return None
        return rates.best(_tried(parent.name, done))


def _tried(name: str, done: Done) -> dict[float, float]:
    return {run.rate: result.loss for run, result in done.items() if run.arm == name and run.seed == TUNING_SEED}
