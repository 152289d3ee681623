"""Draws follow the distribution asked for, from a generator of the request's own."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engines.base import Sampling
from service.engines.sampling import Sampler, choose
from service.engines.sequence import logprobs
from tests.unit.service.engines.conftest import Kit, run

LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, -30.0])


def draws(sampling: Sampling, count: int = 4000, logits: torch.Tensor = LOGITS) -> list[float]:
    sampler = Sampler(sampling)
    seen = Counter(choose(logits[None], [sampler])[0] for _ in range(count))
    return [seen[i] / count for i in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax_of_the_scaled_logits(temperature: float) -> None:
    expected = torch.softmax(LOGITS / temperature, 0).tolist()
    assert draws(Sampling(temperature=temperature, seed=1)) == pytest.approx(expected, abs=0.03)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 0.999))
def test_the_nucleus_is_the_fewest_likeliest_tokens_that_hold_top_p(top_p: float) -> None:
    probabilities = torch.softmax(LOGITS.double(), 0)
    inside = int((probabilities.cumsum(0) < top_p).sum()) + 1  # LOGITS are sorted
    seen = draws(Sampling(top_p=top_p, seed=2), 200)
    assert sum(seen[:inside]) == pytest.approx(1.0)


def test_a_nucleus_wider_than_the_first_look_is_whole() -> None:
    flat = torch.zeros(4096)
    sampler = Sampler(Sampling(top_p=0.9, seed=1))
    assert max(choose(flat[None], [sampler])[0] for _ in range(300)) > 2048


def test_temperature_zero_takes_the_likeliest() -> None:
    assert draws(Sampling(temperature=0), 20)[0] == 1.0


def test_penalties_count_generated_tokens_only() -> None:
    sampling = Sampling(temperature=0, presence_penalty=0.4, frequency_penalty=0.4)
    sampler = Sampler(sampling)
    got = [choose(LOGITS[None], [sampler])[0] for _ in range(4)]
    # 0: 2.0, then 2 - 0.8 = 1.2 (still first), then 2 - 1.2 = 0.8 < 1.0, then 1: 1 - 0.8 = 0.2 < 0.8
    assert got == [0, 0, 1, 0]
    assert LOGITS[0] == 2.0, "the raw logits stay as they are"


def test_a_seed_gives_the_same_draws_whoever_is_beside_it() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, 3, 50, generator=generator)

    def sampler(seed: int | None) -> Sampler:
        return Sampler(Sampling(temperature=1.0, top_p=0.95, seed=seed))

    alone, mine = sampler(7), sampler(7)
    first = [choose(step[:1], [alone])[0] for step in rows]
    others = [sampler(None), sampler(3)]
    beside = [choose(step, [mine, *others])[0] for step in rows]
    assert first == beside
    assert first != [choose(step[:1], [s])[0] for s in [sampler(8)] for step in rows]


def test_a_seed_and_its_negative_draw_differently() -> None:
    assert draws(Sampling(seed=7), 50) == draws(Sampling(seed=7), 50)
    assert draws(Sampling(seed=7), 50) != draws(Sampling(seed=-7), 50)
    assert draws(Sampling(seed=-7), 50) == draws(Sampling(seed=-7), 50)


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    made = logprobs(logits, [5, 6, 7], [None, 0, 3])
    table = torch.log_softmax(logits, -1)
    assert made[0] is None
    assert made[1] is not None and made[1].top == () and made[1].value == pytest.approx(float(table[1, 6]))
    assert made[2] is not None and [t for t, _ in made[2].top] == table[2].topk(3).indices.tolist()


def test_seeds_reproduce_whole_answers_in_any_company(llama: Kit) -> None:
    def request(name: str, seed: int | None) -> object:
        return llama.request(name, "the order", sampling=Sampling(temperature=1.0, top_p=0.9, seed=seed, max_tokens=20))

    alone = run(llama.scheduler(), [request("a", 5)])["a"].text  # type: ignore[list-item]
    company = [request("a", 5), request("b", 6), request("c", None), request("d", None), request("e", 5)]
    answers = run(llama.scheduler(), company, at=[3, 0, 0, 1, 6])  # type: ignore[arg-type]
    assert answers["a"].text == answers["e"].text == alone != answers["b"].text
    assert answers["c"].text != answers["d"].text
