"""The loss that projects only trained positions equals the naive one, whatever the family does around its head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from core.data.batch import pack
from core.data.example import Example
from core.models.load import load
from trainers.batch import collator
from trainers.loss import TokenLoss

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def _gemma2() -> Any:
    config = Gemma2Config(**SMALL, final_logit_softcapping=2.0, attn_implementation="eager")
    return AutoModelForCausalLM.from_config(config).eval()


def _untied() -> Any:
    return AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, tie_word_embeddings=False)).eval()


MODELS = {
    "llama": lambda: load("tiny-llama").model,
    "qwen3": lambda: load("tiny-qwen3").model,
    "gemma3": lambda: load("tiny-gemma3").model,
    "gemma2 (soft-capped)": _gemma2,
    "untied head": _untied,
}


def _rows(lengths: list[int], vocabulary: int = 90) -> list[Example]:
    draw = torch.Generator().manual_seed(0)
    rows = []
    for line, length in enumerate(lengths, start=1):
        ids = torch.randint(3, vocabulary, (length,), generator=draw).tolist()
        labels = [-100] * (length // 2) + ids[length // 2 :]
        rows.append(Example(line, ids, labels))
    return rows


def _naive(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    targets = batch["labels"][:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return loss, ((logits.argmax(-1) == targets) & (targets != -100)).sum()


@pytest.mark.parametrize("family", MODELS)
def test_equals_the_naive_loss_and_gradient(family: str) -> None:
    torch.manual_seed(0)
    model = MODELS[family]()
    batch = collator(pad_id=0, device=torch.device("cpu"))(_rows([9, 14, 5]))
    expected, hits = _naive(model, batch)
    expected.backward()
    expected = expected.detach()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)

    token_loss = TokenLoss(model)
    loss, found = token_loss(**batch)
    loss.backward()
    loss = loss.detach()
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert int(found) == int(hits)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            scale = float(wanted[name].norm()) + 1e-6
            assert float((parameter.grad - wanted[name]).norm()) <= 1e-5 * scale, name


def test_the_head_sees_trained_positions_only_and_the_hook_acts_inside_the_loss_alone() -> None:
    model = _untied()
    seen: list[tuple[int, ...]] = []
    rows = _rows([9, 14, 5])
    batch = collator(pad_id=0, device=torch.device("cpu"))(rows)
    token_loss = TokenLoss(model)
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    token_loss(**batch)
    assert seen == [(sum(row.trained for row in rows), 97)]
    assert model(input_ids=batch["input_ids"]).logits.shape == (3, 14, 97)
    token_loss.detach()
    assert not any(hook for hook in model.lm_head._forward_pre_hooks)


def test_a_batch_without_trained_tokens_gives_zero_and_a_zero_gradient() -> None:
    model = _untied()
    row = Example(0, [5, 6, 7], [-100, -100, -100])
    loss, hits = TokenLoss(model)(**collator(pad_id=0, device=torch.device("cpu"))([row]))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert int(hits) == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_packed_rows_do_not_see_each_other(family: str) -> None:
    model = MODELS[family]()
    rows = _rows([9, 14, 5, 7])
    collate = collator(pad_id=0, device=torch.device("cpu"))
    token_loss = TokenLoss(model)
    with torch.no_grad():
        alone = sum(float(token_loss(**collate([row]))[0]) for row in rows)
        packed = pack(rows, 24)
        assert len(packed) == 2
        together = float(token_loss(**collate(packed))[0])
    assert together == pytest.approx(alone, rel=1e-5)
