"""Bases are orthonormal and what they are said to be; the FFT and the matrix product compute the same coordinates."""

from __future__ import annotations

import gc

import pytest
import torch

from tests.unit.trainers.optim.oracles import bases as oracle
from trainers.optim import bases
from trainers.optim.bases import build, get_basis
from trainers.optim.transform import plain_rows, tiles, use_fft, use_fft_for

CPU = torch.device("cpu")
SIZES = (1, 2, 3, 7, 8, 12, 49, 64, 129, 192, 576)


def _rows(count: int, n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("kind", ["dct", "hadamard", "identity"])
@pytest.mark.parametrize("n", SIZES)
def test_a_basis_is_its_definition(kind: str, n: int) -> None:
    wanted = {"dct": oracle.cosines, "hadamard": oracle.hadamard, "identity": oracle.identity}[kind](n)
    assert float((build(kind, n) - torch.from_numpy(wanted)).abs().max()) <= 1e-14


@pytest.mark.parametrize("kind", ["dct", "dct3", "random", "hadamard"])
@pytest.mark.parametrize("n", [*SIZES, 4096 // 4])
def test_a_basis_is_orthonormal(kind: str, n: int) -> None:
    matrix = build(kind, n)
    assert float((matrix @ matrix.T - torch.eye(n, dtype=torch.float64)).abs().max()) <= 1e-13


def test_cosines_of_a_large_size_stay_exact_in_float32() -> None:
    # Built in float32, k (2 j + 1) no longer fits 24 bits from n = 4096 on: entries are then off by up to 2.7e-5.
    basis = get_basis("dct", 8192, torch.float32, CPU)
    index = torch.tensor([1, 4095, 8190, 8191])
    k, j = index.double()[:, None], torch.arange(8192, dtype=torch.float64)
    exact = torch.cos(torch.pi * torch.remainder(k * (2 * j + 1), 4 * 8192) / (2 * 8192)) * (2 / 8192) ** 0.5
    assert float((basis.vectors(index).double() - exact).abs().max()) <= 2e-9


def test_hadamard_of_a_power_of_two_has_equal_magnitudes() -> None:
    assert torch.allclose(build("hadamard", 64).abs(), torch.full((64, 64), 1 / 8, dtype=torch.float64))
    assert torch.equal(build("hadamard", 9), build("dct", 9))


def test_random_bases_depend_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    first = build("random", 33, seed=4)
    torch.rand(5)
    assert torch.equal(first, build("random", 33, seed=4))
    assert not torch.equal(first, build("random", 33, seed=5))
    torch.set_rng_state(state)
    build("random", 33)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize(
    ("given", "computed", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-13),
        (torch.float32, torch.float32, 2e-6),
        (torch.bfloat16, torch.float32, 2e-6),
        (torch.float16, torch.float32, 2e-6),
    ],
)
def test_both_transforms_are_of_the_same_basis(
    n: int, norm: int, given: torch.dtype, computed: torch.dtype, tolerance: float
) -> None:
    x = _rows(37, n, given)
    exact = x.double() @ torch.from_numpy(oracle.cosines(n)).T
    scores = exact.abs().sum(0) if norm == 1 else exact.square().sum(0)
    index = torch.randperm(n, generator=torch.Generator().manual_seed(1))[: max(1, n // 3)]
    for transform in ("matmul", "fft"):
        basis = get_basis("dct", n, computed, CPU, transform=transform)
        found = basis.spectrum(plain_rows(x, computed), norm)  # type: ignore[arg-type]
        assert found.scores.dtype == computed
        assert float((found.take(torch.arange(n)).double() - exact).abs().max()) <= tolerance * 8
        assert float((found.scores.double() - scores).abs().max()) <= tolerance * float(scores.max()) * 4
        assert float((found.take(index).double() - exact[:, index]).abs().max()) <= tolerance * 8
        projected = basis.subspace(index).project(plain_rows(x, computed))
        assert float((projected.double() - exact[:, index]).abs().max()) <= tolerance * 8


@pytest.mark.parametrize("kind", bases.KINDS)
@pytest.mark.parametrize("right", [True, False])
def test_every_basis_leads_back(kind: str, right: bool) -> None:
    n = 24
    matrix = build(kind, n)
    x, index = _rows(10, n), torch.tensor([3, 0, 23, 12])
    basis = get_basis(kind, n, torch.float64, CPU)
    inside = basis.spectrum(plain_rows(x, torch.float64), 2).take(index)
    assert torch.allclose(inside, x @ matrix[index].T, atol=1e-13)
    assert torch.allclose(basis.vectors(index), matrix[index], atol=1e-15)
    start = _rows(n, 10).mT if not right else _rows(10, n)
    target = start.clone()
    basis.subspace(index).add_to(target, inside, alpha=-0.5, beta=0.9)
    assert torch.allclose(target, 0.9 * start - 0.5 * inside @ matrix[index], atol=1e-13)


@pytest.mark.parametrize("n", [*SIZES[3:], 200])
@pytest.mark.parametrize("right", [True, False])
def test_the_inverse_fft_is_the_product_with_the_vectors(n: int, right: bool) -> None:
    basis = get_basis("dct", n, torch.float64, CPU, transform="fft")
    assert isinstance(basis, bases.Cosines)
    for index in (torch.arange(n), torch.randperm(n, generator=torch.Generator().manual_seed(2))[: n // 2]):
        coordinates, begun = _rows(50, index.numel()), _rows(50, n) if right else _rows(n, 50).mT
        found = begun.clone()
        bases.CosineSpan(basis, index).add_to(found, coordinates, alpha=0.5, beta=0.25)
        assert torch.allclose(found, 0.25 * begun + 0.5 * coordinates @ build("dct", n)[index], atol=1e-13)
        rows = plain_rows(begun, torch.float64)
        assert torch.allclose(
            bases.CosineSpan(basis, index).project(rows), begun @ build("dct", n)[index].T, atol=1e-13
        )


def test_strided_input_gives_the_same_bits() -> None:
    x = _rows(50, 192, torch.float32)
    for kind in bases.KINDS:
        basis = get_basis(kind, 192, torch.float32, CPU)
        plain, turned = (basis.spectrum(plain_rows(given, torch.float32), 1) for given in (x, x.T.contiguous().T))
        if kind in ("dct", "identity"):
            assert torch.equal(plain.take(torch.arange(192)), turned.take(torch.arange(192)))
        assert torch.allclose(plain.scores, turned.scores)


def test_a_basis_is_shared_while_it_is_held_and_then_freed() -> None:
    one = get_basis("random", 16, torch.float32, CPU, seed=9)
    assert get_basis("random", 16, torch.float32, CPU, seed=9) is one
    assert get_basis("random", 16, torch.float64, CPU, seed=9) is not one
    assert get_basis("random", 16, torch.float32, CPU, seed=8) is not one
    del one
    gc.collect()
    assert not [name for name in bases._cache if name[0] == "random" and name[1] == 16]


def test_cosines_by_fft_hold_a_table_and_no_matrix() -> None:
    n = 1024
    assert get_basis("dct", n, torch.float32, CPU, transform="fft").nbytes <= 56 * n
    assert get_basis("dct", n, torch.float32, CPU, transform="matmul").nbytes == 4 * n * n
    assert get_basis("identity", n, torch.float32, CPU).nbytes == 0


def test_the_choice_of_transform_is_a_pure_function() -> None:
    assert use_fft(4096, torch.float32, CPU)
    assert use_fft(4096, torch.float32, torch.device("meta"))
    assert not use_fft(16, torch.float32, CPU)
    assert not use_fft(2048, torch.float32, torch.device("cuda"))
    assert not use_fft(8192, torch.float32, torch.device("xpu")), "an unmeasured device multiplies"
    assert use_fft_for(256, torch.float32, CPU)
    assert not use_fft_for(64, torch.float32, CPU)
    assert not use_fft_for(4096, torch.float32, torch.device("cuda"))


def test_tiles_cover_every_row_once() -> None:
    for count, width in ((0, 5), (1, 5), (17, 1 << 20), (5000, 300)):
        covered = [row for start, stop in tiles(count, width) for row in range(start, stop)]
        assert covered == list(range(count))


def test_an_unknown_basis_is_told_what_exists() -> None:
    with pytest.raises(ValueError, match="basis must be one of dct, random, hadamard, identity, not 'haar'"):
        build("haar", 4)
