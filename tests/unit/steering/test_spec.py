"""What cannot be met is refused when a row is opened, each reason with a code of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from core.models.load import Loaded
from steering.apply import RowSpec, SteeringError, Term, steer
from steering.spec import Target, fuse
from steering.vector import SteeringVector

TARGET = Target(fingerprint="f", layers=4, width=3, largest=torch.finfo(torch.bfloat16).max)


def vector(**change: object) -> SteeringVector:
    base = SteeringVector({1: torch.tensor([1.0, 0, 0]), 2: torch.tensor([0, 2.0, 0])}, "block", "f", "m", "x", "d")
    return replace(base, **change)


def one(
    strength: float = 1.0, layers: tuple[int, ...] | None = None, positions: str = "all", **change: object
) -> RowSpec:
    return RowSpec((Term(vector(**change), strength, layers, positions),))  # type: ignore[arg-type]


REFUSED = {
    "no term": (RowSpec(()), "steering_touches_nothing", "names no vector"),
    "strength 0": (one(0.0), "steering_touches_nothing", "strength other than 0"),
    "no layer": (one(layers=()), "steering_touches_nothing", "adds up to zero"),
    "zero direction": (one(directions={0: torch.zeros(3)}), "steering_touches_nothing", "adds up to zero"),
    "cancelling": (RowSpec((Term(vector(), 1.5), Term(vector(), -1.5))), "steering_touches_nothing", "cancel"),
    "other model": (one(fingerprint="g"), "steering_wrong_model", "fit it again"),
    "other width": (one(directions={0: torch.ones(5)}), "steering_wrong_model", "width is 5"),
    "layer too high": (one(layers=(1, 4)), "steering_layer_out_of_range", "layers 0 to 3"),
    "negative layer": (one(layers=(-1,)), "steering_layer_out_of_range", "layers 0 to 3"),
    "layer is a bool": (one(layers=(True,)), "steering_layer_out_of_range", "layers 0 to 3"),
    "vector too deep": (one(directions={9: torch.ones(3)}), "steering_layer_out_of_range", "layer 9"),
    "layer not fitted": (one(layers=(3,)), "steering_layer_not_in_vector", "it has 1-2"),
    "NaN": (one(math.nan), "steering_bad_strength", "finite"),
    "infinity": (one(-math.inf), "steering_bad_strength", "finite"),
    "a bool": (one(True), "steering_bad_strength", "finite"),
    "text": (one("4"), "steering_bad_strength", "finite"),  # type: ignore[arg-type]
    "overflow": (one(3e38), "steering_bad_strength", "overflows"),
    "huge": (one(1e300), "steering_bad_strength", "overflows"),
    "positions": (one(positions="answer"), "steering_bad_positions", "all, prompt, generated"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    spec, code, words = REFUSED[name]
    with pytest.raises(SteeringError, match=words) as caught:
        fuse(spec, TARGET)
    assert caught.value.code == code
    assert isinstance(caught.value, ValueError)


def test_an_unknown_site_is_refused_even_if_a_vector_names_it() -> None:
    bad = vector()
    object.__setattr__(bad, "site", "logits")
    with pytest.raises(SteeringError, match="block, attention, mlp") as caught:
        fuse(RowSpec((Term(vector(), 1.0), Term(bad, 1.0))), TARGET)
    assert (caught.value.code, caught.value.term) == ("steering_unknown_site", 1)
    assert str(caught.value).startswith("vectors[1]: ")


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_generated_positions_need_a_token_that_is_fed_back(max_tokens: int) -> None:
    with pytest.raises(SteeringError, match="touches nothing") as caught:
        fuse(one(positions="generated"), TARGET, max_tokens=max_tokens)
    assert caught.value.code == "steering_touches_nothing"
    assert fuse(one(positions="generated"), TARGET, max_tokens=2)
    assert fuse(one(positions="prompt"), TARGET, max_tokens=max_tokens)


def test_terms_add_per_layer_and_phase() -> None:
    spec = RowSpec(
        (Term(vector(), 2.0), Term(vector(site="mlp"), 1.0, (2,), "prompt"), Term(vector(), 1.0, (1, 1), "generated"))
    )
    fused = fuse(spec, TARGET)
    assert {key: f.table.tolist() for key, f in fused.items()} == {
        ("block", 1): [[2, 0, 0], [3, 0, 0], [0, 0, 0]],
        ("block", 2): [[0, 4, 0], [0, 4, 0], [0, 0, 0]],
        ("mlp", 2): [[0, 2, 0], [0, 0, 0], [0, 0, 0]],
    }
    assert [f.active for f in fused.values()] == [(True, True, False), (True, True, False), (True, False, False)]


def test_layers_that_cancel_are_not_hooked() -> None:
    spec = RowSpec((Term(vector(), 1.0), Term(vector(), -1.0, (1,))))
    assert list(fuse(spec, TARGET)) == [("block", 2)]


def test_a_real_model_is_the_target(models: Callable[..., Loaded], make_vector: Callable[..., SteeringVector]) -> None:
    loaded = models()
    with steer(loaded.model, fingerprint=loaded.fingerprint) as steering:
        assert steering.target == Target(loaded.fingerprint, 2, 64, torch.finfo(torch.float32).max)
        with pytest.raises(SteeringError, match="layers 0 to 1"):
            steering.open(RowSpec((Term(make_vector(loaded), 1.0, (2,)),)), prompt_length=1)
    with (
        steer(loaded.model, fingerprint="sha256:other") as steering,
        pytest.raises(SteeringError, match="fit it again"),
    ):
        steering.open(RowSpec((Term(make_vector(loaded), 1.0),)), prompt_length=1)
