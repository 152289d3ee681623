"""Keyed randomness: the numbers themselves, and that nothing but key and position decides them."""

from __future__ import annotations

import pytest
import torch

from trainers.optim import keyed


def test_the_mixer_is_splitmix64() -> None:
    # The first three outputs of the published generator from seed 0.
    wanted = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [number % 2**64 for number in keyed.noise(0, 3, 0).tolist()] == wanted


def test_keys_are_these_numbers() -> None:
    assert keyed.key(0) == 0xE220A8397B1DCDAF >> 1
    assert [keyed.key(0, 1), keyed.key(0, 0, 1), keyed.key(1, 0), keyed.key(-1, 2**40)] == KEYS
    assert all(0 <= one < 2**63 for one in KEYS)
    assert keyed.permutation(8, keyed.key(3)).tolist() == PERMUTATION


KEYS = [1359271138653402112, 5141285150980116405, 5943237039097324111, 7038632461959896337]
PERMUTATION = [7, 4, 5, 6, 0, 2, 1, 3]


def test_order_and_every_part_of_a_key_count() -> None:
    keys = {
        keyed.key(seed, *parts) for seed in range(20) for parts in ((), (0,), (1,), (0, 0), (0, 1), (1, 0), (2**63,))
    }
    assert len(keys) == 20 * 7


def test_a_position_has_its_number_whoever_asks() -> None:
    whole = keyed.noise(0, 1000, 5)
    assert torch.equal(keyed.noise(300, 400, 5), whole[300:400])
    assert whole.unique().numel() == 1000


@pytest.mark.parametrize(("n", "k"), [(1, 1), (10, 0), (10, 3), (10, 10), (1000, 250), (300_000, 77_777)])
def test_subset_permutation_and_threshold_agree(n: int, k: int) -> None:
    key = keyed.key(1, n)
    subset = keyed.subset(n, k, key)
    assert torch.equal(subset, keyed.permutation(n, key)[:k].sort().values)
    assert sorted(set(subset.tolist())) == subset.tolist()
    bound = keyed.threshold(n, k, key)
    below = torch.arange(n) if bound == 2**63 else (keyed.noise(0, n, key) < bound).nonzero().view(-1)
    assert torch.equal(below, subset)


def test_subsets_are_uniform() -> None:
    hits = torch.zeros(20)
    for number in range(2000):
        hits[keyed.subset(20, 5, keyed.key(0, number))] += 1
    # 2,000 draws of a quarter: 500 each, with a standard deviation of 19.
    assert (hits - 500).abs().max() < 80


def test_torchs_own_random_numbers_are_not_touched() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    keyed.subset(100, 10, keyed.key(0))
    torch.rand(3, generator=keyed.generator(keyed.key(0)))
    assert torch.equal(torch.get_rng_state(), before)
