"""The iteration on small Gram matrices is the iteration on the matrix itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.unit.trainers.optim.oracles import trion as oracle
from trainers.optim.newton_schulz import CONSTANT, SCHEDULED, orthogonalize

SHAPES = [(40, 8), (8, 40), (16, 16), (64, 1), (200, 33)]


def _matrix(shape: tuple[int, int], *, decades: float = 1.0) -> torch.Tensor:
    """Singular values spread over some decades."""
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(*shape, dtype=torch.float64, generator=draw)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    return (u * torch.logspace(0, -decades, s.numel(), dtype=torch.float64)) @ v * 7


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["constant", "scheduled"])
@pytest.mark.parametrize("decades", [0.5, 3.0])
def test_equals_the_oracle_in_float64(shape: tuple[int, int], name: str, decades: float) -> None:
    x = _matrix(shape, decades=decades)
    ours, theirs = (CONSTANT, oracle.MUON) if name == "constant" else (SCHEDULED, oracle.KERNEL)
    wanted = oracle.newton_schulz(x.numpy(), theirs)
    found = orthogonalize(x, ours).numpy()
    assert np.linalg.norm(found - wanted) <= 1e-9 * np.linalg.norm(wanted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "limit"), [(None, 2e-6), (torch.bfloat16, 2e-2)])
def test_lower_precision_stays_close(shape: tuple[int, int], dtype: torch.dtype | None, limit: float) -> None:
    x = _matrix(shape)
    wanted = oracle.newton_schulz(x.numpy(), oracle.MUON)
    found = orthogonalize(x.float(), dtype=dtype)
    assert found.dtype == torch.float32
    assert np.linalg.norm(found.double().numpy() - wanted) <= limit * np.linalg.norm(wanted)


def test_singular_values_end_near_one_and_singular_vectors_stay() -> None:
    x = _matrix((60, 12))
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    for coefficients, low, high in ((CONSTANT, 0.6, 1.3), (SCHEDULED, 0.95, 1.05)):
        turned = u.T @ orthogonalize(x, coefficients) @ v.T
        assert torch.allclose(turned, turned.diagonal().diag(), atol=1e-9)
        assert low < float(turned.diagonal().min()) <= float(turned.diagonal().max()) < high


def test_zero_stays_zero() -> None:
    for dtype in (None, torch.bfloat16):
        assert not orthogonalize(torch.zeros(6, 3), dtype=dtype).any()


def test_rows_in_parts_need_only_the_sum_of_gram_matrices() -> None:
    x = _matrix((30, 6))
    parts = [x[:11], x[11:]]
    gram = x.T @ x
    found = torch.cat([orthogonalize(part, total=lambda own: gram) for part in parts])
    assert torch.allclose(found, orthogonalize(x), atol=1e-12)
