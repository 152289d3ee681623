"""Rows of a study's report: what each arm reached, at which rate, in how many bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import mean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.optimizers import rates
from benchmarks.optimizers.plan import Plan, Subject
from benchmarks.optimizers.runs import TUNING_SEED, Result, Run

Done = Mapping[Run, Result]
Pair = tuple[str, float]
"""An arm at a rate."""
FEWEST = 2
"""Seeds that a comparison needs: the spread between seeds is nothing that one of them shows."""


def fresh(done: Done, pair: Pair) -> dict[int, Result]:
    """Runs of an arm at a rate with other seeds than the tuning one, by seed; diverged ones too."""
    found = {run.seed: r for run, r in done.items() if (run.arm, run.rate) == pair and run.seed != TUNING_SEED}
    return dict(sorted(found.items()))


def paired_units(
    done: Done, pairs: Mapping[str, Pair]
) -> tuple[dict[str, NDArray[np.float64]], tuple[int, ...], list[int]] | None:
    """Units of several arms on the seeds that all of them have.

    Args:
        done: Finished runs.
        pairs: What to take, by a name for it.

    Returns:
        Nats (seeds, units) by name, tokens of each unit, and the seeds; None where fewer than ``FEWEST`` seeds are
        common to all, or a run diverged: an interval without it would flatter.
    """
    runs = {name: fresh(done, pair) for name, pair in pairs.items()}
    seeds = sorted(set.intersection(*(set(each) for each in runs.values())))
    if len(seeds) < FEWEST or any(not each[seed].units for each in runs.values() for seed in seeds):
        return None
    tokens = next(iter(runs.values()))[seeds[0]].tokens
    assert all(each[seed].tokens == tokens for each in runs.values() for seed in seeds)
    return {name: np.array([each[seed].units for seed in seeds]) for name, each in runs.items()}, tokens, seeds


def ppl(loss: float) -> float | None:
    """Perplexity; None for a diverged run or one that is nearly so."""
    return round(math.exp(loss), 3) if loss < 50 else None


def row(plan: Plan, subject: Subject, done: Done) -> dict[str, Any]:
    """One arm's row; what is not known yet is None."""
    scores = plan.scores(subject, done)
    rate = plan.rate(subject.name, done)
    at = [] if rate is None else list(fresh(done, (subject.name, rate)).values())
    mine = [result for run, result in done.items() if run.arm == subject.name]
    return {
        "arm": subject.name,
        "published_rate": subject.centre,
        "rate": rate,
        "at_edge": None if rate is None else rates.at_edge(scores),
        "dev": {f"{each:.3g}": loss if math.isfinite(loss) else None for each, loss in sorted(scores.items())},
        "test": None if not at or not math.isfinite(sum(r.loss for r in at)) else mean(r.loss for r in at),
        "test_by_seed": [r.loss if math.isfinite(r.loss) else None for r in at],
        "state_mib": median(r.state_bytes for r in mine) / 2**20 if mine else None,
        **{
            name: round(median(r.more[name] for r in mine), 2)
            for name in ("held_mib", "step_ms", "optimizer_ms")
            if mine
        },
    }
