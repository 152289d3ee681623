"""The table of normals: correctly rounded, the same everywhere, and of the moments that its page states."""

from __future__ import annotations

import hashlib
from statistics import NormalDist

import pytest
import torch

from trainers.optim.quantiles import normal_quantiles

DIGEST = "1cfbba1e07e34386a57626f82aeb43e6ed54ba70a3ea6b7d964dc66a841074a8"


def test_every_entry_is_the_quantile_rounded_once() -> None:
    exact = [NormalDist().inv_cdf((k + 0.5) / 65536) for k in range(65536)]
    assert torch.equal(normal_quantiles(), torch.tensor(exact, dtype=torch.float64).float())


def test_the_table_has_the_bits_that_journals_rely_on() -> None:
    assert hashlib.sha256(normal_quantiles().numpy().astype("<f4").tobytes()).hexdigest() == DIGEST


def test_moments_are_as_documented() -> None:
    z = normal_quantiles().double()
    variance = float((z**2).mean())
    assert float(z.sum()) == 0
    assert variance == pytest.approx(0.99998, abs=5e-6)
    assert float((z**4).mean()) / variance**2 == pytest.approx(2.9992, abs=5e-5)
    assert 4.3249 < float(z.max()) < 4.3250
    assert torch.equal(z, z.sort().values)
    assert torch.equal(z, -z.flip(0))
