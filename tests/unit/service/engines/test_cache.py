"""Rows come, grow, move and leave; each keeps its own keys and values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engines.cache import BLOCK, RowCache

LAYERS, HEADS, SIZE = 2, 2, 3


def feed(cache: RowCache, rows: list[list[float]], counts: list[int], values: list[float]) -> None:
    """One forward in which row i gets ``counts[i]`` tokens; ``rows`` is the model of what it must hold."""
    steps = max(counts)
    width = cache.begin(counts, steps)
    for layer in range(LAYERS):
        new = torch.full((len(counts), HEADS, steps, SIZE), -1.0)
        for i, count in enumerate(counts):
            for j in range(count):
                new[i, :, steps - count + j] = values[i] + j + layer / 10
        keys, held = cache.update(new, new * 2, layer)
        assert keys.shape == held.shape == (len(counts), HEADS, width, SIZE)
        for i, count in enumerate(counts):
            expected = torch.tensor([*rows[i], *(values[i] + j for j in range(count))]) + layer / 10
            assert torch.allclose(keys[i, 0, : len(expected), 0], expected)
            assert torch.allclose(held[i, 1, : len(expected), 2], expected * 2)
    cache.commit()
    for i, count in enumerate(counts):
        rows[i] += [values[i] + j for j in range(count)]


@settings(max_examples=60, deadline=None)
@given(st.data())
@torch.inference_mode()
def test_equals_a_list_of_lists(data: st.DataObject) -> None:
    cache, rows, value = RowCache(LAYERS), [], 0.0
    for _ in range(data.draw(st.integers(1, 12))):
        action = data.draw(st.sampled_from(["prefill", "decode", "decode", "drop", "join"]))
        if action == "join" or not rows:
            other, joining = RowCache(LAYERS), [[], []]
            other.add_rows(2)
            value += 1000
            feed(other, joining, [data.draw(st.integers(1, BLOCK + 9)), 3], [value, value + 500])
            for row in (0, 1):
                cache.take(other, row)
                rows.append(joining[row])
        elif action == "drop":
            row = data.draw(st.integers(0, len(rows) - 1))
            cache.drop(row)
            last = rows.pop()
            if row < len(rows):
                rows[row] = last
        else:
            counts = [1 if action == "decode" else data.draw(st.integers(1, 5)) for _ in rows]
            value += 1000
            feed(cache, rows, counts, [value + 10 * i for i in range(len(rows))])
        assert cache.lengths == [len(r) for r in rows]
    for _ in range(len(rows)):
        cache.drop(0)
    assert cache.nbytes == 0


@pytest.mark.parametrize("broken", [1, 2])
@torch.inference_mode()
def test_a_broken_row_leaves_nothing_to_a_shorter_one_in_its_place(broken: int) -> None:
    cache, lengths = RowCache(LAYERS), [9, 4, 4]
    lengths[broken] = 8
    for length in lengths:
        other = RowCache(LAYERS)
        other.add_rows(1)
        feed(other, [[]], [length], [1.0])
        cache.take(other, 0)
    for buffer in (*cache._keys, *cache._values):
        assert buffer is not None
        buffer[broken, :, : lengths[broken]] = torch.nan
    cache.drop(broken, wipe=True)
    short = RowCache(LAYERS)
    short.add_rows(1)
    feed(short, [[]], [3], [1.0])
    cache.take(short, 0)
    cache.begin([1, 1, 1], 1)
    new = torch.ones(3, HEADS, 1, SIZE)
    for layer in range(LAYERS):
        for seen in cache.update(new, new, layer):
            assert seen.shape[2] == 10, "the longest row, so that the masked columns of the others are seen"
            assert seen.isfinite().all()


def test_a_buffer_is_not_copied_for_every_token() -> None:
    cache = RowCache(1)
    cache.add_rows(1)
    places = set()
    for _ in range(3 * BLOCK):
        cache.begin([1], 1)
        keys, _ = cache.update(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4), 0)
        cache.commit()
        places.add(keys.data_ptr())
    assert len(places) <= 3
