"""The fit: equal to an independent float64 oracle, bitwise repeatable, and what it finds steers what it should."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from core.data.example import IGNORED
from core.data.source import DataError, Message
from core.models.load import Loaded
from core.models.ref import parse_ref
from core.models.sites import SITES, site_modules
from steering.apply import RowSpec, Term, steer
from steering.config import FitConfig
from steering.mean_difference import encode_pairs, mean_difference
from steering.method import Fitted
from steering.pairs import Pair
from steering.registry import METHODS, get_method
from steering.vector import SteeringVector
from tests.oracles import mean_difference as oracle

USER = (Message("user", "Where is the parcel?"),)
LONG = (Message("system", "Be brief."), Message("user", "Hello"), Message("assistant", "Hi.", weight=0), *USER)
PAIRS = [
    Pair(1, USER, "It is on its way to you today.", "Nobody knows."),
    Pair(2, LONG, "Thank you for asking; it left this morning.", "Lost, probably."),
    Pair(3, (), "What a careful answer to a fair question.", "A rude reply, at the end of the street."),
]
Models = Callable[..., Loaded]


def config(**change: Any) -> FitConfig:
    return FitConfig(**{"model": "tiny-llama", "data_file": "x", "output_dir": "y", "batch_size": 4, **change})


def run(loaded: Loaded, pairs: Sequence[Pair] = PAIRS, method: str = "mean_difference", **change: Any) -> Fitted:
    return get_method(method).fit(loaded, pairs, config(method=method, **change), lambda done, total, tokens: None)


def as_vector(loaded: Loaded, fitted: Fitted) -> SteeringVector:
    return SteeringVector(fitted.directions, "block", loaded.fingerprint, "m", "mean_difference", "d", fitted.norms)


def recorded(loaded: Loaded, pair: Pair, text: str, site: str, positions: str) -> np.ndarray[Any, Any]:
    """Activations (L, n, D) of one text alone, unpadded, through bare hooks and the tokenizer's own template."""
    tokenizer, start = loaded.tokenizer, 0
    answer = tokenizer(text, add_special_tokens=False)["input_ids"]
    if pair.prompt:
        turns = [{"role": m.role, "content": m.content} for m in pair.prompt]
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        ids, start = [*prompt, *answer], len(prompt)
    else:
        ids = tokenizer(text)["input_ids"]
    seen: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for module in site_modules(loaded.model, site)
    ]
    with torch.no_grad():
        loaded.model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    first = {"last": len(ids) - 1, "answer": max(start, 1), "all": 1}[positions]
    return torch.stack([h[0, first:] for h in seen]).double().numpy()


@pytest.mark.parametrize("positions", ["last", "answer", "all"])
@pytest.mark.parametrize("site", SITES)
def test_it_equals_a_float64_oracle(loaded: Loaded, site: str, positions: str) -> None:
    fitted = run(loaded, site=site, positions=positions)
    sides = [
        [recorded(loaded, p, getattr(p, side), site, positions) for p in PAIRS] for side in ("positive", "negative")
    ]
    direction, medians = oracle.mean_difference(*sides)
    assert list(fitted.directions) == [0, 1]
    for layer in (0, 1):
        found = fitted.directions[layer]
        assert found.dtype == torch.float32
        scale = np.abs(direction[layer]).max()
        assert np.abs(found.double().numpy() - direction[layer]).max() < 1e-5 * scale
        assert fitted.norms[layer] == pytest.approx(medians[layer], rel=1e-5)
    tokens = sum(row.shape[1] for rows in sides for row in rows)
    assert fitted.metadata["pairs"] == 3
    assert tokens <= fitted.metadata["tokens"]


@pytest.mark.parametrize("method", METHODS)
def test_the_same_fit_gives_the_same_bits(models: Models, method: str) -> None:
    loaded = models()
    first, second = (as_vector(loaded, run(loaded, method=method)) for _ in range(2))
    assert first.to_bytes() == second.to_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_the_batch_size_does_not_matter_beyond_rounding(models: Models, method: str) -> None:
    loaded = models()
    one, six = (run(loaded, method=method, batch_size=size) for size in (1, 6))
    for layer in one.directions:
        assert torch.allclose(one.directions[layer], six.directions[layer], rtol=0, atol=1e-5)
        assert one.norms[layer] == pytest.approx(six.norms[layer], rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_swapping_the_sides_turns_the_direction_round(models: Models, method: str) -> None:
    loaded = models()
    swapped = [Pair(p.line, p.prompt, p.negative, p.positive) for p in PAIRS]
    there, back = run(loaded, method=method), run(loaded, swapped, method=method)
    for layer in there.directions:
        assert torch.allclose(there.directions[layer], -back.directions[layer], rtol=0, atol=1e-6)


def test_chosen_layers_are_those_of_the_whole_fit(models: Models) -> None:
    loaded = models()
    whole, part = run(loaded), run(loaded, layers=(1,))
    assert list(part.directions) == [1]
    assert torch.equal(part.directions[1], whole.directions[1])
    with pytest.raises(ValueError, match="layers 0 to 1"):
        run(loaded, layers=(0, 2))


def test_progress_is_told_after_each_batch(models: Models) -> None:
    seen: list[tuple[int, int, int]] = []
    loaded = models()
    fitted = get_method("mean_difference").fit(loaded, PAIRS, config(), lambda *told: seen.append(told))
    assert [told[:2] for told in seen] == [(1, 2), (2, 2)]
    assert 0 < seen[0][2] < seen[1][2] == fitted.metadata["tokens"]


def test_rows_that_the_model_cannot_read_are_named_with_their_lines(models: Models) -> None:
    tokenizer = models().tokenizer
    pairs = [
        Pair(4, USER, "word " * 50, "fine"),
        Pair(6, (Message("system", "a"), Message("tool", "b"), *USER), "yes", "no"),
        Pair(9, (), "a", "a fair question"),
    ]
    with pytest.raises(DataError, match="max_length is 40") as caught:
        encode_pairs(pairs, tokenizer, positions="answer", max_length=40)
    named = [(p.line, p.code) for p in caught.value.problems]
    assert named == [(4, "row_too_long"), (6, "not_encodable"), (6, "not_encodable"), (9, "row_too_short")]


def test_tokens_are_those_of_the_prompt_as_it_is_served(models: Models) -> None:
    from core.data.chat import prompt_ids

    tokenizer = models().tokenizer
    examples = encode_pairs(PAIRS[:2], tokenizer, positions="answer", max_length=500)
    assert len(examples) == 4
    for pair, example in zip((PAIRS[0], PAIRS[0], PAIRS[1], PAIRS[1]), examples, strict=True):
        prompt = prompt_ids(pair.prompt, tokenizer)
        assert example.input_ids[: len(prompt)] == prompt
        assert example.labels == [IGNORED] * len(prompt) + example.input_ids[len(prompt) :]
    assert tokenizer.decode(examples[1].input_ids[-examples[1].trained :]) == "Nobody knows."


def test_pairs_that_cancel_give_an_error_not_a_zero_vector(models: Models) -> None:
    # Two rows whose sides are each other's cancel exactly.
    loaded = models()
    pairs = [Pair(1, USER, "Yes.", "No."), Pair(2, USER, "No.", "Yes.")]
    with pytest.raises(ValueError, match="no direction"):
        run(loaded, pairs, batch_size=1)


def test_activations_that_are_not_finite_are_refused(models: Models) -> None:
    import copy

    loaded = models()
    broken = copy.deepcopy(loaded.model)
    with torch.no_grad():
        site_modules(broken, "mlp")[0].down_proj.weight[0, 0] = float("nan")
    bad = Loaded(broken, loaded.tokenizer, loaded.fingerprint, loaded.directory, loaded.ref)
    with pytest.raises(ValueError, match="not finite"):
        run(bad)


def test_the_pure_function_subtracts_means() -> None:
    a, b = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]).double(), torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]).double()
    assert mean_difference(a, b).tolist() == [[1.5, 2.5]]


@pytest.fixture(scope="module")
def planted(models: Models) -> tuple[Loaded, list[Pair], int, int]:
    """A model in which one direction, hidden in noise, decides between two tokens: `yes` against `no`."""
    tokenizer = models().tokenizer
    torch.manual_seed(7)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=False,
        )
    ).eval()  # fmt: skip
    good = "the careful nurse thanked every honest clerk with great patience".split()
    bad = "a broken lamp lost in the storm without an answer or refund".split()
    pairs = [Pair(i, (), " ".join(good[i : i + 4]), " ".join(bad[i : i + 4])) for i in range(6)]
    ids = [{t for p in pairs for t in tokenizer(getattr(p, side))["input_ids"]} for side in ("positive", "negative")]
    hidden = torch.nn.functional.normalize(torch.randn(48), dim=0)
    yes, no = 1000, 1001
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, 0.15)
        model.lm_head.weight.normal_(0, 0.02)
        for token in ids[0] - ids[1]:
            model.model.embed_tokens.weight[token] += 0.5 * hidden
        for token in ids[1] - ids[0]:
            model.model.embed_tokens.weight[token] -= 0.5 * hidden
        model.lm_head.weight[yes] = hidden
        model.lm_head.weight[no] = -hidden
    return Loaded(model, tokenizer, "sha256:planted", Path("."), parse_ref("planted")), pairs, yes, no


def log_odds(loaded: Loaded, vector: SteeringVector, strength: float, yes: int, no: int) -> float:
    """Mean log-odds of `yes` against `no` after some neutral texts."""
    ids = torch.randint(3, 900, (8, 6), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode(), steer(loaded.model, fingerprint=loaded.fingerprint) as steering:
        if strength:
            state = steering.open(RowSpec((Term(vector, strength),)), prompt_length=6)
            steering.rows([state] * 8)
            steering.positions(torch.arange(6).expand(8, 6), torch.ones(8, 6, dtype=torch.bool))
        logits = loaded.model(input_ids=ids).logits[:, -1]
    return float((logits[:, yes] - logits[:, no]).mean())


def test_on_a_planted_model_the_vector_moves_the_log_odds_and_a_random_one_hardly(
    planted: tuple[Loaded, list[Pair], int, int],
) -> None:
    loaded, pairs, yes, no = planted
    vector = as_vector(loaded, run(loaded, pairs))
    curve = [log_odds(loaded, vector, strength, yes, no) for strength in (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)]
    assert all(b - a > 0.05 for a, b in itertools.pairwise(curve)), curve
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        noise = {k: torch.randn(48, generator=generator) for k in vector.directions}
        equal = {k: noise[k] * vector.directions[k].norm() / noise[k].norm() for k in noise}
        random = as_vector(loaded, Fitted(equal, {}))
        effect = abs(log_odds(loaded, random, 1.0, yes, no) - curve[3])
        assert effect < 0.5 * (curve[5] - curve[3])
