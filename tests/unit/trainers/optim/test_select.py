"""Choosing the top r, and turning the state: a gather that equals the dense rotation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.optim.bases import build
from trainers.optim.select import arrange, choose, forget


def test_the_lowest_number_wins_among_equals() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0])
    assert choose(scores, 3).tolist() == [1, 3, 2]
    assert choose(torch.zeros(500), 4).tolist() == [0, 1, 2, 3]
    assert choose(scores, 6).tolist() == [1, 3, 2, 4, 5, 0]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.data())
def test_slots_hold_the_choice_and_those_that_stay_do_not_move(n: int, data: st.DataObject) -> None:
    r = data.draw(st.integers(1, n))
    order = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    current = torch.randperm(n, generator=order)[:r].to(torch.int32)
    chosen = torch.randperm(n, generator=order)[:r]
    index, fresh = arrange(current, chosen, n)
    assert index.dtype == torch.int32
    assert sorted(index.tolist()) == sorted(chosen.tolist())
    stay = set(current.tolist()) & set(chosen.tolist())
    for slot in range(r):
        assert bool(fresh[slot]) == (int(current[slot]) not in stay)
        if not fresh[slot]:
            assert index[slot] == current[slot]
    newcomers = index[fresh].tolist()
    assert newcomers == sorted(newcomers)


def test_turning_the_state_is_the_dense_rotation() -> None:
    n, r = 32, 10
    draw = torch.Generator().manual_seed(0)
    q = build("dct", n)
    current = torch.randperm(n, generator=draw)[:r]
    chosen = choose(torch.rand(n, generator=draw), r)
    mean, square = torch.randn(20, r, dtype=torch.float64, generator=draw), torch.rand(20, r, generator=draw).double()
    index, fresh = arrange(current, chosen, n)
    assert 0 < int(fresh.sum()) < r
    rotation = q[current] @ q[index].T
    for state in (mean, square):
        wanted = state @ rotation
        kept = state.clone()
        forget(state, fresh)
        assert torch.allclose(state, wanted, atol=1e-14)
        assert torch.equal(state[:, ~fresh], kept[:, ~fresh]), "bit for bit"
        assert not state[:, fresh].any()


def test_fresh_state_is_zero_whatever_was_there() -> None:
    state = torch.tensor([[float("nan"), 1.0, float("inf")]])
    forget(state, torch.tensor([True, False, True]))
    assert state.tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize(("hysteresis", "wanted"), [(0.0, {1, 3}), (0.05, {1, 3}), (0.2, {0, 3})])
def test_hysteresis_keeps_what_is_nearly_as_good(hysteresis: float, wanted: set[int]) -> None:
    scores = torch.tensor([10.0, 11.0, 1.0, 20.0])
    current = torch.tensor([0, 2], dtype=torch.int32)
    assert set(choose(scores, 2, current, hysteresis).tolist()) == wanted
    assert scores.tolist() == [10.0, 11.0, 1.0, 20.0], "the scores are left alone"
