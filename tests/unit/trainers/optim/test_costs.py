"""The page's formulas against what the optimizers keep: within one percent at every size."""

from __future__ import annotations

import pytest

from docs.costs import SIZES, Cost, costs, measured, predicted


@pytest.mark.parametrize("cost", list(costs()), ids=lambda cost: cost.method)
def test_state_is_what_the_formula_says(cost: Cost) -> None:
    for size in SIZES:
        # A clock of 24 bytes a matrix is all that signSGD keeps.
        assert measured(cost, size) == pytest.approx(predicted(cost, size), rel=0.01, abs=24 * 7 * size.blocks)
