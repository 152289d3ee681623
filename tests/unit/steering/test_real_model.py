"""Slow: pulls SmolLM2-135M-Instruct (about 100 MB) once; only a trained model shows that a vector means something.

Beyond strength 0.25 over nine layers (0.5 was tried) this model begins to babble and the margin falls again.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from core.data.batch import collate
from core.data.example import IGNORED
from core.models.load import Loaded, load
from steering.apply import RowSpec, Term, steer
from steering.config import FitConfig
from steering.mean_difference import encode_pairs
from steering.method import Fitted
from steering.pairs import Pair, read_pairs
from steering.registry import get_method
from steering.vector import SteeringVector

DATA = Path(__file__).parents[3] / "configs" / "steering" / "data" / "formal.jsonl"
LAYERS = tuple(range(10, 19))


def margin(loaded: Loaded, pairs: list[Pair], vector: SteeringVector, strength: float) -> float:
    """Mean log-probability per token of the formal answers minus that of the informal ones, in nats."""
    batch = collate(encode_pairs(pairs, loaded.tokenizer, positions="answer", max_length=512), pad_id=0)
    assert batch.attention_mask is not None
    chosen = batch.labels != IGNORED
    with torch.inference_mode(), steer(loaded.model, fingerprint=loaded.fingerprint) as steering:
        states = [
            steering.open(RowSpec((Term(vector, strength, LAYERS),)), prompt_length=int(row.int().argmax()))
            if strength
            else None
            for row in chosen
        ]
        steering.rows(states)
        steering.positions(batch.position_ids, batch.attention_mask.bool())
        logits = loaded.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    logprobs = logits[:, :-1].log_softmax(-1).gather(2, batch.input_ids[:, 1:, None])[..., 0]
    rows = (logprobs * chosen[:, 1:]).sum(1) / chosen[:, 1:].sum(1)
    return float((rows[0::2] - rows[1::2]).mean())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_formal_vector_makes_formal_answers_likelier_and_a_random_one_does_not() -> None:
    loaded = load("smollm2-135m-instruct")
    rows = read_pairs(DATA).rows
    train, held_out = rows[:5], rows[5:]
    config = FitConfig(model=str(loaded.ref), data_file=str(DATA), output_dir="unused")
    fitted = get_method("mean_difference").fit(loaded, train, config, lambda done, total, tokens: None)

    def vector(found: Fitted) -> SteeringVector:
        return SteeringVector(found.directions, "block", loaded.fingerprint, str(loaded.ref), "mean_difference", "d")

    curve = [margin(loaded, held_out, vector(fitted), s) for s in (-0.25, -0.125, 0.0, 0.125, 0.25)]
    assert all(b > a for a, b in itertools.pairwise(curve)), curve
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        noise = {k: torch.randn(d.shape, generator=generator) for k, d in fitted.directions.items()}
        equal = {k: noise[k] * d.norm() / noise[k].norm() for k, d in fitted.directions.items()}
        effect = margin(loaded, held_out, vector(Fitted(equal, {})), 0.25) - curve[2]
        assert abs(effect) < 0.5 * (curve[4] - curve[2]), (effect, curve)
    print("margin by strength:", [round(value, 3) for value in curve], "random:", round(effect, 3))
