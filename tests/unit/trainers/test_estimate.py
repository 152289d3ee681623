"""The estimated derivative against autograd's along the same directions, over the distances at which it is of use.

The band stated here is where the two are correlated by at least 0.99. Below it the two losses differ by the rounding of
float32 alone; above it the loss is no longer straight between the two points. The default distance lies inside.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from core.models.load import load
from core.models.quant.convert import quantise_model
from trainers.batch import collator
from trainers.dataset import read_examples
from trainers.loss import TokenLoss
from trainers.optim import Qzo
from trainers.optim.estimator import Estimator
from trainers.optim.noise import noise

DATA = Path(__file__).parents[3] / "configs" / "debug" / "data" / "harbour.jsonl"
# In units of the median: ends of the band, and distances beyond them.
BAND = (1e-5, 0.1)
BEYOND = (1e-7, 0.3)


class Measured:
    """A model, its loss on two rows, and the gradient of that loss by what is moved."""

    def __init__(self, kind: str) -> None:
        loaded = load("tiny-llama")
        if kind == "weights":
            self.parameters = list(loaded.model.parameters())
        else:
            loaded.model.requires_grad_(False)
            layers = quantise_model(loaded.model, kind, group=64)
            self.parameters = [layer.scales.requires_grad_() for layer in layers.values()]
        rows = read_examples(DATA, loaded.tokenizer, max_length=64, param="train_file")[1:3]
        self.batch = collator(pad_id=0, device=torch.device("cpu"))(rows)
        self.loss = TokenLoss(loaded.model)
        self.loss(**self.batch)[0].backward()
        self.scales = kind != "weights"

    def agreement(self, eps_rel: float, draws: int, **settings: Any) -> tuple[float, float]:
        """Correlation of d with the exact derivative along the same direction, and the slope of d on it."""
        records: list[Any] = []
        optimizer = Qzo(self.parameters, 0.0, seed=1, eps_rel=eps_rel, scales=self.scales, **settings)
        optimizer.on_step = records.append
        exact = []
        for step in range(1, draws + 1):
            optimizer.step(lambda: self.loss(**self.batch)[0])
            exact.append(sum(self._along(p, step, number) for number, p in enumerate(self.parameters)))
        pair = torch.tensor([[record.d_raw for record in records], exact], dtype=torch.float64)
        covariance = pair.cov()
        return float(pair.corrcoef()[0, 1]), float(covariance[0, 1] / covariance[1, 1])

    @staticmethod
    def _along(parameter: torch.nn.Parameter, step: int, number: int) -> float:
        assert parameter.grad is not None
        gradient = parameter.grad.double().flatten()
        return float(gradient @ noise(1, step, number, 0, len(gradient)).double())


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest) -> Measured:
    return Measured(request.param)


# Two hundred draws at each of three distances take fifteen seconds for four bits, and twice as long for all weights.
@pytest.mark.parametrize(
    "measured",
    ["int4", pytest.param("nf4", marks=pytest.mark.slow), pytest.param("weights", marks=pytest.mark.slow)],
    indirect=True,
)
def test_follows_the_derivative_in_the_whole_band(measured: Measured) -> None:
    low, high = BAND
    for eps_rel in (low, Estimator().eps_rel, high):
        correlation, slope = measured.agreement(eps_rel, 200)
        assert correlation >= 0.99, eps_rel
        assert slope == pytest.approx(1, abs=0.1), eps_rel
    assert low < Estimator().eps_rel < high
    for eps_rel in BEYOND:
        assert measured.agreement(eps_rel, 30)[0] < 0.97, eps_rel


@pytest.mark.parametrize("measured", ["weights"], indirect=True)
def test_follows_the_derivative_by_all_weights(measured: Measured) -> None:
    correlation, slope = measured.agreement(Estimator().eps_rel, 40)
    assert correlation >= 0.9999
    assert slope == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("measured", ["int4"], indirect=True)
def test_one_side_is_as_good_at_a_short_distance_and_bent_at_a_long_one(measured: Measured) -> None:
    assert measured.agreement(1e-3, 40, sides=1)[0] >= 0.999
    two, one = (measured.agreement(0.1, 40, sides=sides)[0] for sides in (2, 1))
    assert one < two
