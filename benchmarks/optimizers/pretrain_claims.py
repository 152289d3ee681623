"""The claims of the pre-training study, from its finished runs: each with its interval, whether or not it holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from benchmarks.optimizers import rates
from benchmarks.optimizers.bootstrap import Interval, Losses, paired, percent
from benchmarks.optimizers.plan import Plan
from benchmarks.optimizers.tables import Done, Pair, paired_units
from benchmarks.report import Report

BETTER = "< 0 throughout"


def gap(losses: Losses) -> NDArray[np.float64]:
    """Perplexity of density 0 above AdamW's."""
    found: NDArray[np.float64] = np.exp(losses["none"]) - np.exp(losses["all"])
    return found


def closed(losses: Losses) -> NDArray[np.float64]:
    """Share of that gap that density .25 closes."""
    found: NDArray[np.float64] = (np.exp(losses["none"]) - np.exp(losses["some"])) / gap(losses)
    return found


def state(report: Report, plan: Plan, done: Done) -> None:
    """Add every claim to the report."""
    _gap_closed(report, plan, done)
    for claim, arm, against in (
        ("frugal-beats-galore-ppl", "frugal", "galore"),
        ("dct-adamw-vs-random-basis-ppl-percent", "dct-adamw", "dct-adamw-random-basis"),
    ):
        pairs = {"it": _chosen(plan, arm, done), "other": _chosen(plan, against, done)}
        _better(report, plan, claim, done, pairs, says=f"perplexity of {arm} against {against}, percent")
    _beyond(report, plan, done)


def _chosen(plan: Plan, arm: str, done: Done) -> Pair | None:
    rate = plan.rate(arm, done)
    return None if rate is None else (arm, rate)


def _known(pairs: Mapping[str, Pair | None]) -> dict[str, Pair] | None:
    known = {name: pair for name, pair in pairs.items() if pair is not None}
    return known if len(known) == len(pairs) else None


def _gap_closed(report: Report, plan: Plan, done: Done) -> None:
    arms = {"all": "adamw", "some": "frugal", "none": "frugal-density-0"}
    pairs = _known({name: _chosen(plan, arm, done) for name, arm in arms.items()})
    found = None if pairs is None else paired_units(done, pairs)
    share: Interval | None = None
    if found is not None:
        nats, tokens, seeds = found
        whole = paired(gap, nats, tokens)
        share = None if whole.contains(0) else paired(closed, nats, tokens)
        report.row(
            gap_in_perplexity=whole.value,
            low=whole.low,
            high=whole.high,
            seeds=seeds,
            at_edge=_edges(plan, arms.values(), done),
            says="frugal-density-0 above adamw" + ("; includes 0, so no share of it" if share is None else ""),
        )
    _claim(report, "frugal-ppl-gap-closed", ">= 0.35", share)


def _better(report: Report, plan: Plan, claim: str, done: Done, pairs: Mapping[str, Pair | None], *, says: str) -> None:
    known = _known(pairs)
    found = None if known is None else paired_units(done, known)
    difference = None
    if found is not None:
        nats, tokens, seeds = found
        difference = paired(percent("it", "other"), nats, tokens)
        report.row(
            percent=difference.value,
            low=difference.low,
            high=difference.high,
            seeds=seeds,
            at_edge=_edges(plan, [arm for arm, _ in known.values()] if known else [], done),
            says=says,
        )
    _claim(report, claim, BETTER, difference)


def _beyond(report: Report, plan: Plan, done: Done) -> None:
    variant = plan.variant(done)
    if variant is None:
        _claim(report, "beyond-beats-parent", BETTER, None)
        return
    parent = plan.subject(str(variant.parent))
    tuned = plan.tuned_rate(parent, done)
    pairs = {
        "it": _chosen(plan, variant.name, done),
        "other": None if tuned is None else (parent.name, tuned),
    }
    bytes_ = {name: plan.state_bytes(name, done) for name in (variant.name, parent.name)}
    report.row(
        variant=variant.name,
        parent=parent.name,
        bytes_against_parent=bytes_[variant.name] / bytes_[parent.name],
        parent_rate=tuned,
    )
    _better(
        report,
        plan,
        "beyond-beats-parent",
        done,
        pairs,
        says=f"perplexity of {variant.name} against {parent.name}, percent",
    )


def _edges(plan: Plan, arms: Iterable[str], done: Done) -> list[str]:
    """Those arms whose best rate is at an edge of all that were tried: a better one may lie beyond it."""
    return [arm for arm in arms if rates.at_edge(plan.scores(plan.subject(arm), done))]


def _claim(report: Report, claim: str, target: str, found: Interval | None) -> None:
    report.claim(claim, target, None if found is None else found.value, None if found is None else found.ends)
