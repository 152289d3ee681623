"""Recorded activations are the model's own, whatever the padding, and leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from core.activations import record
from core.data.batch import Batch, collate, pack
from core.data.example import Example
from core.models.load import Loaded, load
from core.models.sites import SITES, blocks, site_modules

ROWS = ([5, 6, 7, 8, 9, 10], [300, 301], [40, 41, 42, 43])


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-qwen3", "tiny-gemma3"])
def loaded(request: pytest.FixtureRequest) -> Loaded:
    return load(request.param)


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> nn.Module:
    model = load(str(tiny_llama)).model
    assert isinstance(model, nn.Module)
    return model


def examples() -> list[Example]:
    return [Example(line, list(ids), list(ids)) for line, ids in enumerate(ROWS, 1)]


def batch() -> Batch:
    return collate(examples(), pad_id=0)


def alone(model: nn.Module, ids: list[int], site: str, layer: int) -> Tensor:
    seen: list[Tensor] = []
    module = site_modules(model, site)[layer]
    handle = module.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen[0][0]


@pytest.mark.parametrize("site", SITES)
def test_each_row_is_what_it_is_alone(loaded: Loaded, site: str) -> None:
    found = record(loaded.model, batch(), layers=(1, 0), site=site)
    assert found.shape == (3, 2, 6, 64)
    assert found.dtype == torch.float32
    for row, ids in enumerate(ROWS):
        for place, layer in enumerate((1, 0)):
            expected = alone(loaded.model, ids, site, layer)
            assert torch.allclose(found[row, place, : len(ids)], expected, atol=1e-5)


def test_the_first_block_is_transformers_own_first_hidden_state(loaded: Loaded) -> None:
    rows = batch()
    with torch.no_grad():
        states = loaded.model(
            input_ids=rows.input_ids, attention_mask=rows.attention_mask, output_hidden_states=True
        ).hidden_states
    mask = rows.attention_mask
    assert mask is not None
    found = record(loaded.model, rows, layers=[0])[:, 0]
    assert torch.allclose(found[mask.bool()], states[1][mask.bool()], atol=1e-6)


def test_packed_rows_are_recorded_apart(llama: nn.Module) -> None:
    packed = collate(pack(examples(), 12), pad_id=0)
    assert packed.attention_mask is None
    found = record(llama, packed, layers=[0, 1])
    start = 0
    for ids in sorted(ROWS, key=len, reverse=True):
        expected = alone(llama, ids, "block", 1)
        assert torch.allclose(found[0, 1, start : start + len(ids)], expected, atol=1e-5)
        start += len(ids)


def test_a_reduction_runs_layer_by_layer(llama: nn.Module) -> None:
    whole = record(llama, batch(), layers=[0, 1])
    calls: list[torch.Size] = []

    def last(h: Tensor) -> Tensor:
        calls.append(h.shape)
        return h[:, -1]

    assert torch.equal(record(llama, batch(), layers=[0, 1], reduce=last), whole[:, :, -1])
    assert calls == [torch.Size([3, 6, 64])] * 2


def test_what_is_recorded_is_a_copy_without_history(llama: nn.Module) -> None:
    rows = batch()

    def spoil(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].zero_()

    handle = blocks(llama)[1].register_forward_pre_hook(spoil)
    found = record(llama, rows, layers=[0])
    handle.remove()
    assert not found.requires_grad
    assert bool(found.any())
    assert torch.equal(found, record(llama, rows, layers=[0]))


@pytest.mark.parametrize("layers", [(), (0, 0), (2,), (-1,)])
def test_layers_that_are_not_there(llama: nn.Module, layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        record(llama, batch(), layers=layers)
    with pytest.raises(ValueError, match="unknown site"):
        record(llama, batch(), layers=[0], site="logits")


def test_no_hook_is_left_after_an_error(llama: nn.Module) -> None:
    def fail(h: Tensor) -> Tensor:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        record(llama, batch(), layers=[0, 1], reduce=fail)
    assert sum(len(module._forward_hooks) for module in llama.modules()) == 0
