"""Claims from made-up runs: each value is what the losses say, and none is made up where runs are missing."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import pytest

from benchmarks.optimizers import pretrain_claims
from benchmarks.optimizers.plan import Plan, Subject
from benchmarks.optimizers.runs import Result, Run
from benchmarks.report import Claim, Report

PLAN = Plan(
    [
        *(Subject(name, 1.0, claimed=True) for name in ("adamw", "frugal", "frugal-density-0", "galore")),
        *(Subject(name, 1.0, claimed=True) for name in ("dct-adamw", "dct-adamw-random-basis")),
        Subject("variant", 1.0, parent="frugal"),
    ],
    count=4,
    factor=2.0,
    seeds=(1, 2),
)
TOKENS = (100, 200, 50)
LEVELS = {
    "adamw": 3.0,
    "frugal": 3.1,
    "frugal-density-0": 3.3,
    "galore": 3.4,
    "dct-adamw": 3.2,
    "dct-adamw-random-basis": 3.15,
    "variant": 3.05,
}


def state(
    report: Report,
    levels: Mapping[str, float],
    *,
    missing: tuple[str, ...] = (),
    unread: Collection[tuple[str, int]] = (),
    steep: tuple[str, ...] = (),
) -> None:
    """States the claims; ``missing`` arms have no test runs, ``unread`` lack one, ``steep`` ones want a higher rate."""

    def outcome(run: Run) -> Result:
        slope = -0.01 * math.log(run.rate) if run.arm in steep else 0.1 * math.log(run.rate) ** 2
        loss = levels[run.arm] + slope + 0.001 * run.seed
        units = tuple(loss * tokens * (1 + 0.05 * index) for index, tokens in enumerate(TOKENS))
        return Result(sum(units) / sum(TOKENS), units, TOKENS, 1000, 1.0, {})

    done: dict[Run, Result] = {}
    while waiting := PLAN.next_runs(done):
        done[waiting[0]] = outcome(waiting[0])
    left = {run: r for run, r in done.items() if run.arm not in missing or run.seed == 0}
    pretrain_claims.state(report, PLAN, {run: r for run, r in left.items() if (run.arm, run.seed) not in unread})


def claims(
    levels: Mapping[str, float], missing: tuple[str, ...] = (), unread: Collection[tuple[str, int]] = ()
) -> dict[str, Claim]:
    report = Report("pretrain_optimizers", [0, 1, 2])
    state(report, levels, missing=missing, unread=unread)
    return {claim.id: claim for claim in report.claims}


def test_all_claims_are_stated_whatever_is_known() -> None:
    names = {
        "frugal-ppl-gap-closed",
        "frugal-beats-galore-ppl",
        "dct-adamw-vs-random-basis-ppl-percent",
        "beyond-beats-parent",
    }
    assert set(claims(LEVELS)) == names
    report = Report("pretrain_optimizers", [0])
    pretrain_claims.state(report, PLAN, {})
    assert {claim.id for claim in report.claims} == names
    assert all(claim.value is None and not claim.holds for claim in report.claims)


def test_values_are_what_the_losses_say() -> None:
    found = claims(LEVELS)
    beats = found["frugal-beats-galore-ppl"]
    assert beats.value is not None and beats.value < -20 and beats.holds
    worse = found["dct-adamw-vs-random-basis-ppl-percent"]
    assert worse.value is not None and worse.value > 0 and not worse.holds
    assert found["beyond-beats-parent"].holds
    share = found["frugal-ppl-gap-closed"]
    scale = sum(t * (1 + 0.05 * i) for i, t in enumerate(TOKENS)) / sum(TOKENS)
    best = 0.1 * math.log(2**0.5) ** 2 + 0.0015  # nearest grid rates to 1, and the mean of the seeds
    none, some, all_ = (math.exp(scale * (LEVELS[arm] + best)) for arm in ("frugal-density-0", "frugal", "adamw"))
    assert share.value == pytest.approx((none - some) / (none - all_), abs=1e-4) and share.holds


def test_no_gap_no_share() -> None:
    equal = claims({**LEVELS, "adamw": 3.3})["frugal-ppl-gap-closed"]
    assert equal.value is None and not equal.holds and equal.interval is None


def test_an_arm_without_tested_seeds_leaves_its_claims_open() -> None:
    found = claims(LEVELS, missing=("galore",))
    assert found["frugal-beats-galore-ppl"].value is None
    assert found["frugal-ppl-gap-closed"].value is not None


def test_one_common_seed_is_no_comparison() -> None:
    found = claims(LEVELS, unread=[("galore", 2)])
    assert found["frugal-beats-galore-ppl"].value is None and not found["frugal-beats-galore-ppl"].holds
    assert found["frugal-ppl-gap-closed"].value is not None


def test_arms_whose_best_rate_is_at_an_edge_are_named() -> None:
    report = Report("pretrain_optimizers", [0, 1, 2])
    state(report, {**LEVELS, "galore": 3.4}, steep=("galore",))
    row = next(row for row in report.rows if "against galore" in str(row.get("says")))
    assert row["at_edge"] == ["galore"]
    assert all(row["at_edge"] == [] for row in report.rows if "density-0" in str(row.get("says")))
