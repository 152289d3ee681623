"""The state machine as data."""

from __future__ import annotations

import itertools

import pytest

from service.db.tables import Job
from service.jobs.states import ACTIVE, STATES, TERMINAL, TRANSITIONS, IllegalTransition, check


def test_every_state_is_described_and_has_transitions() -> None:
    assert STATES.keys() == TRANSITIONS.keys()
    assert set(itertools.chain(*TRANSITIONS.values())) | {"validating_files"} == STATES.keys()


def test_terminal_states_are_the_three_of_the_wire() -> None:
    assert TERMINAL == {"succeeded", "failed", "cancelled"}
    assert not ACTIVE & TERMINAL


@pytest.mark.parametrize("state", sorted(STATES))
def test_an_end_can_be_reached_from_everywhere(state: str) -> None:
    reached = {state}
    while more := set(itertools.chain(*(TRANSITIONS[s] for s in reached))) - reached:
        reached |= more
    assert reached & TERMINAL


def test_illegal_transition_is_a_value_error_that_says_what_is_allowed() -> None:
    for source, target in itertools.product(STATES, STATES):
        if target in TRANSITIONS[source]:
            check("ftjob-1", source, target)
        else:
            with pytest.raises(IllegalTransition, match=f"is {source} and cannot be"):
                check("ftjob-1", source, target)
    assert issubclass(IllegalTransition, ValueError)


def test_the_table_knows_the_same_states() -> None:
    (constraint,) = [c for c in Job.__table__.constraints if str(c.name) == "ck_jobs_status"]
    assert {name for name in STATES if f"'{name}'" in str(constraint.sqltext)} == STATES.keys()
