"""Rows of a batch do not know each other: each gets what it gets alone, whoever joins, leaves or is steered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.models.sites import blocks
from service.engines.base import Request, Sampling, Steering, SteeringTerm
from service.engines.model import Row
from service.engines.vectors import Vectors
from steering.vector import SteeringVector
from tests.unit.service.engines.conftest import Answer, Kit, run

PROMPTS = (
    "Where is my parcel?",
    "The gardener painted seven wooden chairs before breakfast. " * 16,  # longer than the window of tiny-gemma3
    "one",
    "Thank you for writing. We will look into it today. Please tell me your order number, " * 3,
    "12 + 30 = 42; ",
)
STEPS = 24


def steer(kit: Kit, strength: float = 2.0, **kwargs: Any) -> Steering:
    return Steering((SteeringTerm(kit.vector, strength, **kwargs),))


def mixed(kit: Kit) -> list[Request]:
    a, b = kit.adapters
    sampling = Sampling(temperature=0, max_tokens=STEPS, logprobs=2)
    kinds: list[dict[str, Any]] = [{}, {"adapter": a}, {"adapter": b}, {"steering": steer(kit)}]
    kinds.append({"adapter": a, "steering": steer(kit, -3.0)})
    return [kit.request(str(i), PROMPTS[i], sampling=sampling, **kind) for i, kind in enumerate(kinds)]


def same(got: Answer, alone: Answer) -> int:
    """Asserts equality up to near ties; counts the answers that part at one."""
    assert got.error is None and alone.error is None
    pairs = list(zip(got.chunks, alone.chunks, strict=False))
    for here, there in pairs:
        for x, y in zip(here.logprobs, there.logprobs, strict=True):
            gap = y.top[0].logprob - y.top[1].logprob
            if x.token != y.token:
                assert gap < 1e-3, (x, y)
                return 1
            assert abs(x.logprob - y.logprob) < 1e-4
    assert got.text == alone.text and len(got.chunks) == len(alone.chunks)
    assert got.chunks[-1].completion_tokens == alone.chunks[-1].completion_tokens
    return 0


def test_a_mixed_batch_gives_each_row_what_it_gets_alone(kit: Kit) -> None:
    requests = mixed(kit)
    alone = [run(kit.scheduler(), [r])[r.id] for r in requests]
    together = run(kit.scheduler(), requests)
    parted = sum(same(together[r.id], one) for r, one in zip(requests, alone, strict=True))
    assert parted <= 1
    texts = [one.text for one in alone]
    plain = run(kit.scheduler(), [kit.request("p", r.prompt, sampling=r.sampling) for r in requests[:1]])
    assert texts[0] == plain["p"].text
    for request, one in list(zip(requests, alone, strict=True))[1:]:
        base = run(kit.scheduler(), [Request("x", kit.base, request.prompt, sampling=request.sampling)])["x"]
        assert base.logprobs != one.logprobs, "the adapter or vector changed nothing: the test would prove nothing"


def test_an_unsteered_row_is_bitwise_the_same_beside_a_steered_one(kit: Kit) -> None:
    spec = Vectors().spec(steer(kit, 5.0))
    name = kit.model.adapters.acquire(kit.adapters[0])
    results = []
    for steered in (False, True):
        states = [kit.model.steering.open(spec, prompt_length=9) if steered and i in (1, 3) else None for i in range(4)]
        rows = [Row(name if i == 2 else None, state) for i, state in enumerate(states)]
        cache = kit.model.new_cache(4)
        seen = [kit.model.logits([kit.ids(p)[:9] for p in PROMPTS[:4]], cache, rows)]
        for step in range(6):
            seen.append(kit.model.logits([[40 + step + i] for i in range(4)], cache, rows))
        results.append(torch.stack(seen, 1))
    kit.model.adapters.release(name)
    without, beside = results
    assert torch.equal(without[0], beside[0]) and torch.equal(without[2], beside[2])
    assert not torch.allclose(without[1], beside[1]) and not torch.allclose(without[3], beside[3])


def whole(text: str) -> str:
    """Without half a character at the end, which the engine never lets out."""
    return text.rstrip("\ufffd")


def generate(kit: Kit, prompt: str, steps: int = STEPS) -> str:
    ids = torch.tensor([kit.ids(prompt)])
    with torch.inference_mode():
        kit.model.steering.rows([])
    kit.model.adapters.names([None])
    made = kit.loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, do_sample=False)
    return str(kit.loaded.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("chunk", [16, 256])
def test_greedy_equals_transformers_generate(kit: Kit, chunk: int) -> None:
    sampling = Sampling(temperature=0, max_tokens=STEPS)
    requests = [kit.request(str(i), p, sampling=sampling) for i, p in enumerate(PROMPTS)]
    answers = run(kit.scheduler(prefill_tokens=chunk), requests)
    for request in requests:
        assert whole(answers[request.id].text) == whole(generate(kit, str(request.prompt)))


def test_a_steered_row_equals_a_plain_forward_hook(kit: Kit) -> None:
    vector = SteeringVector.load(Path(kit.vector))
    request = kit.request(
        "s", PROMPTS[3], sampling=Sampling(temperature=0, max_tokens=STEPS), steering=steer(kit, 1.5, layers=(1,))
    )
    steered = run(kit.scheduler(prefill_tokens=32), [kit.request("n", PROMPTS[0]), request])["s"]

    def hook(module: object, args: object, output: Any) -> Any:
        delta = 1.5 * vector.directions[1]
        return (output[0] + delta, *output[1:]) if isinstance(output, tuple) else output + delta

    handle = blocks(kit.loaded.model)[1].register_forward_hook(hook)
    try:
        expected = generate(kit, PROMPTS[3])
    finally:
        handle.remove()
    assert whole(steered.text) == whole(expected) != whole(generate(kit, PROMPTS[3]))
    receipt = steered.chunks[-1].receipt
    assert receipt is not None and receipt.layers == (1,) and receipt.mean_relative_shift > 0
    assert receipt.tokens == len(kit.ids(PROMPTS[3])) + steered.chunks[-1].completion_tokens - 1


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_joining_and_leaving_changes_no_row(kit: Kit, data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 6))
    requests, at = [], []
    for i in range(count):
        kind = data.draw(st.sampled_from(["plain", "a", "b", "steered", "sampled"]))
        sampling = Sampling(
            temperature=0.9 if kind == "sampled" else 0, max_tokens=data.draw(st.integers(1, 20)), seed=i, logprobs=2
        )
        requests.append(
            kit.request(
                str(i),
                data.draw(st.sampled_from(PROMPTS)),
                sampling=sampling,
                adapter=kit.adapters["ab".index(kind)] if kind in "ab" else None,
                steering=steer(kit) if kind == "steered" else None,
            )
        )
        at.append(data.draw(st.integers(0, 12)))
    limits = {"rows": data.draw(st.integers(1, 4)), "prefill_tokens": data.draw(st.sampled_from([8, 64, 256]))}
    together = run(kit.scheduler(**limits), requests, at=at)
    for request in requests:
        same(together[request.id], run(kit.scheduler(), [request])[request.id])
