"""Steering a batch: each row is what it would be alone with a plain hook, and nobody else's bits move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from torch import nn

from core.models.load import Loaded
from core.models.sites import SITES, blocks, site_modules
from steering.apply import Receipt, RowSpec, SteeringError, Term, steer
from steering.vector import SteeringVector
from tests.unit.steering.runs import run_batch, run_plain

PROMPTS = ([5, 6, 7, 8, 9], [110, 11, 12], [20, 21, 22, 23, 24, 25, 26, 27], [31, 32, 33, 34], [600, 40])
MakeVector = Callable[..., SteeringVector]
Models = Callable[..., Loaded]


def mixed(loaded: Loaded, make_vector: MakeVector) -> list[RowSpec | None]:
    """Five rows of every kind: one term, none, sites and phases and norms, two that overlap, one layer."""
    block, other = make_vector(loaded, 1), make_vector(loaded, 2)
    attention, mlp = make_vector(loaded, 3, site="attention"), make_vector(loaded, 4, site="mlp")
    return [
        RowSpec((Term(block, 0.5),)),
        None,
        RowSpec((Term(attention, 0.3, (1,), "generated"), Term(mlp, -1.0, None, "prompt")), preserve_norm=True),
        RowSpec((Term(block, 1.0), Term(other, -0.5, (0,), "generated")), preserve_norm=True),
        RowSpec((Term(other, 0.7, (1,), "prompt"),)),
    ]


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def logits(loaded: Loaded) -> torch.Tensor:
    with torch.inference_mode():
        return loaded.model(input_ids=torch.tensor([PROMPTS[2]])).logits.clone()


def test_each_row_of_a_mixed_batch_is_what_it_is_alone_with_a_plain_hook(
    loaded: Loaded, make_vector: MakeVector
) -> None:
    specs = mixed(loaded, make_vector)
    batch = run_batch(loaded, PROMPTS, specs)
    for row, (prompt, spec) in enumerate(zip(PROMPTS, specs, strict=True)):
        alone, shifts = run_plain(loaded, prompt, spec)
        assert batch.tokens[row] == alone.tokens[0]
        assert (batch.logits[row] - alone.logits[0]).abs().max() < 1e-5
        receipt = batch.receipts[row]
        if spec is None:
            assert receipt is None
        else:
            assert receipt is not None
            assert receipt.mean_relative_shift == pytest.approx(sum(shifts) / len(shifts), rel=1e-5)


def test_receipts_name_layers_and_tokens(models: Models, make_vector: MakeVector) -> None:
    loaded = models()
    receipts = run_batch(loaded, PROMPTS, mixed(loaded, make_vector), steps=4).receipts
    counted = [None if r is None else (r.layers, r.tokens) for r in receipts]
    # 4 tokens are generated, so 3 are fed back: "all" is prompt + 3, "prompt" the prompt, "generated" 3.
    assert counted == [((0, 1), 8), None, ((0, 1), 11), ((0, 1), 7), ((1,), 2)]


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unsteered_row_keeps_every_bit_beside_steered_ones(
    loaded: Loaded, make_vector: MakeVector, dtype: torch.dtype, norms: bool
) -> None:
    # Without a row that preserves its norm, float32 takes a shorter path.
    specs = [s and replace(s, preserve_norm=s.preserve_norm and norms) for s in mixed(loaded, make_vector)]
    loaded.model.to(dtype)
    try:
        quiet = run_batch(loaded, PROMPTS, [None] * len(PROMPTS))
        beside = run_batch(loaded, PROMPTS, specs)
    finally:
        loaded.model.to(torch.float32)
    assert torch.equal(quiet.logits[1], beside.logits[1])
    assert not torch.equal(quiet.logits[0], beside.logits[0])


def test_prefill_in_chunks_and_more_padding_change_nothing(loaded: Loaded, make_vector: MakeVector) -> None:
    specs = mixed(loaded, make_vector)
    whole = run_batch(loaded, PROMPTS, specs)
    for chunk, padding in ((3, 0), (1, 0), (None, 5), (4, 3)):
        other = run_batch(loaded, PROMPTS, specs, chunk=chunk, extra_padding=padding)
        assert other.tokens == whole.tokens
        assert (other.logits - whole.logits).abs().max() < 1e-5
        for a, b in zip(other.receipts, whole.receipts, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert (a.layers, a.tokens) == (b.layers, b.tokens)
                assert a.mean_relative_shift == pytest.approx(b.mean_relative_shift, rel=1e-5)


def test_the_same_run_gives_the_same_bits(models: Models, make_vector: MakeVector) -> None:
    loaded = models()
    first, second = (run_batch(loaded, PROMPTS, mixed(loaded, make_vector)) for _ in range(2))
    assert torch.equal(first.logits, second.logits)
    assert first.receipts == second.receipts


def test_preserve_norm_acts_once_after_all_terms(models: Models, make_vector: MakeVector) -> None:
    loaded = models()
    a, b = make_vector(loaded, 1, layers=(1,)), make_vector(loaded, 2, layers=(1,))
    spec = RowSpec((Term(a, 2.0), Term(b, -1.0)), preserve_norm=True)
    seen: list[torch.Tensor] = []
    ids = torch.tensor([PROMPTS[0]])
    with torch.inference_mode(), steer(loaded.model, fingerprint=loaded.fingerprint) as steering:
        for state in (None, steering.open(spec, prompt_length=5)):
            steering.rows([state])
            handle = blocks(loaded.model)[1].register_forward_hook(lambda m, args, out: seen.append(out.clone()))
            steering.positions(torch.arange(5)[None], torch.ones(1, 5, dtype=torch.bool))
            loaded.model(input_ids=ids)
            handle.remove()
    before, after = seen
    assert torch.allclose(after.norm(dim=-1), before.norm(dim=-1), rtol=1e-6)
    added = before + 2.0 * a.directions[1] - b.directions[1]
    assert torch.allclose(nn.functional.cosine_similarity(after, added, dim=-1), torch.ones(1, 5), atol=1e-6)


def test_with_no_steered_row_nothing_is_hooked(models: Models, make_vector: MakeVector) -> None:
    loaded = models()
    before = hooks(loaded.model)
    with steer(loaded.model, fingerprint=loaded.fingerprint) as steering:
        state = steering.open(RowSpec((Term(make_vector(loaded, layers=(1,)), 1.0),)), prompt_length=2)
        steering.rows([None, None])
        assert hooks(loaded.model) == before
        steering.rows([None, state])
        assert hooks(loaded.model) == before + 1  # one layer, one hook
        steering.rows([None, None])
        assert hooks(loaded.model) == before


def test_after_the_scope_the_model_is_bitwise_as_before(loaded: Loaded, make_vector: MakeVector) -> None:
    before, count = logits(loaded), hooks(loaded.model)
    run_batch(loaded, PROMPTS, mixed(loaded, make_vector))
    assert hooks(loaded.model) == count
    assert torch.equal(logits(loaded), before)


def test_hooks_come_off_when_the_body_fails(models: Models, make_vector: MakeVector) -> None:
    loaded = models()
    before, count = logits(loaded), hooks(loaded.model)
    with pytest.raises(KeyError, match="mine"), steer(loaded.model, fingerprint=loaded.fingerprint) as steering:
        steering.rows([steering.open(RowSpec((Term(make_vector(loaded), 1.0),)), prompt_length=2)])
        raise KeyError("mine")
    assert hooks(loaded.model) == count
    assert torch.equal(logits(loaded), before)


def test_a_hook_that_cannot_be_set_shows_its_own_error_and_leaves_none_behind(
    models: Models, make_vector: MakeVector, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = models()
    count = hooks(loaded.model)

    def refuse(hook: object) -> None:
        raise MemoryError("no hook today")

    monkeypatch.setattr(blocks(loaded.model)[1], "register_forward_hook", refuse)
    with pytest.raises(MemoryError, match="no hook today"):
        with steer(loaded.model, fingerprint=loaded.fingerprint) as steering:
            steering.rows([steering.open(RowSpec((Term(make_vector(loaded), 1.0),)), prompt_length=2)])
    assert hooks(loaded.model) == count
    with steer(loaded.model, fingerprint=loaded.fingerprint):
        pass  # the model can be steered again


def test_a_forward_that_was_not_announced_is_an_error_not_a_silent_miss(
    models: Models, make_vector: MakeVector
) -> None:
    loaded = models()
    ids, places, valid = torch.tensor([[5, 6]]), torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool)
    with torch.inference_mode(), steer(loaded.model, fingerprint=loaded.fingerprint) as steering:
        state = steering.open(RowSpec((Term(make_vector(loaded), 1.0, None, "generated"),)), prompt_length=2)
        steering.rows([state])
        with pytest.raises(RuntimeError, match="unannounced"):
            loaded.model(input_ids=ids)
        steering.positions(places, valid)
        loaded.model(input_ids=ids)
        with pytest.raises(RuntimeError, match="unannounced"):  # even where the last forward had nothing to do
            loaded.model(input_ids=ids)
        steering.positions(places + 2, valid)
        with pytest.raises(RuntimeError, match="announced"):
            loaded.model(input_ids=torch.tensor([[5, 6, 7]]))
        with pytest.raises(ValueError, match="rows"):
            steering.positions(torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool))
        assert state.receipt() == Receipt((), 0, 0.0)


def test_a_model_is_steered_by_one_scope_at_a_time(models: Models, make_vector: MakeVector) -> None:
    loaded = models()
    with steer(loaded.model, fingerprint=loaded.fingerprint) as outer:
        state = outer.open(RowSpec((Term(make_vector(loaded), 1.0),)), prompt_length=2)
        with pytest.raises(RuntimeError, match="twice"), steer(loaded.model, fingerprint=loaded.fingerprint):
            pass
    with steer(loaded.model, fingerprint=loaded.fingerprint) as inner, pytest.raises(ValueError, match="scope"):
        inner.rows([state])


def test_a_forward_that_fails_half_way_counts_nothing(models: Models, make_vector: MakeVector) -> None:
    loaded = models()
    ids, places, valid = torch.tensor([[5, 6]]), torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool)

    def fail(module: object, args: object) -> None:
        raise OSError("the machine is on fire")

    with torch.inference_mode(), steer(loaded.model, fingerprint=loaded.fingerprint) as steering:
        state = steering.open(RowSpec((Term(make_vector(loaded), 1.0),)), prompt_length=2)
        steering.rows([state])
        handle = blocks(loaded.model)[1].register_forward_pre_hook(fail)
        steering.positions(places, valid)
        with pytest.raises(OSError, match="fire"):
            loaded.model(input_ids=ids)
        handle.remove()
        assert state.receipt().tokens == 0
        steering.positions(places, valid)
        loaded.model(input_ids=ids)
        assert state.receipt().tokens == 2
    assert state.receipt().layers == (0, 1)  # readable after the scope


def test_rows_join_and_leave_between_steps(models: Models, make_vector: MakeVector) -> None:
    """A state goes from one place of one composition to another place of the next, and its receipt goes on."""
    loaded = models()
    spec = RowSpec((Term(make_vector(loaded), 1.0),))
    ids, valid = torch.tensor([[5], [6]]), torch.ones(2, 1, dtype=torch.bool)
    with torch.inference_mode(), steer(loaded.model, fingerprint=loaded.fingerprint) as steering:
        first, second = (steering.open(spec, prompt_length=1) for _ in range(2))
        for rows in ([first, None], [second, first], [first], [None, None]):
            steering.rows(rows)
            steering.positions(torch.zeros(len(rows), 1, dtype=torch.long), valid[: len(rows)])
            loaded.model(input_ids=ids[: len(rows)])
        assert (first.receipt().tokens, second.receipt().tokens) == (3, 1)


def test_it_works_inside_a_peft_model(make_vector: MakeVector) -> None:
    from peft import LoraConfig, get_peft_model

    from core.models.load import load

    loaded = load("tiny-llama")
    vector = make_vector(loaded, 5)
    specs: list[RowSpec | None] = [RowSpec((Term(vector, 0.5),)), None]
    bare = run_batch(loaded, PROMPTS[:2], specs)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    tuned = get_peft_model(loaded.model, config).eval()
    wrapped = Loaded(tuned, loaded.tokenizer, loaded.fingerprint, loaded.directory, loaded.ref)
    batch = run_batch(wrapped, PROMPTS[:2], specs)
    for row in range(2):
        alone, _ = run_plain(wrapped, PROMPTS[row], specs[row])
        assert batch.tokens[row] == alone.tokens[0]
        assert (batch.logits[row] - alone.logits[0]).abs().max() < 1e-5
    assert (batch.logits - bare.logits).abs().max() > 1e-3  # the adapter did something
    with steer(tuned, fingerprint="x"), pytest.raises(RuntimeError, match="twice"):
        with steer(tuned.get_base_model(), fingerprint="x"):
            pass


@pytest.mark.parametrize("site", SITES)
def test_in_bfloat16_the_sum_is_taken_in_float32_and_rounded_once(
    site: str, models: Models, make_vector: MakeVector
) -> None:
    loaded = models("tiny-qwen3")
    vector = make_vector(loaded, 6, site=site, layers=(1,))
    seen: list[torch.Tensor] = []
    ids = torch.tensor([PROMPTS[0], PROMPTS[0]])
    loaded.model.to(torch.bfloat16)
    try:
        with torch.inference_mode(), steer(loaded.model, fingerprint=loaded.fingerprint) as steering:
            state = steering.open(RowSpec((Term(vector, 0.37),)), prompt_length=5)
            for rows in ([None, None], [state, None]):
                steering.rows(rows)
                module = site_modules(loaded.model, site)[1]
                handle = module.register_forward_hook(
                    lambda m, args, out: seen.append((out[0] if isinstance(out, tuple) else out).clone())
                )
                steering.positions(torch.arange(5).expand(2, 5), torch.ones(2, 5, dtype=torch.bool))
                loaded.model(input_ids=ids)
                handle.remove()
    finally:
        loaded.model.to(torch.float32)
    before, after = seen
    assert after.dtype == torch.bfloat16
    assert torch.equal(after[0], (before[0].float() + vector.directions[1] * 0.37).to(torch.bfloat16))
    assert torch.equal(after[1], before[1])


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_specs_in_any_batch_equal_plain_hooks(data: st.DataObject, models: Models, make_vector: MakeVector) -> None:
    loaded = models()
    term = st.builds(
        Term,
        vector=st.builds(make_vector, st.just(loaded), st.integers(0, 3), site=st.sampled_from(SITES)),
        strength=st.floats(0.1, 2) | st.floats(-2, -0.1),
        layers=st.sampled_from([None, (0,), (1,), (1, 0)]),
        positions=st.sampled_from(["all", "prompt", "generated"]),
    )
    spec = st.builds(RowSpec, st.lists(term, min_size=1, max_size=3).map(tuple), st.booleans())
    prompt = st.lists(st.integers(3, 900), min_size=1, max_size=7)
    prompts = data.draw(st.lists(prompt, min_size=1, max_size=3))
    specs = [data.draw(st.none() | spec) for _ in prompts]
    try:
        batch = run_batch(loaded, prompts, specs, steps=3, chunk=data.draw(st.sampled_from([None, 2])))
    except SteeringError as error:
        assert error.code == "steering_touches_nothing"
        reject()  # the drawn terms cancel
    for row, (ids, one) in enumerate(zip(prompts, specs, strict=True)):
        alone, _ = run_plain(loaded, ids, one, steps=1)
        assert (batch.logits[row, 0] - alone.logits[0, 0]).abs().max() < 1e-5
        again, _ = run_plain(loaded, ids, one, steps=3)
        if batch.tokens[row] == again.tokens[0]:  # a tie may be broken either way
            assert (batch.logits[row] - again.logits[0]).abs().max() < 1e-5
        else:
            step = next(i for i, (a, b) in enumerate(zip(batch.tokens[row], again.tokens[0], strict=True)) if a != b)
            top = again.logits[0, step].topk(2).values
            assert top[0] - top[1] < 1e-4
