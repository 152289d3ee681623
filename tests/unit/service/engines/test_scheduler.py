"""Admission, limits, cancellation and failure of the continuous batch."""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from service.engines import scheduler as module
from service.engines.base import EngineError, Message, Sampling, Steering, SteeringTerm
from service.engines.cache import BLOCK
from service.engines.sampling import choose
from service.engines.scheduler import Scheduler
from steering.vector import SteeringVector
from tests.unit.service.engines.conftest import Kit, make_vector, run

LONG = Sampling(temperature=0, max_tokens=400)


def refused(scheduler: Scheduler, request: Any) -> EngineError:
    with pytest.raises(EngineError) as caught:
        scheduler.submit(request)
    assert not scheduler.busy, "nothing of a refused request is kept"
    return caught.value


def test_a_prompt_too_long_is_refused_with_both_numbers(llama: Kit) -> None:
    scheduler = llama.scheduler()
    error = refused(scheduler, llama.request("1", "word " * 2000))
    assert error.code == "context_length_exceeded" and "1024" in error.message
    count = len(llama.ids("hello"))
    error = refused(scheduler, llama.request("2", "hello", sampling=Sampling(max_tokens=1024)))
    assert error.code == "context_length_exceeded" and str(1024 + count) in error.message
    small = llama.scheduler(cache_bytes=64 * llama.model.token_bytes)
    error = refused(small, llama.request("3", "hello", sampling=Sampling(max_tokens=64)))
    assert "64 tokens" in error.message, "the memory for keys and values bounds the context too"


def test_without_max_tokens_the_rest_of_the_context_is_used_up_to_a_bound(llama: Kit) -> None:
    sampling = Sampling(temperature=0)
    count = len(llama.ids("hello"))
    for limits, expected in (({"default_max_tokens": 7}, 7), ({"default_max_tokens": 5000}, 1024 - count)):
        scheduler = llama.scheduler(**limits)
        scheduler.submit(llama.request("1", "hello", sampling=sampling))
        assert scheduler.waiting[0].limit == expected


def test_the_whole_context_can_be_used(llama: Kit) -> None:
    request = llama.request("1", "the order is late " * 110, sampling=Sampling(temperature=0))
    last = run(llama.scheduler(default_max_tokens=5000), [request])["1"].chunks[-1]
    assert last.finish_reason == "length" and last.prompt_tokens + last.completion_tokens == 1024


def test_bad_steering_is_refused_before_anything_runs(llama: Kit, tmp_path: Path) -> None:
    scheduler = llama.scheduler()
    foreign = make_vector(llama.loaded, tmp_path / "f.safetensors", fingerprint="sha256:other")
    (tmp_path / "broken").write_bytes(b"not a vector")
    good = SteeringTerm(llama.vector, 1.0)
    cases: list[tuple[SteeringTerm, int, str]] = [
        (replace(good, path=foreign), 400, "steering_wrong_model"),
        (replace(good, path=str(tmp_path / "broken")), 400, "vector_not_usable"),
        (replace(good, layers=(2,)), 400, "steering_layer_out_of_range"),
        (replace(good, strength=float("inf")), 400, "steering_bad_strength"),
        (replace(good, strength=0.0), 422, "steering_touches_nothing"),
    ]
    for term, status, code in cases:
        error = refused(scheduler, llama.request("1", "hello", steering=Steering((term,))))
        assert (error.status, error.code, error.param) == (status, code, "steering")
    one = Sampling(max_tokens=1)
    late = Steering((replace(good, positions="generated"),))
    assert refused(scheduler, llama.request("1", "hello", steering=late, sampling=one)).status == 422


def test_a_full_queue_is_429_with_retry_after(llama: Kit) -> None:
    scheduler = llama.scheduler(rows=1, waiting=2)
    for i in range(3):
        scheduler.submit(llama.request(str(i), "hello"))
    with pytest.raises(EngineError) as full:
        scheduler.submit(llama.request("3", "hello"))
    assert full.value.status == 429 and full.value.retry_after is not None
    while scheduler.busy:
        scheduler.step()
    scheduler.submit(llama.request("4", "hello"))


def test_rows_wait_until_their_keys_and_values_fit(llama: Kit) -> None:
    scheduler = llama.scheduler(rows=8, cache_bytes=2 * BLOCK * llama.model.token_bytes)
    sampling = Sampling(temperature=0, max_tokens=90)
    requests = [llama.request(str(i), f"number {i}", sampling=sampling) for i in range(4)]
    for request in requests:
        scheduler.submit(request)
    most = 0
    while scheduler.busy:
        scheduler.step()
        most = max(most, len(scheduler.running))
        assert scheduler.stats()["cache_bytes"] <= 2 * scheduler.limits.cache_bytes
    assert most == 2


def test_keys_and_values_never_take_more_than_they_may(llama: Kit) -> None:
    limit = 9 * BLOCK * llama.model.token_bytes
    scheduler, dice, most = llama.scheduler(cache_bytes=limit), random.Random(3), 0
    for step in range(700):
        if step < 500 and step % 6 == 0:
            long = dice.random() < 0.2
            words, tokens = (dice.randint(60, 110), 200) if long else (dice.randint(1, 9), dice.randint(2, 60))
            sampling = Sampling(temperature=0, max_tokens=tokens)
            scheduler.submit(llama.request(f"{step}", "late order " * words, sampling=sampling))
        scheduler.step()
        most = max(most, scheduler.stats()["cache_bytes"])
    assert limit / 2 < most <= limit


def test_a_long_prompt_does_not_hold_up_the_rows_that_generate(llama: Kit) -> None:
    scheduler = llama.scheduler(prefill_tokens=32)
    scheduler.submit(llama.request("short", "hello", sampling=LONG))
    scheduler.step()
    scheduler.submit(llama.request("long", "the order is late and the box is lost " * 30))
    steps, generated = 0, len(scheduler.running[0].output)
    while len(scheduler.running) < 2:
        scheduler.step()
        steps += 1
        assert len(scheduler.running[0].output) == generated + steps, "every step is also a decode step"
    assert steps >= len(llama.ids("the order is late and the box is lost " * 30)) // 32


def test_cancelled_requests_leave_nothing_behind(llama: Kit) -> None:
    scheduler = llama.scheduler(rows=4, waiting=100, prefill_tokens=16)
    rng = random.Random(3)
    alive: list[str] = []
    for i in range(100):
        adapter = rng.choice([None, *llama.adapters])
        steering = Steering((SteeringTerm(llama.vector, 1.0),)) if rng.random() < 0.3 else None
        prompt = "the order is late " * rng.randint(1, 20)
        scheduler.submit(llama.request(str(i), prompt, adapter=adapter, steering=steering, sampling=LONG))
        alive.append(str(i))
        for _ in range(rng.randint(0, 2)):
            scheduler.step()
        if rng.random() < 0.7:
            scheduler.cancel(alive.pop(rng.randrange(len(alive))))
    for name in alive:
        scheduler.cancel(name)
    scheduler.cancel("never heard of")
    assert not scheduler.busy, "a cancelled request is gone before the next step"
    stats = scheduler.stats()
    assert (stats["rows"], stats["waiting"], stats["prefilling"], stats["cache_bytes"]) == (0, 0, 0, 0)
    assert not any(llama.model.adapters._users.values())
    assert scheduler.step() == []


def test_cancelling_a_neighbour_changes_no_row(llama: Kit) -> None:
    keep = llama.request("keep", "where is my parcel", sampling=Sampling(temperature=0, max_tokens=40))
    alone = run(llama.scheduler(), [keep])["keep"].text
    scheduler = llama.scheduler()
    for name in ("a", "b"):
        scheduler.submit(llama.request(name, "the order is late " * 9, sampling=LONG))
    scheduler.submit(keep)
    scheduler.submit(llama.request("c", "one", sampling=LONG))
    text, step = "", 0
    while any(s.id == "keep" for s in [*scheduler.waiting, *scheduler.running]) or step == 0:
        step += 1
        text += "".join(what.text for name, what in scheduler.step() if name == "keep")  # type: ignore[union-attr]
        if step in (3, 7, 12):
            scheduler.cancel("abc"[(3, 7, 12).index(step)])
    assert text == alone


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError, ValueError, TypeError, AssertionError, IndexError])
@pytest.mark.parametrize("when", ["prefill", "decode", "choice"])
def test_a_forward_that_fails_ends_its_requests_and_no_others(
    llama: Kit, monkeypatch: pytest.MonkeyPatch, when: str, kind: type[Exception]
) -> None:
    scheduler = llama.scheduler()
    scheduler.submit(llama.request("old", "hello", adapter=llama.adapters[0], sampling=LONG))
    scheduler.step()
    scheduler.submit(llama.request("new", "the order", adapter=llama.adapters[1]))
    real = llama.model.logits

    def failing(tokens: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if (max(map(len, tokens)) > 1) == (when == "prefill"):
            raise kind("out of memory")
        return real(tokens, *args, **kwargs)

    def choosing(logits: torch.Tensor, samplers: Any) -> list[int]:
        if new.sampler in samplers and not new.output:
            raise kind("out of memory")
        return choose(logits, samplers)

    (new,) = scheduler.waiting
    if when == "choice":
        monkeypatch.setattr(module, "choose", choosing)
    else:
        monkeypatch.setattr(llama.model, "logits", failing)
    failed = {name: what for name, what in scheduler.step() if isinstance(what, EngineError)}
    monkeypatch.undo()
    assert set(failed) == ({"old", "new"} if when == "decode" else {"new"})
    assert all(error.status == 503 and "out of memory" in error.message for error in failed.values())
    while scheduler.busy:
        scheduler.step()
    assert not any(llama.model.adapters._users.values())
    assert run(scheduler, [llama.request("later", "hello")])["later"].error is None


def test_steering_that_overflows_ends_only_its_row_and_poisons_no_later_one(llama: Kit, tmp_path: Path) -> None:
    vector = SteeringVector.load(Path(llama.vector))
    largest = max(float(d.abs().max()) for d in vector.directions.values())
    # Twice the largest number on the first layer's output: the keys and values of the second are no numbers.
    mlp = make_vector(llama.loaded, tmp_path / "mlp.safetensors", site="mlp")
    terms = [SteeringTerm(path, 3.4e38 / largest, positions="generated") for path in (llama.vector, mlp)]
    strong = Steering(tuple(terms))
    sampling = Sampling(temperature=0, max_tokens=30, logprobs=0)
    # The longest row stays, so that attention sees, masked, the columns that the broken row left to a shorter one.
    keep = llama.request("keep", "where is my parcel " * 20, sampling=sampling)
    later = llama.request("later", "one", sampling=sampling)
    alone = {name: run(llama.scheduler(), [r])[name] for name, r in (("keep", keep), ("later", later))}
    broken = llama.request("broken", "the order is late " * 5, sampling=sampling, steering=strong)
    together = run(llama.scheduler(), [keep, broken, later], at=[0, 1, 6])
    error = together["broken"].error
    assert error is not None and (error.status, error.code) == (400, "steering_too_strong")
    for name in ("keep", "later"):
        assert together[name].text == alone[name].text
        assert together[name].logprobs == pytest.approx(alone[name].logprobs, abs=1e-4)


def test_adapters_make_room_for_each_other_and_wait_while_all_are_in_use(
    llama: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama.model.adapters, "_limit", 1)
    copies = [str(shutil.copytree(a, tmp_path / Path(a).name)) for a in llama.adapters]
    requests = [llama.request(str(i), "hello", adapter=copies[i % 2]) for i in range(4)]
    answers = run(llama.scheduler(), requests)
    assert len(llama.model.adapters) == 1
    assert all(a.error is None for a in answers.values())
    assert answers["0"].text == answers["2"].text and answers["1"].text == answers["3"].text
    assert answers["0"].logprobs != answers["1"].logprobs


def test_an_adapter_of_another_base_and_one_that_is_gone_are_refused(llama: Kit, tmp_path: Path) -> None:
    from core.models.catalog import pull
    from tests.unit.service.engines.conftest import make_adapter

    foreign = make_adapter(str(pull("tiny-qwen3")), tmp_path / "foreign", 1)
    dora = make_adapter(llama.base, tmp_path / "dora", 1, use_dora=True)
    requests = [llama.request(str(i), "hello", adapter=a) for i, a in enumerate([foreign, "/nowhere", dora])]
    answers = run(llama.scheduler(), [*requests, llama.request("fine", "hello")])
    assert [answers[str(i)].error.code for i in range(3)] == [  # type: ignore[union-attr]
        "model_not_usable",
        "model_not_found",
        "model_not_usable",
    ]
    assert answers["fine"].error is None


def test_an_adapter_whose_shapes_do_not_fit_is_refused_before_a_layer_changes(llama: Kit, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(Path(llama.adapters[0]) / "adapter_model.safetensors")
    name = next(n for n in tensors if n.endswith("q_proj.lora_B.weight"))
    wrong = {
        "wide": tensors | {name: torch.zeros(65, 4)},
        "lost": {n.replace("layers.1", "layers.9"): t for n, t in tensors.items()},
    }
    requests = []
    for case, changed in wrong.items():
        target = shutil.copytree(llama.adapters[0], tmp_path / case)
        save_file({n: t.contiguous() for n, t in changed.items()}, target / "adapter_model.safetensors")
        requests.append(llama.request(case, "hello", adapter=str(target)))
    before = run(llama.scheduler(), [llama.request("fine", "hello")])["fine"]
    answers = run(llama.scheduler(), [*requests, llama.request("fine", "hello")])
    for case in wrong:
        error = answers[case].error
        assert error is not None and (error.status, error.code) == (400, "model_not_usable")
    assert answers["fine"].text == before.text


def test_an_adapter_that_lacks_weights_is_refused_and_taken_out(llama: Kit, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from core.models.load import Incomplete, load
    from service.engines.model import TransformersModel

    target = Path(shutil.copytree(llama.adapters[0], tmp_path / "lacks"))
    tensors = load_file(target / "adapter_model.safetensors")
    gone = sorted(name for name in tensors if name.endswith("q_proj.lora_A.weight"))[0]
    save_file({n: t for n, t in tensors.items() if n != gone}, target / "adapter_model.safetensors")
    loaded = load(llama.base)
    kit = replace(llama, loaded=loaded, model=TransformersModel(loaded))
    try:
        plain = run(kit.scheduler(), [kit.request("1", "hello")])["1"]
        for first in (True, False):
            error = run(kit.scheduler(), [kit.request("2", "hello", adapter=str(target))])["2"].error
            assert error is not None and (error.status, error.code) == (400, "model_not_usable")
            assert gone in error.message
            assert len(kit.model.adapters) == (0 if first else 1)
            assert run(kit.scheduler(), [kit.request("1", "hello")])["1"].logprobs == plain.logprobs
            if first:
                assert run(kit.scheduler(), [kit.request("3", "hello", adapter=kit.adapters[0])])["3"].error is None
    finally:
        kit.model.close()
    with pytest.raises(Incomplete, match="it lacks 1 of 12 tensors"):
        load(llama.base, adapter=target)


def test_an_adapter_replaced_by_another_of_its_name_is_loaded_anew(llama: Kit, tmp_path: Path) -> None:
    target = Path(shutil.copytree(llama.adapters[0], tmp_path / "replaced"))
    weights, other = target / "adapter_model.safetensors", Path(llama.adapters[1]) / "adapter_model.safetensors"
    about = weights.stat()
    assert other.stat().st_size == about.st_size
    asked = llama.request("1", "hello", adapter=str(target))
    first = run(llama.scheduler(), [asked])["1"]
    held = len(llama.model.adapters)
    assert run(llama.scheduler(), [asked])["1"].logprobs == first.logprobs
    assert len(llama.model.adapters) == held, "the same file is held once"
    weights.write_bytes(other.read_bytes())
    os.utime(weights, ns=(about.st_atime_ns, about.st_mtime_ns + 1))  # the time alone tells them apart
    second = run(llama.scheduler(), [asked])["1"]
    assert second.logprobs != first.logprobs
    # The size alone: the first file's numbers behind a header with room in it, at the second one's time.
    data = (Path(llama.adapters[0]) / "adapter_model.safetensors").read_bytes()
    header = int.from_bytes(data[:8], "little")
    weights.write_bytes((header + 8).to_bytes(8, "little") + data[8 : 8 + header] + b" " * 8 + data[8 + header :])
    os.utime(weights, ns=(about.st_atime_ns, about.st_mtime_ns + 1))
    assert run(llama.scheduler(), [asked])["1"].logprobs == first.logprobs


def test_chat_templates_roles_and_refusals(llama: Kit) -> None:
    scheduler = llama.scheduler()
    base = llama.request("1", "")
    scheduler.submit(replace(base, prompt=(Message("developer", "Be kind."), Message("user", "hi"))))
    scheduler.submit(replace(base, id="2", prompt=(Message("system", "Be kind."), Message("user", "hi"))))
    first, second = scheduler.waiting
    assert first.prompt == second.prompt
    text = llama.loaded.tokenizer.decode(first.prompt)
    assert text.endswith("<|im_start|>assistant\n")
    for name in "12":
        scheduler.cancel(name)
    error = refused(scheduler, replace(base, prompt=(Message("nobody", "hi"),)))
    assert (error.status, error.code) == (400, "chat_template_error")
    assert refused(scheduler, replace(base, prompt="")).code == "empty_prompt"
    for prompt in ("half a pair \ud83d", (Message("user", "half a pair \ud83d"),)):
        assert refused(scheduler, replace(base, prompt=prompt)).status == 400
