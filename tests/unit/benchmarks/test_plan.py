"""What a study runs next, played through with made-up losses."""

from __future__ import annotations

import math
from collections.abc import Callable

from benchmarks.optimizers.plan import Plan, Subject
from benchmarks.optimizers.runs import TUNING_SEED, Result, Run

PLAN = Plan(
    [
        Subject("parent", 1.0, claimed=True),
        Subject("variant", 1.0, parent="parent"),
        Subject("heavy", 1.0, parent="parent"),
        Subject("other", 8.0),
    ],
    count=4,
    factor=2.0,
    seeds=(1, 2),
    more_seeds=(3,),
)
BEST = {"parent": 1.2, "variant": 1.4, "heavy": 1.6, "other": 8.5}


def result(run: Run) -> Result:
    """Best at the arm's BEST; ``heavy`` is best of all but holds more than its parent."""
    level = {"parent": 3.0, "variant": 2.0, "heavy": 1.0, "other": 4.0}[run.arm]
    loss = level + math.log(run.rate / BEST[run.arm]) ** 2
    return Result(loss, (loss,), (1,), 2000 if run.arm == "heavy" else 1000, 1.0, {})


def played(plan: Plan, outcome: Callable[[Run], Result] = result) -> dict[Run, Result]:
    done: dict[Run, Result] = {}
    while waiting := plan.next_runs(done):
        assert len(done) < 500, "the plan does not end"
        done[waiting[0]] = outcome(waiting[0])
    return done


def test_claims_come_first_then_variants_then_the_others_then_more_seeds() -> None:
    order = list(played(PLAN))

    def span(wanted: Callable[[Run], bool]) -> tuple[int, int]:
        places = [place for place, run in enumerate(order) if wanted(run)]
        return min(places), max(places)

    assert [run.arm for run in order[:4]] == ["parent"] * 4 and {run.seed for run in order[:4]} == {TUNING_SEED}
    first_tested = span(lambda run: run.arm == "parent" and run.seed == 1)[0]
    variants = span(lambda run: run.arm in ("variant", "heavy") and run.seed < 3)
    others = span(lambda run: run.arm == "other")
    more = span(lambda run: run.seed == 3)
    assert first_tested < variants[0] < others[0] and others[1] < more[0]
    assert {run.arm for run in order if run.seed == 3} == {"parent", "variant"}


def test_every_arm_gets_the_common_seeds_at_its_chosen_rate_alone() -> None:
    done = played(PLAN)
    for subject in PLAN.subjects:
        chosen = PLAN.rate(subject.name, done)
        assert chosen is not None
        assert {run.seed for run in done if run.arm == subject.name and run.rate == chosen} >= {0, 1, 2}
    assert {run.rate for run in done if run.arm == "other" and run.seed} == {PLAN.rate("other", done)}


def test_a_variant_that_holds_more_than_its_parent_is_out() -> None:
    done = played(PLAN)
    variant = PLAN.variant(done)
    assert variant is not None and variant.name == "variant"
    assert not [run for run in done if run.arm == "heavy" and run.seed == 3]
    light = played(PLAN, lambda run: Result(**{**vars(result(run)), "state_bytes": 1000}))
    found = PLAN.variant(light)
    assert found is not None and found.name == "heavy"


def test_the_parent_is_tuned_with_as_many_runs_as_all_its_variants() -> None:
    done = played(PLAN)
    spent = {name: len([r for r in done if r.arm == name and r.seed == TUNING_SEED]) for name in BEST}
    assert spent["parent"] == spent["variant"] + spent["heavy"]
    parent = PLAN.subject("parent")
    tuned, coarse = PLAN.tuned_rate(parent, done), PLAN.rate("parent", done)
    assert tuned is not None and coarse is not None
    assert abs(math.log(tuned / 1.2)) < abs(math.log(coarse / 1.2)), "refinement found a better rate"
    assert {run.seed for run in done if run.arm == "parent" and run.rate == tuned} == {0, 1, 2, 3}
    assert coarse in PLAN.scores(parent, done) and tuned not in PLAN.scores(parent, done)


def test_a_study_cut_off_anywhere_goes_on_to_the_same_end() -> None:
    whole = played(PLAN)
    for length in range(0, len(whole), 5):
        done = dict(list(whole.items())[:length])
        while waiting := PLAN.next_runs(done):
            done[waiting[-1]] = result(waiting[-1])  # out of order, as several workers end
        assert done == whole


def test_no_run_is_wanted_twice() -> None:
    done = played(PLAN)
    for length in range(0, len(done), 7):
        part = dict(list(done.items())[:length])
        wanted = PLAN.next_runs(part)
        assert len(wanted) == len(set(wanted)) and not set(wanted) & set(part)


def test_an_arm_that_diverges_everywhere_ends_the_study_all_the_same() -> None:
    def outcome(run: Run) -> Result:
        return Result(math.inf, (), (), 1000, 1.0, {}) if run.arm == "other" else result(run)

    done = played(PLAN, outcome)
    assert PLAN.rate("other", done) is not None
