"""The order of training: pure, complete, resumable, and the same however a step is split."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.data.batch import collate
from core.data.example import Example
from core.data.stream import Stream

Step = list[list[Example]]


def rows_of(count: int, *, seed: int = 0, longest: int = 40) -> list[Example]:
    rng = random.Random(seed)
    result = []
    for line in range(1, count + 1):
        ids = [int(rng.random() * 1000) for _ in range(2 + int(rng.random() * (longest - 1)))]
        result.append(Example(line, ids, [-100, *ids[1:]], total=len(ids)))
    return result


def lines(step: Sequence[Sequence[Example]]) -> list[int]:
    return [example.line for micro in step for example in micro if example.line]


def take(stream: Stream, count: int) -> list[Step]:
    return [next(stream) for _ in range(count)]


SETTINGS = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 4),
        "accumulation": st.integers(1, 3),
        "seed": st.integers(0, 2**31 - 1),
        "bucket": st.booleans(),
        "pack": st.booleans(),
        "max_length": st.just(64),
    }
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(count=st.integers(1, 40), arguments=SETTINGS, done=st.integers(0, 30), world=st.integers(1, 3))
def test_restored_anywhere_the_same_steps_follow(count: int, arguments: dict[str, Any], done: int, world: int) -> None:
    data = rows_of(count)
    for rank in range(world):
        stream = Stream(data, rank=rank, world=world, **arguments)
        take(stream, done)
        state = json.loads(json.dumps(stream.state()))
        other = Stream(data, rank=rank, world=world, **arguments)
        other.restore(state)
        assert other.state() == state
        following = take(stream, 12)
        assert take(other, 12) == following
        for one, again in zip(following[0], following[0], strict=True):
            assert collate(one, pad_id=0).input_ids.equal(collate(again, pad_id=0).input_ids)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(count=st.integers(1, 60), arguments=SETTINGS, world=st.integers(1, 4), epochs=st.integers(1, 3))
def test_every_row_comes_once_an_epoch(count: int, arguments: dict[str, Any], world: int, epochs: int) -> None:
    data = rows_of(count)
    streams = [Stream(data, rank=rank, world=world, **arguments) for rank in range(world)]
    seen: Counter[tuple[int, ...]] = Counter()
    places = arguments["batch_size"] * arguments["accumulation"] * world
    for epoch in range(epochs):
        for position in range(streams[0].steps_per_epoch):
            assert (streams[0].epoch, streams[0].position) == (epoch, position)
            steps = [next(stream) for stream in streams]
            assert len({len(step) for step in steps}) == 1
            assert all(1 <= len(micro) <= arguments["batch_size"] for step in steps for micro in step)
            assert len(steps[0]) <= arguments["accumulation"]
            real = sum(bool(example.line) for step in steps for micro in step for example in micro)
            assert real == places or (position == streams[0].steps_per_epoch - 1 and 0 < real < places)
            for example in (example for step in steps for micro in step for example in micro):
                start = 0
                for size in example.segments or (len(example.input_ids),):
                    if example.line:
                        seen[tuple(example.input_ids[start : start + size])] += 1
                    start += size
    assert seen == Counter({tuple(row.input_ids): epochs for row in data})
    assert streams[0].rows == count


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    count=st.integers(1, 60), bucket=st.booleans(), pack=st.booleans(), seed=st.integers(0, 99), half=st.integers(1, 3)
)
def test_steps_do_not_depend_on_how_they_are_split(count: int, bucket: bool, pack: bool, seed: int, half: int) -> None:
    data = rows_of(count)
    settings_ = {"seed": seed, "bucket": bucket, "pack": pack, "max_length": 64}
    whole = Stream(data, batch_size=4 * half, **settings_)
    accumulated = Stream(data, batch_size=half, accumulation=4, **settings_)
    ranks = [Stream(data, batch_size=half, accumulation=2, rank=rank, world=2, **settings_) for rank in range(2)]
    for _ in range(2 * whole.steps_per_epoch):
        expected = sorted(lines(next(whole)))
        assert sorted(lines(next(accumulated))) == expected
        assert sorted(line for stream in ranks for line in lines(next(stream))) == expected


@pytest.mark.parametrize("bucket", [True, False])
def test_two_processes_see_what_one_with_twice_the_batch_sees(bucket: bool) -> None:
    data = rows_of(53)
    one = Stream(data, batch_size=6, accumulation=2, bucket=bucket)
    two = [Stream(data, batch_size=3, accumulation=2, bucket=bucket, rank=rank, world=2) for rank in range(2)]
    for _ in range(12):
        both = [next(stream) for stream in two]
        for index, micro in enumerate(next(one)):
            assert sorted(lines([micro])) == sorted(line for step in both for line in lines([step[index]]))


def test_where_rows_run_out_a_filler_trains_nothing() -> None:
    streams = [Stream(rows_of(5), batch_size=1, rank=rank, world=4) for rank in range(4)]
    steps = [take(stream, 2)[1] for stream in streams]
    assert [len(step) for step in steps] == [1, 1, 1, 1]
    fillers = [step[0][0] for step in steps if step[0][0].line == 0]
    assert len(fillers) == 3
    assert all(filler.trained == 0 and len(filler.input_ids) == 1 for filler in fillers)
    assert sum(len(micro) for step in steps for micro in step) == 4


def test_order_is_a_function_of_seed_and_epoch_alone() -> None:
    data = rows_of(37)

    def epochs(seed: int) -> list[list[int]]:
        stream = Stream(data, batch_size=4, seed=seed)
        return [[line for step in take(stream, stream.steps_per_epoch) for line in lines(step)] for _ in range(3)]

    first = epochs(1)
    random.seed(99)
    assert epochs(1) == first
    assert first[0] != first[1] != first[2] != first[0]
    assert epochs(2)[0] != first[0]


@pytest.mark.parametrize(
    ("bucket", "expected"),
    [
        (False, "da8273fbc38e6fbb"),
        (True, "eaa28b3637e78bf9"),
    ],
)
def test_order_is_the_same_on_every_python_and_machine(bucket: bool, expected: str) -> None:
    stream = Stream(rows_of(100), batch_size=3, accumulation=2, seed=5, bucket=bucket)
    order = [[[example.line for example in micro] for micro in step] for step in take(stream, 40)]
    assert hashlib.sha256(json.dumps(order).encode()).hexdigest()[:16] == expected


def test_buckets_save_padding_and_keep_steps_mixed() -> None:
    data = rows_of(2000, longest=200)

    def padding(bucket: bool) -> float:
        stream = Stream(data, batch_size=8, bucket=bucket)
        batches = [collate(micro, pad_id=0) for step in take(stream, stream.steps_per_epoch) for micro in step]
        return 1 - sum(batch.tokens for batch in batches) / sum(batch.input_ids.numel() for batch in batches)

    assert padding(bucket=True) < 0.05 < 0.3 < padding(bucket=False)
    stream = Stream(data, batch_size=8)
    widths = [max(len(row.input_ids) for row in step[0]) for step in take(stream, stream.steps_per_epoch)]
    middle = len(widths) // 2
    assert abs(sum(widths[:middle]) / middle - sum(widths[middle:]) / (len(widths) - middle)) < 25
    assert sum(a > b for a, b in itertools.pairwise(widths)) > len(widths) / 3


def test_packing_fills_places() -> None:
    data = rows_of(300, longest=40)
    stream = Stream(data, batch_size=2, pack=True, max_length=128)
    assert stream.rows == 300 and len(stream.examples) < 70
    step = next(stream)
    assert len(step[0]) == 2 and all(len(example.segments) > 1 for example in step[0])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"batch_size": 3}, "places was 4 and is 6"),
        ({"bucket": False}, "bucket was True and is False"),
        ({"pack": True, "max_length": 100}, "data was .* and is "),
    ],
)
def test_a_position_in_another_order_is_refused(change: dict[str, Any], says: str) -> None:
    data = rows_of(20)
    state = Stream(data, batch_size=2, accumulation=2).state()
    with pytest.raises(ValueError, match=says):
        Stream(data, **{"batch_size": 2, "accumulation": 2, **change}).restore(state)


def test_a_position_in_other_data_is_refused() -> None:
    data = rows_of(20)
    state = Stream(data, batch_size=2).state()
    changed = [*data[:-1], Example(20, data[-1].input_ids, [-100] * len(data[-1].input_ids))]
    for other in (data[:-1], changed, data[::-1]):
        with pytest.raises(ValueError, match="belongs to another order"):
            Stream(other, batch_size=2).restore(state)


@pytest.mark.parametrize(
    "change", [{"position": 10}, {"position": -1}, {"epoch": -1}, {"epoch": 1.5}, {"position": None}, {"epoch": True}]
)
def test_a_position_that_does_not_exist_is_refused(change: dict[str, Any]) -> None:
    stream = Stream(rows_of(20), batch_size=2)
    with pytest.raises(ValueError, match="no position"):
        stream.restore({**stream.state(), **change})
    with pytest.raises(ValueError, match="belongs to another order"):
        stream.restore({})


def test_a_position_holds_under_another_split_of_the_same_step() -> None:
    data = rows_of(50)
    one = Stream(data, batch_size=8)
    take(one, 3)
    other = Stream(data, batch_size=1, accumulation=8)
    other.restore(one.state())
    assert sorted(lines(next(other))) == sorted(lines(next(one)))


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 0},
        {"batch_size": 1, "accumulation": 0},
        {"batch_size": 1, "rank": 1},
        {"batch_size": 1, "rank": -1},
        {"batch_size": 1, "pack": True},
    ],
)
def test_impossible_settings_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be at least 1|max_length"):
        Stream(rows_of(3), **arguments)


def test_no_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="no examples"):
        Stream([], batch_size=1)


def test_it_is_an_iterator_without_end() -> None:
    stream = Stream(rows_of(3), batch_size=2)
    assert iter(stream) is stream
    for number, _ in enumerate(stream):
        if number == 100:
            break
    assert (stream.epoch, stream.position) == (50, 1)
