"""The nearest name: what is suggested, what is not, and that hostile names cost nothing."""

from __future__ import annotations

import time

import pytest

from core.nearest import choices, nearest

NAMES = ("n_epochs", "batch_size", "learning_rate", "rank")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("rnk", "rank"),
        ("RANK", "rank"),
        ("batch-size", "batch_size"),
        ("BatchSize", "batch_size"),
        ("epochs", "n_epochs"),
        ("learning_rte", "learning_rate"),
        ("zzz", None),
        ("", None),
    ],
)
def test_the_nearest_name(name: str, meant: str | None) -> None:
    assert nearest(name, NAMES) == meant


def test_the_names_own_spelling_is_suggested() -> None:
    assert nearest("q_PROJ", ["Q-proj", "other"]) == "Q-proj"


def test_the_suggestion_comes_first_and_the_list_keeps_its_order() -> None:
    assert choices("rnk", NAMES) == f"did you mean rank? These exist: {', '.join(NAMES)}"
    assert choices("zzz", NAMES) == f"these exist: {', '.join(NAMES)}"
    assert choices("rnk", ["rank"], prefix="optimizer.") == "did you mean optimizer.rank? These exist: rank"
    assert choices("x", []) == "these exist: none"


def test_a_long_list_is_cut_but_searched_wholly() -> None:
    text = choices("name_57x", (f"name_{number}" for number in (*range(80), 3)), most=2)
    assert text == "did you mean name_57? These exist: name_0, name_1 and 78 more"


def test_a_huge_name_is_answered_at_once() -> None:
    began = time.perf_counter()
    assert nearest("rank" * 1_000_000, [f"{name}_{number}" for name in NAMES for number in range(200)]) is None
    assert time.perf_counter() - began < 2
