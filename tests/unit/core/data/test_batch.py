"""Padding and packing: nothing lost, and a packed row learns exactly what it would alone."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.data.batch import collate, pack
from core.data.example import Example
from core.models.load import Loaded


def example(length: int, line: int = 1, *, seed: int = 0, vocabulary: int = 1000) -> Example:
    """A row of random tokens, the second half of them trained on."""
    rng = random.Random(f"{seed}/{line}/{length}")
    ids = [rng.randrange(3, vocabulary) for _ in range(length)]
    return Example(line, ids, [-100] * ((length + 1) // 2) + ids[(length + 1) // 2 :], total=length)


def test_padding() -> None:
    batch = collate([Example(1, [5, 6, 7], [-100, 6, 7]), Example(2, [8], [-100])], pad_id=9)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[-100, 6, 7], [-100, -100, -100]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert {tensor.dtype for tensor in (batch.input_ids, batch.attention_mask, batch.labels, batch.position_ids)} == {
        torch.int64
    }
    assert (batch.tokens, batch.trained) == (4, 2)
    assert batch.padding == pytest.approx(1 / 3)


def test_the_width_may_be_rounded_up() -> None:
    batch = collate([example(5), example(3)], pad_id=0, multiple=8)
    assert batch.input_ids.shape == (2, 8) and batch.tokens == 8 and batch.padding == 0.5
    assert collate([example(8)], pad_id=0, multiple=8).input_ids.shape == (1, 8)


def test_packed_rows_count_their_positions_from_zero() -> None:
    packed = Example(1, [1, 2, 3, 4, 5], [-100, 2, -100, 4, 5], segments=(2, 3))
    batch = collate([packed, Example(2, [6, 7], [-100, 7])], pad_id=0, multiple=7)
    assert batch.attention_mask is None
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 0, 1], [0, 1, 0, 1, 2, 3, 4]]
    assert batch.tokens == 7 and batch.trained == 4


def test_a_batch_of_packed_rows_that_hold_one_row_each_is_an_ordinary_one() -> None:
    assert collate(pack([example(4)], 5), pad_id=0).attention_mask is not None


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        collate([], pad_id=0)


def test_a_batch_moves_whole() -> None:
    batch = collate([Example(1, [1, 2], [-100, 2], segments=(1, 1))], pad_id=0).to("meta")
    assert {t.device.type for t in (batch.input_ids, batch.labels, batch.position_ids)} == {"meta"}
    assert batch.attention_mask is None and batch.tokens == 2
    moved = collate([example(3)], pad_id=0).to("meta").attention_mask
    assert moved is not None and moved.device.type == "meta"


@settings(max_examples=100, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 40), max_size=60), limit=st.integers(1, 50))
def test_packing_keeps_every_row_once_and_whole(lengths: list[int], limit: int) -> None:
    rows = [example(length, line) for line, length in enumerate(lengths, 1)]
    packed = pack(rows, limit)
    assert packed == pack(rows, limit)
    unpacked = []
    for place in packed:
        sizes = place.segments or (len(place.input_ids),)
        assert sum(sizes) == len(place.input_ids) == len(place.labels)
        assert len(place.input_ids) <= limit or len(sizes) == 1
        assert not place.truncated
        start = 0
        for size in sizes:
            unpacked.append((place.input_ids[start : start + size], place.labels[start : start + size]))
            start += size
    assert sorted(unpacked) == sorted((row.input_ids, row.labels) for row in rows)
    # Best fit leaves no two places that could be one.
    sizes_left = sorted(len(place.input_ids) for place in packed)
    assert len(sizes_left) < 2 or sizes_left[0] + sizes_left[1] > limit


def test_packing_is_near_the_least_number_of_places() -> None:
    rng = random.Random(1)
    rows = [example(rng.randint(10, 200), line) for line in range(2000)]
    least = sum(len(row.input_ids) for row in rows) / 512
    assert len(pack(rows, 512)) <= 1.02 * least + 1


def token_losses(loaded: Loaded, rows: list[Example]) -> list[list[float]]:
    """Loss of each trained token, per row of the batch, by the model alone and the naive formula."""
    batch = collate(rows, pad_id=0)
    with torch.no_grad():
        logits = loaded.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2).double(), batch.labels[:, 1:], reduction="none", ignore_index=-100
    )
    return [row[labels != -100].tolist() for row, labels in zip(losses, batch.labels[:, 1:], strict=True)]


@pytest.mark.parametrize("lengths", [(3, 2), (40, 30, 17, 9, 1, 2), (200, 150, 20)])
def test_a_packed_row_has_the_losses_that_it_has_alone(loaded: Loaded, lengths: tuple[int, ...]) -> None:
    vocabulary = loaded.model.config.get_text_config().vocab_size
    rows = [example(length, line, vocabulary=vocabulary) for line, length in enumerate(lengths, 1)]
    alone = {row.line: token_losses(loaded, [row])[0] for row in rows}
    packed = pack(rows, sum(lengths))
    assert len(packed) == 1 and len(packed[0].segments) == len(rows)
    # A second, shorter packed row gives the first batch row's neighbour padding behind it.
    short = pack([example(7, 50, vocabulary=vocabulary), example(5, 51, vocabulary=vocabulary)], 12)
    together = token_losses(loaded, [packed[0], *short])[0]
    longest_first = sorted(rows, key=lambda row: -len(row.input_ids))
    expected = [loss for row in longest_first for loss in alone[row.line]]
    assert len(together) == len(expected) > 0
    assert max(abs(one - other) for one, other in zip(together, expected, strict=True)) < 1e-5


def test_the_sliding_window_was_really_used_above() -> None:
    from core.models.load import load

    config = load("tiny-gemma3").model.config.get_text_config()
    assert config.sliding_window < 150 and "sliding_attention" in config.layer_types


def test_neighbours_would_be_seen_without_the_positions(loaded: Loaded) -> None:
    first, second = example(30, 1), example(30, 2)
    packed = pack([first, second], 60)[0]
    glued = Example(1, packed.input_ids, packed.labels)
    assert token_losses(loaded, [glued])[0] != pytest.approx(token_losses(loaded, [packed])[0], abs=1e-3)


def test_padding_changes_no_loss(loaded: Loaded) -> None:
    rows = [example(length, line) for line, length in enumerate((50, 20, 3), 1)]
    together = token_losses(loaded, rows)
    for row, losses in zip(rows, together, strict=True):
        assert losses == pytest.approx(token_losses(loaded, [row])[0], abs=1e-5)
